// openai for Node: BASE_URL MODEL QUESTION plain|stream|leave. What it saw is one line of JSON.
import { createRequire } from "node:module";

const OpenAI = createRequire(process.env.NODE_MODULES + "/")("openai");
const [url, model, question, how] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: question }], temperature: 0 };
let saw;
try {
  if (how === "plain") {
    const answer = await client.chat.completions.create(asked);
    saw = { text: answer.choices[0].message.content, model: answer.model };
  } else {
    const stream = await client.chat.completions.create({ ...asked, stream: true });
    const pieces = [];
    for await (const chunk of stream) {
      pieces.push(...chunk.choices.map((choice) => choice.delta.content ?? ""));
      saw = { text: pieces.join(""), model: chunk.model };
      if (how === "leave" && pieces.length === 3) break;
    }
  }
} catch (error) {
  saw = { error: error.message, code: error.code, status: error.status, type: error.constructor.name };
}
console.log(JSON.stringify(saw));
process.stdin.resume(); // who has left is still there
