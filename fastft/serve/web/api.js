// Talks to the gateway. Whatever goes wrong becomes a Failure, which says what happened and what to do in plain words.

const SAID = {
  unreachable: ["The server does not answer.", "It may have been stopped, or the network is down. Nothing is lost: retry when it is back."],
  cut: ["The connection broke in the middle of the answer.", "What came so far is kept. Retry to ask again."],
  no_worker: ["No worker can answer for this model just now.", "It may be starting, or it has stopped. Retry in a moment, or choose another model."],
  worker_lost: ["The worker that was writing this answer is gone.", "What came so far is kept. Retry to ask again."],
  queue_full: ["Too many people are asking: the queue is full.", "Your question is kept. Retry in a moment."],
  rate_limit_exceeded: ["This key has used up its requests for this minute.", "Your question is kept. Retry in a moment."],
  context_length_exceeded: ["The conversation no longer fits into what the model can read.", "Start a new conversation, or edit an earlier message to make it shorter."],
  model_not_found: ["This model is not served here any more.", "Choose another one and retry."],
  invalid_api_key: ["This server asks for a key.", "Give yours, and retry."],
  content_flagged: ["The moderation service refuses this message.", "Edit it and send it again."],
  moderation_unavailable: ["The moderation service cannot be reached, and nothing is answered without it.", "Your question is kept. Retry in a moment."],
  shutting_down: ["The server is shutting down.", "Your question is kept. Retry when it is back."],
  body_too_large: ["This conversation is too large to send.", "Start a new conversation."],
  origin_not_allowed: ["The server does not answer pages from this address.", "Open the page at the address that the server printed when it started."],
  battle_unknown: ["The server does not know this round any more; it has been restarted since.", "Start a new round."],
  battle_unfinished: ["Both answers have to be finished before you can vote.", "Wait for them, or retry the one that failed."],
  vote_not_written: ["The vote could not be written down, so it does not count.", "Vote again."],
  left: ["The page was left before this answer was finished.", "What came so far is kept. Retry to ask again."],
};

// Codes whose message from the server says more: numbers, names, reasons.
const ADDS = ["context_length_exceeded", "queue_full", "rate_limit_exceeded", "model_not_found", "content_flagged", "body_too_large", "origin_not_allowed"];

export class Failure extends Error {
  constructor(code, message = "", retryAfter = null) {
    const [what, hint] = SAID[code] || [message ? `The server refused: ${message}` : "Something went wrong.", "Change the request, or retry."];
    super(what);
    this.code = code || "unknown";
    this.what = what;
    this.hint = retryAfter ? hint.replace("in a moment", `in ${retryAfter} s`) : hint;
    this.detail = ADDS.includes(code) ? message : "";
  }

  // What is kept with a message.
  get plain() {
    return { code: this.code, what: this.what, hint: this.hint, detail: this.detail };
  }
}

const KEY = "fastft-key";
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

// Others are told of what concerns the whole page: "unreachable", "key".
export const news = new EventTarget();

async function ask(path, { method = "GET", body, signal, headers = {} } = {}) {
  const sent = { ...headers };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    news.dispatchEvent(new Event("unreachable"));
    throw new Failure("unreachable");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  let error = {};
  try {
    error = (await response.json()).error || {};
  } catch {
    // A proxy's page, say: there is nothing to quote.
  }
  const code = error.code || { 401: "invalid_api_key", 413: "body_too_large", 502: "no_worker", 503: "no_worker", 504: "no_worker" }[response.status];
  if (code === "invalid_api_key") news.dispatchEvent(new Event("key"));
  return new Failure(code, error.message || `status ${response.status}`, response.headers.get("retry-after"));
}

export const getJson = async (path, options) => (await ask(path, options)).json();

// Asks for an answer and calls onText with each piece. Returns {model, asked, event, finish}; raises Failure, or AbortError.
export async function stream(path, body, { signal, headers, onText, onBegin = () => {} }) {
  const response = await ask(path, { method: "POST", body: { ...body, stream: true }, signal, headers });
  const answer = {
    model: response.headers.get("x-fastft-model"),
    asked: response.headers.get("x-fastft-asked"),
    event: response.headers.get("x-fastft-event"),
    finish: null,
  };
  onBegin(answer);
  let done = false;
  try {
    for await (const event of events(response)) {
      if (event === "[DONE]") done = true;
      else read(JSON.parse(event), answer, onText);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("cut");
  }
  if (!done && !answer.finish) throw new Failure("cut");
  return answer;
}

function read(chunk, answer, onText) {
  if (chunk.error) throw new Failure(chunk.error.code, chunk.error.message);
  if (chunk.model) answer.model = chunk.model;
  for (const choice of chunk.choices || []) {
    if (choice.delta && choice.delta.content) onText(choice.delta.content);
    answer.finish = choice.finish_reason || answer.finish;
  }
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      held += decoder.decode(value, { stream: !done });
      const lines = held.split("\n");
      held = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening frees the connection
  }
}
