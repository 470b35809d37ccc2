"""pydantic-ai: BASE_URL MODEL QUESTION plain|stream|leave. What it saw is one line of JSON."""

import asyncio
import json
import sys

from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, name, question, how = sys.argv[1:]
client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))
agent = Agent(model, model_settings={"temperature": 0})


async def stream(pieces: list[str]) -> None:
    async with agent.run_stream(question) as answer:
        async for piece in answer.stream_text(delta=True, debounce_by=None):
            pieces.append(piece)
            if how == "leave" and len(pieces) == 3:
                asyncio.current_task().cancel()  # as a web server does when its own client has left


async def main() -> None:
    pieces: list[str] = []
    try:
        if how == "plain":
            pieces.append((await agent.run(question)).output)
        else:
            await asyncio.gather(asyncio.create_task(stream(pieces)), return_exceptions=how == "leave")
        saw = {"text": "".join(pieces)}
    except ModelHTTPError as error:
        saw = {"error": str(error), "status": error.status_code, "type": type(error).__name__}
    print(json.dumps(saw), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # who has left is still there


asyncio.run(main())
