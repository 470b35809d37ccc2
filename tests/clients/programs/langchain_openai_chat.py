"""langchain-openai: BASE_URL MODEL QUESTION plain|stream|leave. What it saw is one line of JSON."""

import json
import sys

import openai
from langchain_openai import ChatOpenAI

url, model, question, how = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0)
try:
    if how == "plain":
        answer = chat.invoke(question)
        saw = {"text": answer.content, "model": answer.response_metadata["model_name"]}
    else:
        pieces, stream = [], chat.stream(question)
        for chunk in stream:
            pieces.append(chunk.content)
            if how == "leave" and len(pieces) == 3:
                break
        stream.close()
        saw = {"text": "".join(pieces)}
except openai.APIStatusError as error:
    saw = {"error": error.message, "code": error.code, "status": error.status_code, "type": type(error).__name__}
print(json.dumps(saw), flush=True)
sys.stdin.read()  # who has left is still there
