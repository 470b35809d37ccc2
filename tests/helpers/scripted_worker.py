"""An OpenAI-compatible worker that answers by script and fails on purpose, a process of its own that kill -9 ends.

    python tests/helpers/scripted_worker.py NAME            # prints "ready http://127.0.0.1:PORT/v1#NAME"

POST /script sets what it does from then on (SCRIPT has the defaults); GET /seen says what it has got. Its answer is
"NAME0 NAME1 …", a word a chunk. HTTP by hand: a library would not break off in the middle of a line.
"""

import asyncio
import contextlib
import json
import sys

SCRIPT = {
    "chunks": 4,
    "delay_s": 0.0,  # between chunks
    "first_s": 0.0,  # before the response begins
    "comments": 0,  # comment lines before the first chunk
    "status": 200,
    "retry_after": None,
    "die_after": None,  # chunks, after which the connection ends in the middle of an event
    "finish": True,  # send a finish_reason
    "done": True,  # send [DONE]
    "error_event": False,  # instead of the end
    "close_kept": False,  # close the connection after the answer without saying so
    "health": 200,
    "words": None,  # instead of NAME0, NAME1, …: one text, whose bytes are sent one at a time
}


class ScriptedWorker:
    def __init__(self, name: str):
        self.name, self.script = name, dict(SCRIPT)
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.running = self.left = self.connections = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self.request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; returns whether the connection is kept."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/script":
            self.script = SCRIPT | json.loads(body)
            return self.send(writer, 200, {})
        if path == "/seen":
            seen = {name: getattr(self, name) for name in ("bodies", "headers", "running", "left", "connections")}
            return self.send(writer, 200, seen)
        if path == "/health":
            return self.send(writer, self.script["health"], {})
        if method == "GET":
            return self.send(writer, 200, {"object": "list", "data": [{"id": self.name}]})
        self.bodies.append(json.loads(body))
        self.headers.append(headers)
        self.running += 1
        # The end of the input is the client's leaving: it sends nothing while it waits for an answer.
        answer = asyncio.ensure_future(self.answer(writer, self.bodies[-1]))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.left += 1
                answer.cancel()
                return False
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            return answer.result() and not self.script["close_kept"]
        finally:
            self.running -= 1

    def send(self, writer: asyncio.StreamWriter, status: int, content: dict, **headers) -> bool:
        body = json.dumps(content).encode()
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        writer.write(head.encode() + body)
        return True

    async def answer(self, writer: asyncio.StreamWriter, body: dict) -> bool:
        script = self.script
        await asyncio.sleep(script["first_s"])
        if script["status"] != 200:
            error = {"message": f"{self.name} says {script['status']}", "type": "x", "param": None, "code": "scripted"}
            more = {"retry-after": script["retry_after"]} if script["retry_after"] else {}
            return self.send(writer, script["status"], {"error": error}, **more)
        words = [f"{self.name}{i} " for i in range(script["chunks"])]
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        head = {"id": "x", "created": 0, "model": body["model"]}
        if not body.get("stream"):
            await asyncio.sleep(script["delay_s"] * len(words))
            if script["die_after"] is not None:
                writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{")
                return False
            message = {"role": "assistant", "content": script["words"] or "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return self.send(writer, 200, head | {"choices": [choice], "usage": usage})
        writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(script["comments"]):
            await self.piece(writer, b": waiting\n\n")
        if script["words"]:
            words = [script["words"]]
        for i, word in enumerate(words):
            event = self.event(head, [{"index": 0, "delta": {"content": word}, "finish_reason": None}])
            if i == script["die_after"]:
                await self.piece(writer, event[: len(event) // 2])
                return False
            for part in [event] if not script["words"] else [bytes([byte]) for byte in event]:
                await self.piece(writer, part)
            await asyncio.sleep(script["delay_s"])
        if script["die_after"] == len(words):
            return False
        if script["error_event"]:
            await self.piece(writer, b'data: {"error": {"message": "out of memory"}}\n\n')
        elif script["finish"]:
            await self.piece(writer, self.event(head, [{"index": 0, "delta": {}, "finish_reason": "stop"}]))
            if (body.get("stream_options") or {}).get("include_usage"):
                await self.piece(writer, self.event(head | {"usage": usage}, []))
        if script["done"]:
            await self.piece(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    def event(self, head: dict, choices: list) -> bytes:
        content = json.dumps(head | {"choices": choices}, ensure_ascii=False)
        return b"data: " + content.encode() + b"\n\n"

    async def piece(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(content), content))
        await writer.drain()


async def main() -> None:
    worker = ScriptedWorker(sys.argv[1])
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    server = await asyncio.start_server(worker.connection, "127.0.0.1", port, backlog=512)
    print(f"ready http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1#{worker.name}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
