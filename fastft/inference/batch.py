"""Ask through batches: OpenAI's /v1/files and /v1/batches, whose answers take up to a day and cost half.

    batches = Batches(connection, Cache(Path("judged/cache.jsonl")), Money(limit=500))
    reply = await batches.ask(key, messages, {"max_tokens": 1024})      # many at once; returns when its batch has ended

Requests that are asked within a second go into one batch, up to the vendor's limits. What each batch asks is written to
cache.batches/ENDPOINT/ beside the cache before the endpoint hears of it. A batch carries the digest of this directory and the
name of its file as metadata, so a run that was killed finds its batches again, one that was created in the moment of the kill
included. Answers go to the cache; requests that have failed, or that were not reached before the batch expired, go into the next
batch.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.common.files import make_directory, room_for, write_whole
from fastft.common.records import parse_json
from fastft.errors import UserError
from fastft.inference.budget import Cache, Money, OverBudget
from fastft.inference.completion import ErrorInBody, Malformed, Reply, error_in, parse_body, read_parsed
from fastft.inference.connection import Connection, Tries, check_pauses, may_be_billed
from fastft.inference.transport import Lost, Unreached

logger = logging.getLogger(__name__)
MOST_ROWS = 50_000  # of a batch, at OpenAI
MOST_BYTES = 190_000_000  # of its file; OpenAI takes 200 MB
IDLE_S = 1.0  # a batch is sent when no request has joined it for so long
FIRST_POLL_S, LAST_POLL_S = 5.0, 60.0
GRACE_S = 60.0  # how long a batch may take to show in the list after the endpoint was asked to create it
TRANSFER_S = 1800.0  # for a file of 200 MB
PATH = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
TOO_MUCH = "token_limit_exceeded"  # more tokens wait in batches than the account may have


@dataclass
class _BatchRow:
    """A request that waits for its answer."""

    key: str
    messages: list[dict[str, str]]
    parameters: dict[str, Any]
    sent: dict[str, Any]
    future: asyncio.Future
    reserved: float = 0.0
    tries: Tries = field(default_factory=Tries)


@dataclass
class _BatchJob:
    """A batch, as its file in the directory says. Times are seconds since 1970."""

    name: str
    usd: float  # the most that it can cost
    file_id: str = ""
    asked_at: float = 0.0  # when the endpoint was asked to create it
    tries: int = 0
    id: str = ""
    status: str = ""
    answers: int = 0
    failures: int = 0


class Batches:
    """All batches of one endpoint and one cache."""

    def __init__(self, connection: Connection, cache: Cache | None, money: Money):
        if cache is None:
            raise UserError(f"{connection.url}: batches need a file for their answers, and none is kept here")
        self.connection, self.cache, self.money = connection, cache, money
        # Endpoints may share the cache; each has its own batches.
        place = hashlib.sha256(connection.address.encode()).hexdigest()[:12]
        self.directory = cache.path.with_suffix(".batches") / place
        self.joining: list[_BatchRow] = []
        self.joined_at = 0.0
        self.asked: dict[str, _BatchRow] = {}  # by key: who waits
        self.on_the_way: set[str] = set()  # keys in batches
        self.tasks: set[asyncio.Task] = set()
        self.found: asyncio.Task | None = None
        self.sender: asyncio.Task | None = None
        self.digest, self.number, self.most_rows = "", 0, MOST_ROWS
        money.when_closed.append(self._close)

    async def ask(self, key: str, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """Return the reply from a batch. Raises Unanswered, OverBudget, and UserError if every request would fail."""
        if not self.found:
            self.found = asyncio.ensure_future(self._find_all())
        await asyncio.shield(self.found)
        if reply := self.cache.get(key):  # from a batch of an earlier run
            return reply
        future, sent = asyncio.get_running_loop().create_future(), self.connection.known(parameters)
        row = self.asked[key] = _BatchRow(key, messages, parameters, sent, future)
        try:
            if key not in self.on_the_way:
                await self._join(row)
            return await row.future
        finally:
            del self.asked[key]

    # From requests to batches ------------------------------------------------------------------------------------------------

    async def _join(self, row: _BatchRow) -> None:
        row.sent = self.connection.known(row.parameters)
        row.reserved = self.connection.most_usd(row.messages, row.sent)
        await self.money.reserve(row.reserved)
        self.joining.append(row)
        self.joined_at = time.monotonic()
        if not self.sender or self.sender.done():
            self.sender = self._start(self._send_when_idle())

    async def _send_when_idle(self) -> None:
        while self.joining:
            left = self.joined_at + IDLE_S - time.monotonic()
            if left > 0 and len(self.joining) < self.most_rows:
                await asyncio.sleep(min(left, 0.1))
                continue
            rows, self.joining = self.joining[: self.most_rows], self.joining[self.most_rows :]
            try:
                self._send(rows)
            except BaseException as error:
                self._fail([row.key for row in rows], error)
                raise

    def _send(self, rows: list[_BatchRow]) -> None:
        """Write the rows to as few files as their sizes allow, and start a batch with each."""
        lines, size, taken = [], 0, []
        for row in rows:
            body = {"model": self.connection.name, "messages": row.messages, **row.sent}
            line = orjson.dumps({"custom_id": row.key, "method": "POST", "url": PATH, "body": body}) + b"\n"
            if lines and size + len(line) > MOST_BYTES:
                self._begin(lines, taken)
                lines, size, taken = [], 0, []
            size += len(line)
            lines.append(line)
            taken.append(row)
        self._begin(lines, taken)

    def _begin(self, lines: list[bytes], rows: list[_BatchRow]) -> None:
        self.number += 1
        job = _BatchJob(f"{self.number:06d}", sum(row.reserved for row in rows))
        write_whole(self._file(job, ".requests.jsonl"), b"".join(lines), durable=True)
        self._save(job)
        self.on_the_way.update(row.key for row in rows)
        self._start(self._see_through(job, [row.key for row in rows]))

    # From batches to answers -------------------------------------------------------------------------------------------------

    async def _see_through(self, job: _BatchJob, keys: list[str], committed: bool = False) -> None:
        """Create a batch unless it is there, wait for its end, and give its answers to those who wait.

        `committed` says that an earlier run has reserved its cost.
        """
        spent = 0.0
        try:
            while not job.id:
                await self._create(job)
            ended = await self._wait_for(job)
            job.status, failed = ended["status"], dict.fromkeys(keys)
            for place, file_id in (("answers", ended.get("output_file_id")), ("errors", ended.get("error_file_id"))):
                if file_id:
                    spent += await self._collect(job, place, file_id, failed)
            too_much = self._read_errors(job, ended, keys, failed)
            job.failures = len(failed)
            self._save(job)
            self._remove(job)
            # Only now may they join another batch: a run that is killed before this line reads the files again.
            self.on_the_way.difference_update(keys)
            await self._hand_on(job, failed, too_much)
        except BaseException as error:
            self._fail(keys, error)
            raise
        finally:
            if committed:
                self.money.settle(job.usd, spent)

    async def _create(self, job: _BatchJob) -> None:
        """Try to create a batch, after making sure that an earlier try has not done so."""
        if job.asked_at:
            job.id = (await self._listed()).get(job.name, "")
            if not job.id and time.time() - job.asked_at < GRACE_S:
                await asyncio.sleep(min(FIRST_POLL_S, GRACE_S))
                return
        if not job.id:
            if not job.file_id:
                job.file_id = await self._upload(self._file(job, ".requests.jsonl"), f"{self.digest}-{job.name}.jsonl")
            job.asked_at, job.tries = time.time(), job.tries + 1
            self._save(job)
            asked = {
                "input_file_id": job.file_id,
                "endpoint": PATH,
                "completion_window": "24h",
                "metadata": {"fastft": self.digest, "part": job.name},
            }
            job.id = await self._create_once(job, orjson.dumps(asked))
        self._save(job)
        if job.id:
            logger.info("batch %s: the endpoint works on it; a killed run finds it again", job.id)

    async def _create_once(self, job: _BatchJob, asked: bytes) -> str:
        """Return the id of a new batch, "" if there is none or it is not known whether there is one."""
        try:
            return str(_json(await self._once("POST", "/batches", asked))["id"])
        except (Lost, Malformed, KeyError, ErrorInBody, Unreached) as error:
            refused = isinstance(error, ErrorInBody) and error.status_code < 500
            if refused and error.status_code not in (408, 409, 429):
                raise self._refused(error) from None
            if job.tries > self.connection.limits.retries:
                said = self.connection.said(error)
                raise UserError(f"{self.connection.url}/batches: {said}; start the same command again later") from None
            if refused or isinstance(error, Unreached):
                job.asked_at = 0.0  # there is none
            await asyncio.sleep(FIRST_POLL_S)
            return ""

    async def _wait_for(self, job: _BatchJob) -> dict[str, Any]:
        """Return the batch once it has ended."""
        wait_s = FIRST_POLL_S
        while True:
            batch = await self._get(f"/batches/{job.id}")
            if batch.get("status") in ENDED:
                return batch
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, LAST_POLL_S)

    async def _collect(self, job: _BatchJob, place: str, file_id: str, failed: dict[str, Exception | None]) -> float:
        """Take the rows of a batch's file: an answer's key is removed from `failed`, where every other gets its error.

        What stands in lines that are not JSON is lost, though paid for; those who wait for it ask again. Returns the dollars
        that the answers cost.
        """
        path, spent, lost = self._file(job, f".{place}.jsonl"), 0.0, None
        with room_for(path):
            await self._request("GET", f"/files/{file_id}/content", to=path, timeout_s=TRANSFER_S)
        for number, line in enumerate(_lines(path), 1):
            if number % 100 == 0:
                await asyncio.sleep(0)  # those who wait may work on their answers meanwhile
            try:
                key, outcome = self._read(line, job)
            except ValueError:
                lost = Malformed(f"{self.connection.url}/files/{file_id}: line {number} is not JSON")
                logger.warning("%s", lost)
                continue
            if key in failed and isinstance(outcome, Reply):
                del failed[key]
                job.answers += 1
                spent += outcome.usd
                self._answered(key, outcome)
            elif key in failed:
                failed[key] = outcome
        if lost:
            failed.update({key: lost for key, outcome in failed.items() if outcome is None})
        return spent

    def _read(self, line: bytes, job: _BatchJob) -> tuple[str, Reply | Exception]:
        """Return the key of a row of a batch's file, and its reply or why there is none."""
        row = _dict(parse_body(line))
        key, response = str(row.get("custom_id")), _dict(row.get("response"))
        began = self.asked.get(key)
        status, body = response.get("status_code"), response.get("body")
        if not response:
            error = _dict(row.get("error"))
            return key, ErrorInBody({"message": error.get("message") or "no answer", "code": error.get("code")}, 503)
        try:
            if isinstance(status, int) and status >= 300:
                raise error_in(status, body)
            completion = read_parsed(body)
        except (ErrorInBody, Malformed) as error:
            return key, error
        messages, sent = (began.messages, began.sent) if began else ([], {})
        request_id = str(response.get("request_id") or row.get("id") or "")
        return key, self.connection.reply(completion, messages, sent, request_id, batch=job.id)

    def _answered(self, key: str, reply: Reply) -> None:
        if key not in self.cache:  # it may be: a run may be killed while it reads a file
            self.cache.put(key, reply)
        self.cache.check()  # if the disk is full, the answers are still at the endpoint
        self.connection.failed_in_a_row = 0
        if row := self.asked.get(key):
            self._settle(row, reply.usd)
            if not row.future.done():
                row.future.set_result(reply)

    def _failed(self, key: str, error: Exception) -> None:
        """Put a row into the next batch, or give up on it."""
        row = self.asked.get(key)
        if not row:
            return
        self._settle(row, self.connection.most_usd(row.messages, row.sent) if may_be_billed(error) else 0.0)
        try:
            self.connection.count(error, row.tries, row.parameters, row.sent)
        except UserError:
            raise
        except Exception as final:
            if not row.future.done():
                row.future.set_exception(final)
            return
        self._start(self._rejoin(row))

    async def _rejoin(self, row: _BatchRow) -> None:
        try:
            await self._join(row)
        except BaseException as error:
            self._fail([row.key], error)

    def _settle(self, row: _BatchRow, usd: float) -> None:
        if row.reserved:
            self.money.settle(row.reserved, usd)
        row.reserved = 0.0

    def _read_errors(
        self, job: _BatchJob, ended: dict[str, Any], keys: list[str], failed: dict[str, Exception | None]
    ) -> bool:
        """Read why the endpoint did not accept a batch. Returns whether too many tokens wait there.

        Rows that it names get their error. Raises UserError if it names none, because the next batch would fail, too.
        """
        errors = [_dict(each) for each in _dict(ended.get("errors")).get("data") or []]
        if job.status != "failed" or any(error.get("code") == TOO_MUCH for error in errors):
            return job.status == "failed"
        named = [error for error in errors if isinstance(error.get("line"), int) and 0 < error["line"] <= len(keys)]
        if not named:
            said = "; ".join(str(error.get("message") or error.get("code")) for error in errors) or "without a reason"
            self._save(job)
            raise UserError(
                f"{self.connection.url}: batch {job.id} has failed ({self.connection.said(Exception(said))})"
            )
        for error in named:
            failed[keys[error["line"] - 1]] = ErrorInBody({**error, "message": str(error.get("message"))}, 400)
        return False

    async def _hand_on(self, job: _BatchJob, failed: dict[str, Exception | None], too_much: bool) -> None:
        """Put the requests that a batch has not answered into the next one, or give up on them."""
        waiting = {key: self.asked.get(key) for key in failed}  # who asks from now on joins a batch on their own
        if failed:
            logger.warning("batch %s has %s: %s requests are left", job.id, job.status, len(failed))
        if too_much and len(failed) > 1:
            self.most_rows = (len(failed) + 1) // 2
            await asyncio.sleep(LAST_POLL_S)  # other batches may end meanwhile
        for key, error in failed.items():
            if too_much and len(failed) > 1:
                if row := waiting[key]:
                    self._settle(row, 0.0)
                    self._start(self._rejoin(row))
            else:
                said = f"batch {job.id} has {job.status} without an answer"
                self._failed(key, error or ErrorInBody({"message": said}, 503))

    # What the endpoint says --------------------------------------------------------------------------------------------------

    async def _once(self, method: str, path: str, body: bytes | None = None, **options: Any) -> Any:
        """Send a request in no pause that the endpoint has asked for."""
        pace = self.connection.pace
        while (left := pace.paused_until - time.monotonic()) > 0:
            await asyncio.sleep(left)
        try:
            return await self.connection.request(method, path, body, **options)
        except ErrorInBody as error:
            if error.pause_s > 0:
                pace.pause(error.pause_s)
                self.cache.put_pause(self.connection.address, time.time() + error.pause_s)
                check_pauses([self.connection], self.connection.said(error))
            raise

    async def _request(self, method: str, path: str, body: bytes | None = None, **options: Any) -> Any:
        """Send a request of which nothing is harmed if it is sent twice, again and again if that may help."""
        for failures in range(self.connection.limits.retries + 1):
            if failures:
                await asyncio.sleep(min(0.5 * 2 ** (failures - 1), FIRST_POLL_S))
            try:
                return await self._once(method, path, body, **options)
            except ErrorInBody as error:
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    raise self._refused(error, path) from None
                last = error
            except (Lost, Unreached) as error:
                last = error
        raise UserError(
            f"{self.connection.url}{path}: {self.connection.said(last)}; start the same command again later"
        )

    def _refused(self, error: ErrorInBody, path: str = "/batches") -> Exception:
        if error.status_code != 404:
            try:
                self.connection.end_the_run_at(error)
            except UserError as known:
                return known
        said = self.connection.said(error)
        if path.endswith("/content") or (path.startswith("/batches/") and error.status_code == 404):
            remedy = f"; its answers are gone, and {self.directory} says for which batch: remove its file to pay for them again"
            return UserError(f"{self.connection.url}{path}: {said}{remedy}")
        has_none = " (has it batches at all?)" if error.status_code in (404, 405, 501) else ""
        return UserError(f"{self.connection.url}{path}: {said}{has_none}")

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            return _json(await self._request("GET", path))
        except Malformed as error:
            raise UserError(f"{self.connection.url}{path}: {error} (has it batches at all?)") from None

    async def _upload(self, path: Path, name: str) -> str:
        """Upload a file of requests. Returns its id."""
        boundary = secrets.token_hex(16)
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n",
        ]
        body = "".join(parts).encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        try:
            return str(_json(await self._request("POST", "/files", body, headers=headers, timeout_s=TRANSFER_S))["id"])
        except (Malformed, KeyError):
            raise UserError(f"{self.connection.url}/files: gives no id to a file (has it batches at all?)") from None

    async def _listed(self) -> dict[str, str]:
        """Return the ids of the batches that this directory has created, by the names of their files."""
        found, after = {}, ""
        while True:
            page = await self._get(f"/batches?limit=100{f'&after={after}' if after else ''}")
            batches = [_dict(each) for each in page.get("data") or []]
            for batch in batches:
                metadata = _dict(batch.get("metadata"))
                if metadata.get("fastft") == self.digest and metadata.get("part"):
                    found.setdefault(metadata["part"], str(batch.get("id")))
            before, after = after, str(batches[-1].get("id")) if batches else ""
            if not page.get("has_more") or after in ("", before):  # or the endpoint has no pages, whatever it says
                return found

    # What the directory says -------------------------------------------------------------------------------------------------

    async def _find_all(self) -> None:
        """Go on with the batches of earlier runs. What the endpoint has never heard of is dropped, and asked anew."""
        make_directory(self.directory)
        identity = self.directory / "run.json"
        if not identity.is_file():
            write_whole(identity, json.dumps({"digest": secrets.token_hex(16)}), durable=True)
        self.digest = json.loads(identity.read_text())["digest"]
        jobs = [_BatchJob(**json.loads(path.read_text())) for path in sorted(self.directory.glob("[0-9]*.json"))]
        self.number = max((int(job.name) for job in jobs), default=0)
        left = [job for job in jobs if job.status not in ENDED]
        listed = await self._listed()
        for job in left:
            job.id = job.id or listed.get(job.name, "")
            if not job.id and not job.asked_at:
                self._remove(job)
                self._file(job, ".json").unlink()
                continue
            self._save(job)
            keys = [parse_json(line)["custom_id"] for line in _lines(self._file(job, ".requests.jsonl"))]
            logger.info(
                "batch %s of an earlier run: %s requests are on the way", job.id or "(not listed yet)", len(keys)
            )
            self.on_the_way.update(keys)
            self.money.commit(job.usd)
            self._start(self._see_through(job, keys, committed=True))

    def _file(self, job: _BatchJob, suffix: str) -> Path:
        return self.directory / f"{job.name}{suffix}"

    def _save(self, job: _BatchJob) -> None:
        write_whole(self._file(job, ".json"), orjson.dumps(asdict(job)), durable=True)

    def _remove(self, job: _BatchJob) -> None:
        for kind in ("requests", "answers", "errors"):
            self._file(job, f".{kind}.jsonl").unlink(missing_ok=True)

    # Ends --------------------------------------------------------------------------------------------------------------------

    def _start(self, work: Any) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and isinstance(task.exception(), UserError):
            self.money.close()

    def _fail(self, keys: list[str], error: BaseException) -> None:
        """Give an error to all who wait for these keys."""
        for key in keys:
            row = self.asked.get(key)
            if row and not row.future.done():
                row.future.set_exception(OverBudget() if isinstance(error, asyncio.CancelledError) else error)

    def _close(self, error: type[Exception]) -> None:
        """Stop: batches go on at the endpoint, and the next run collects them."""
        self.joining.clear()
        for row in list(self.asked.values()):
            if not row.future.done():
                row.future.set_exception(error())


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from (line for line in file if line.strip())


def _json(response: Any) -> dict[str, Any]:
    """Return the body of a response. Raises Malformed if it is no JSON object."""
    try:
        body = parse_json(response.content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Malformed("the reply is no JSON object")
    return body


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
