"""OpenAI's files and batches for `openai_server`: rows are answered by the same script as single requests.

    with endpoint(reply, batches=BatchStore(polls=2, end=lambda number: "expired" if number == 0 else "completed")) as server: …

A batch ends after it has been looked at `polls` times. One that expires or is cancelled has answered half of its rows.
"""

import email
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


@dataclass
class BatchStore:
    """What the endpoint holds, and how its batches end."""

    polls: int = 1
    end: Callable[[int], str] = lambda number: "completed"
    """The status in which the batch of this number ends (from 0 on)."""
    most_rows: int = 50_000
    page: int = 100
    """Batches in one page of the list."""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: list[dict] = field(default_factory=list)
    looked: Counter = field(default_factory=Counter)
    paid: Counter = field(default_factory=Counter)
    """Answers by custom_id."""
    lock: Any = field(default_factory=threading.RLock)

    def handle(
        self, method: str, path: str, headers: Any, content: bytes, answer: Callable[[dict], tuple[int, bytes]]
    ) -> tuple[int, bytes]:
        """Return (status, body) of a request to /v1/files or /v1/batches. `answer` gives (status, body) for a row's body."""
        route, _, query = path.partition("?")
        parts = route.strip("/").split("/")[1:]
        with self.lock:
            match [method, *parts]:
                case ["POST", "files"]:
                    return 200, self._new_file(_uploaded(headers, content))
                case ["GET", "files", name, "content"] if name in self.files:
                    return 200, self.files[name]
                case ["POST", "batches"]:
                    return 200, self._new_batch(json.loads(content))
                case ["GET", "batches"]:
                    return 200, self._list(dict(each.split("=") for each in query.split("&") if each))
                case ["GET", "batches", name] if found := [each for each in self.batches if each["id"] == name]:
                    return 200, self._look_at(found[0], answer)
                case ["POST", "batches", name, "cancel"] if found := [e for e in self.batches if e["id"] == name]:
                    self._finish(found[0], "cancelled", answer)
                    return 200, json.dumps(found[0]).encode()
        return 404, json.dumps({"error": {"message": f"no {route}", "code": None}}).encode()

    def _new_file(self, content: bytes) -> bytes:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return json.dumps({"id": name, "object": "file", "bytes": len(content), "purpose": "batch"}).encode()

    def _new_batch(self, asked: dict) -> bytes:
        assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
        assert all(len(key) <= 64 and len(value) <= 512 for key, value in asked["metadata"].items())
        batch = {"id": f"batch_{len(self.batches)}", "object": "batch", "status": "validating", **asked}
        self.batches.append(batch)
        return json.dumps(batch).encode()

    def _list(self, query: dict[str, str]) -> bytes:
        newest_first = self.batches[::-1]
        names = [batch["id"] for batch in newest_first]
        start = names.index(query["after"]) + 1 if "after" in query else 0
        stop = start + min(self.page, int(query.get("limit", 20)))
        page = {"object": "list", "data": newest_first[start:stop], "has_more": stop < len(newest_first)}
        return json.dumps(page).encode()

    def _look_at(self, batch: dict, answer: Callable[[dict], tuple[int, bytes]]) -> bytes:
        self.looked[batch["id"]] += 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if self.looked[batch["id"]] >= self.polls:
                self._finish(batch, self.end(self.batches.index(batch)), answer)
        return json.dumps(batch).encode()

    def _finish(self, batch: dict, status: str, answer: Callable[[dict], tuple[int, bytes]]) -> None:
        rows = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        batch["status"] = status
        if len(rows) > self.most_rows:
            status = batch["status"] = "failed"
            batch["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]}
        elif status == "failed":
            batch["errors"] = {"data": [{"code": "invalid_model", "message": "the model cannot be used", "line": None}]}
        if status == "failed":
            return
        reached = rows if status == "completed" else rows[: len(rows) // 2]
        answers, errors = [], []
        for number, row in enumerate(rows):
            place = {"id": f"batch_req_{number}", "custom_id": row["custom_id"]}
            if number >= len(reached):
                errors.append({**place, "response": None, "error": EXPIRED})
                continue
            code, body = answer(row["body"])
            response = {"status_code": code, "request_id": f"req_{number}", "body": json.loads(body)}
            (answers if code == 200 else errors).append({**place, "response": response, "error": None})
            self.paid[row["custom_id"]] += code == 200
        for name, content in (("output_file_id", answers), ("error_file_id", errors)):
            if content:
                lines = "".join(json.dumps(row) + "\n" for row in reversed(content))
                batch[name] = json.loads(self._new_file(lines.encode()))["id"]


def _uploaded(headers: Any, content: bytes) -> bytes:
    """Return the file of a multipart form."""
    form = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + content)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
    assert parts["purpose"].get_payload() == "batch"
    return parts["file"].get_payload(decode=True)
