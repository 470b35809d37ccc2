"""Batches over real HTTP: each request is answered once and paid once, whatever becomes of its batch."""

import asyncio
import json
import time
from collections import Counter
from functools import partial

import pytest
from helpers import openai_server
from helpers.faulty_teacher import FaultyTeacher
from helpers.openai_batches import BatchStore

from fastft.errors import UserError
from fastft.inference import batch
from fastft.inference.budget import Cache, Money
from fastft.inference.client import Client, Unanswered, run_all
from fastft.inference.completion import ErrorInBody
from fastft.inference.connection import Connection


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits a minute for a batch that ends at once."""
    for name, seconds in (("IDLE_S", 0.05), ("FIRST_POLL_S", 0.01), ("LAST_POLL_S", 0.02), ("GRACE_S", 0.2)):
        monkeypatch.setattr(batch, name, seconds)


def ask_all(server, tmp_path, texts, money=None, **options):
    """Ask all texts through batches. Returns the outcomes in order, and why it stopped."""
    money = money or Money()
    cache = Cache(tmp_path / "cache.jsonl")
    client = Client(f"{server.url}#teacher", cache=cache, money=money, batch=True, **options)
    found = {}

    async def work(text):
        try:
            return await client.ask([{"role": "user", "content": text}], max_tokens=64)
        except Unanswered as error:
            return error

    stopped = run_all([partial(work, text) for text in texts], "asking", money, found.__setitem__)
    cache.close()
    return [found.get(i) for i in range(len(texts))], stopped


TEXTS = [f"What is {i}?" for i in range(40)]
PLAIN = partial(FaultyTeacher, every_429=0, every_500=0)


def test_a_batch_answers_every_request_at_half_the_price(tmp_path):
    store = BatchStore(polls=3)
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        money = Money()
        replies, stopped = ask_all(server, tmp_path, TEXTS, money, price=(1000.0, 1000.0))
        again, _ = ask_all(server, tmp_path, TEXTS)
    assert stopped is None and len(store.batches) == 1 and len(server.requests) == 40
    assert [reply.text for reply in again] == [reply.text for reply in replies]
    assert all(reply.cached for reply in again) and not any(reply.cached for reply in replies)
    assert replies[3].batch == "batch_0" and replies[3].request_id.startswith("req_") and replies[3].model == "teacher"
    tokens = sum(reply.prompt_tokens + reply.completion_tokens for reply in replies)
    assert money.spent == pytest.approx(tokens * 1000 / 1e6 / 2) == pytest.approx(sum(reply.usd for reply in replies))
    assert [path.name for path in sorted((tmp_path / "cache.batches").glob("*/*"))] == ["000001.json", "run.json"]


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_a_batch_has_not_reached_goes_into_the_next(tmp_path, status):
    store = BatchStore(end=lambda number: status if number < 2 else "completed")
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        replies, _ = ask_all(server, tmp_path, TEXTS)
    assert all(reply.text for reply in replies) and set(store.paid.values()) == {1} and len(store.paid) == 40
    assert [reply.batch for reply in replies].count("batch_0") == 20 and len(store.batches) == 3


def test_rows_that_fail_go_into_the_next_batch_and_bad_ones_are_given_up(tmp_path):
    texts = [*TEXTS[:20], "[400] no", "[malformed] once", "[empty]", "[cut]", "[refusal]", "[think]"]
    store = BatchStore()
    with openai_server.endpoint(FaultyTeacher(every_429=0, every_500=7), batches=store) as server:
        replies, stopped = ask_all(server, tmp_path, texts)
    assert stopped is None and isinstance(replies[20], Unanswered) and "cannot be answered" in str(replies[20])
    assert all(reply.text for reply in [*replies[:20], replies[21]])
    assert (replies[22].text, replies[23].finish_reason, replies[24].refused) == ("", "length", True)
    assert replies[25].reasoning == "Let me think about it." and "think" not in replies[25].text
    assert len(store.batches) > 1
    assert sorted(store.paid.values()) == [0] + [1] * 24 + [2], "the malformed one was billed, too"


def test_equal_requests_take_one_row(tmp_path):
    store = BatchStore()
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        replies, _ = ask_all(server, tmp_path, ["same"] * 8 + TEXTS[:3])
    assert len(server.requests) == 4 and len({reply.text for reply in replies}) == 4
    assert [reply.cached for reply in replies[:8]] == [False] + [True] * 7


def test_limits_of_a_file_and_of_the_account_make_more_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_ROWS", 15)
    monkeypatch.setattr(batch, "MOST_BYTES", 2500)
    store = BatchStore(most_rows=4, page=2)
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        replies, _ = ask_all(server, tmp_path, TEXTS)
    assert all(reply.text for reply in replies) and set(store.paid.values()) == {1}
    assert all(len(content) <= 2500 for name, content in store.files.items() if b'"method"' in content)


def test_money_holds_for_batches(tmp_path):
    """A request that does not fit waits until a batch has ended and its reserve is free."""
    store = BatchStore()
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        money = Money(0.1)
        replies, stopped = ask_all(server, tmp_path, TEXTS, money, price=(10.0, 1000.0))
    assert "stopped before $0.10 would be exceeded" in stopped and 0.065 < money.spent <= 0.1
    assert len(store.batches) > 1 and money.spent == pytest.approx(sum(reply.usd for reply in replies if reply))


def test_a_batch_that_fails_as_a_whole_is_one_line(tmp_path):
    with openai_server.endpoint(PLAIN(), batches=BatchStore(end=lambda number: "failed")) as server:
        replies, stopped = ask_all(server, tmp_path, TEXTS)
    assert not any(replies) and not server.requests
    assert stopped == f"{server.url}: batch batch_0 has failed (the model cannot be used)"


def test_an_endpoint_without_batches_is_one_line(tmp_path):
    with (
        openai_server.endpoint(PLAIN(), batches=None) as server,
        openai_server.endpoint(PLAIN(), BatchStore()) as other,
    ):
        server.url = other.url.replace("/v1", "/v2/v1")
        _, stopped = ask_all(server, tmp_path, TEXTS)
    assert stopped.endswith("(has it batches at all?)") and "\n" not in stopped


def test_an_output_file_that_is_gone_is_one_line_and_pays_nothing_again(tmp_path):
    store = BatchStore()
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        real = store._look_at

        def look(found, answer):
            content = real(found, answer)
            store.files.pop(found.get("output_file_id"), None)
            return content

        store._look_at = look
        for _ in range(2):
            _, stopped = ask_all(server, tmp_path, TEXTS)
            assert "its answers are gone" in stopped and "cache.batches" in stopped
    assert len(server.requests) == 40


def test_batches_need_a_cache():
    with pytest.raises(UserError, match="batches need a file for their answers"):
        Client("http://127.0.0.1:9/v1#x", batch=True)


def test_a_batch_that_was_created_in_the_moment_of_a_kill_is_found_again(tmp_path):
    """The file says that the endpoint was asked, and not which id it gave."""
    store = BatchStore(polls=2)
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        with pytest.raises(RuntimeError, match="killed"), pytest.MonkeyPatch.context() as patch:
            real = batch.Batches._create_once

            async def killed(self, job, asked):
                await real(self, job, asked)
                raise RuntimeError("killed")

            patch.setattr(batch.Batches, "_create_once", killed)
            ask_all(server, tmp_path, TEXTS)
        [path] = (tmp_path / "cache.batches").glob("*/0*.json")
        assert json.loads(path.read_text())["id"] == "" and len(store.batches) == 1
        replies, stopped = ask_all(server, tmp_path, TEXTS)
    assert stopped is None and all(reply.batch == "batch_0" for reply in replies) and len(store.batches) == 1


def test_endpoints_that_share_a_cache_have_batches_of_their_own(tmp_path):
    """Two judges of one run, which is killed after it has created a batch at each."""
    stores = BatchStore(polls=10**9), BatchStore(polls=10**9)
    with openai_server.endpoint(PLAIN(), stores[0]) as one, openai_server.endpoint(PLAIN(), stores[1]) as two:
        for start in range(2):
            cache, money = Cache(tmp_path / "cache.jsonl"), Money()
            clients = [Client(f"{each.url}#t", cache=cache, money=money, batch=True) for each in (one, two)]
            works = [partial(client.ask, [{"role": "user", "content": text}]) for client in clients for text in TEXTS]

            async def killed():
                while not all(store.looked for store in stores):
                    await asyncio.sleep(0.01)
                raise UserError("killed")

            found = {}
            run_all([killed] * (not start) + works, "asking", money, found.__setitem__)
            cache.close()
            for store in stores:
                store.polls = 1
    assert all(len(store.batches) == 1 and set(store.paid.values()) == {1} for store in stores)
    assert [reply.endpoint for reply in found.values()].count(f"{two.url}#t") == 40 and len(found) == 80


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_garbled_line_costs_no_other_answer(tmp_path, caplog, where):
    store = BatchStore()
    garbled = []

    def change(lines):
        garbled.append(lines.pop(0 if where == "first" else -1))
        junk = [b"<html>\xff", b'{"custom_id": ["x"], "response": 5}', b"[1]", lines[5], b'{"custom_id": "unknown"}']
        return [*lines[:3], *junk, *lines[3:]]

    with openai_server.endpoint(PLAIN(), batches=store) as server:
        change_output(store, change)
        replies, stopped = ask_all(server, tmp_path, TEXTS)
    assert stopped is None and all(reply.text for reply in replies) and "line 4 is not JSON" in caplog.text
    again = json.loads(garbled[0])["custom_id"]
    assert store.paid == {**dict.fromkeys(store.paid, 1), again: 2} and len(store.paid) == 40


def change_output(store, change):
    """Change the lines of the first output file."""
    real = store._new_file

    def new_file(content):
        if b'"response"' in content and not any(b'"response"' in each for each in store.files.values()):
            content = b"\n".join(change(content.splitlines())) + b"\n"
        return real(content)

    store._new_file = new_file


def test_an_error_with_half_a_character_is_its_rows(tmp_path):
    def reply(body, number):
        bad = body["messages"][0]["content"] == TEXTS[1]
        return openai_server.Failure(400, "cannot answer \ud835") if bad else "Fine."

    with openai_server.endpoint(reply, batches=BatchStore()) as server:
        replies, stopped = ask_all(server, tmp_path, TEXTS[:3])
    assert stopped is None and isinstance(replies[1], Unanswered) and "cannot answer \ufffd" in str(replies[1])


def test_a_batch_that_the_endpoint_has_forgotten_is_one_line_that_says_what_to_do(tmp_path):
    store = BatchStore(polls=10)
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        real = store._look_at
        store._look_at = lambda found, answer: (real(found, answer), store.batches.clear())[0]
        _, stopped = ask_all(server, tmp_path, TEXTS)
    assert "/batches/batch_0" in stopped and "remove its file to pay for them again" in stopped


def test_a_pause_holds_for_every_batch_and_a_long_one_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_BYTES", 2500)
    with openai_server.endpoint(PLAIN(), batches=BatchStore(polls=3)) as server:
        asked, real, refused = [], Connection.request, []

        async def request(self, method, path, *arguments, **options):
            asked.append(time.monotonic())
            if len(asked) == 12:
                refused.append(time.monotonic())
                raise ErrorInBody({"message": "slow down"}, 429, 1.0)
            return await real(self, method, path, *arguments, **options)

        monkeypatch.setattr(Connection, "request", request)
        replies, stopped = ask_all(server, tmp_path, TEXTS)
        assert stopped is None and all(reply.text for reply in replies)
        assert not [each for each in asked if refused[0] < each < refused[0] + 0.99]

        async def tomorrow(self, *arguments, **options):
            raise ErrorInBody({"message": "tomorrow"}, 429, 7200.0)

        monkeypatch.setattr(Connection, "request", tomorrow)
        _, stopped = ask_all(server, tmp_path, ["another"])
        assert "asks to wait 120 minutes" in stopped and "tomorrow" in stopped


def test_who_asks_while_a_batch_of_an_earlier_run_is_divided_pays_once(tmp_path, monkeypatch, caplog):
    """That batch was too large for the account. Its requests are asked only after it has failed."""
    store = BatchStore(polls=10**9)
    with openai_server.endpoint(PLAIN(), batches=store) as server:
        cache, money = Cache(tmp_path / "cache.jsonl"), Money()
        client = Client(f"{server.url}#t", cache=cache, money=money, batch=True)
        works = [partial(client.ask, [{"role": "user", "content": text}]) for text in TEXTS]

        async def killed():
            while not store.looked:
                await asyncio.sleep(0.01)
            raise UserError("killed")

        run_all([killed, *works], "asking", money, lambda index, reply: None)
        cache.close()
        store.polls, store.most_rows, caplog.records[:] = 12, 30, []
        monkeypatch.setattr(
            batch, "LAST_POLL_S", 0.5
        )  # the later batch is not answered before the earlier one is divided
        client = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"), batch=True)

        async def later(text):
            while not any("has failed" in record.getMessage() for record in caplog.records):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            return await client.ask([{"role": "user", "content": text}])

        works = [
            partial(client.ask, [{"role": "user", "content": "another"}]),
            *(partial(later, t) for t in TEXTS[:25]),
        ]
        found = {}
        assert run_all(works, "asking", client.money, found.__setitem__) is None
    files = [store.files[each["input_file_id"]] for each in store.batches if each["status"] != "failed"]
    asked = Counter(json.loads(line)["custom_id"] for file in files for line in file.splitlines())
    assert len(found) == len(asked) == 26 and set(asked.values()) == {1}
