"""openai for Python, 2.x and 3.x: BASE_URL MODEL QUESTION plain|stream|leave. What it saw is one line of JSON."""

import json
import sys

import openai

url, model, question, how = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
asked = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
try:
    if how == "plain":
        answer = client.chat.completions.create(**asked)
        saw = {"text": answer.choices[0].message.content, "model": answer.model}
    else:
        pieces = []
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            for chunk in stream:
                pieces += [choice.delta.content or "" for choice in chunk.choices]
                if how == "leave" and len(pieces) == 3:
                    break
        saw = {"text": "".join(pieces), "model": chunk.model}
except openai.APIStatusError as error:
    saw = {"error": error.message, "code": error.code, "status": error.status_code, "type": type(error).__name__}
print(json.dumps(saw), flush=True)
sys.stdin.read()  # who has left is still there
