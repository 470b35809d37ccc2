"""What many requests share: one answer for equal ones, several endpoints of one model, one cache on one disk."""

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
from helpers import disks, kill_runs, openai_server
from helpers.faulty_teacher import FaultyTeacher
from helpers.openai_server import Failure, completion
from helpers.serving import wait_until

from fastft.errors import UserError
from fastft.inference.budget import Cache, Money, OverBudget
from fastft.inference.client import Client, ClientPool, Unanswered, run_all
from fastft.inference.completion import Reply
from fastft.inference.endpoint import Limits

QUESTION = [{"role": "user", "content": "What is one?"}]


def ask_all(client: Client, texts: list[str], **parameters) -> tuple[list, str | None]:
    """Ask all texts at once. Returns the replies, None for those that were not asked, and why it stopped."""
    found: dict = {}

    async def work(text: str) -> Reply | Unanswered:
        try:
            return await client.ask([{"role": "user", "content": text}], **{"max_tokens": 50, **parameters})
        except Unanswered as error:
            return error

    stopped = run_all((partial(work, text) for text in texts), "asking", client.money, found.__setitem__, len(texts))
    return [found.get(i) for i in range(len(texts))], stopped


def test_equal_requests_in_flight_are_paid_once(tmp_path):
    texts = ["same"] * 8 + ["other", "[400] same", "[400] same"]
    with openai_server.endpoint(FaultyTeacher(every_429=0, every_500=0, wait_s=0.1)) as server:
        client = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"), price=(1e6, 1e6))
        replies, _ = ask_all(client, texts)
        assert len(server.requests) == 3, "also those that are refused"
    assert len({reply.text for reply in replies[:8]}) == 1 and sum(not reply.cached for reply in replies[:9]) == 2
    assert client.money.spent == sum(reply.usd for reply in replies[:9] if not reply.cached) == client.cache.usd
    assert all(isinstance(reply, Unanswered) for reply in replies[9:])


def test_equal_requests_are_shared_without_a_cache_and_attempts_are_not(tmp_path):
    async def work(client):
        asked = [client.ask(QUESTION, attempt) for attempt in (0, 0, 1)]
        return await asyncio.gather(*asked)

    with openai_server.endpoint(FaultyTeacher(every_429=0, every_500=0, wait_s=0.1)) as server:
        asyncio.run(work(Client(f"{server.url}#t")))
        assert len(server.requests) == 2


def test_a_reply_says_where_it_came_from(tmp_path):
    with openai_server.endpoint(FaultyTeacher(every_429=0, every_500=0, model="t-2026-01-01")) as server:
        client = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"), price=(1000.0, 2000.0))
        [plain, thought, refused], _ = ask_all(client, ["a", "[think] b", "[refusal] c"])
    assert (plain.model, plain.endpoint, plain.request_id) == ("t-2026-01-01", f"{server.url}#t", "x")
    assert plain.usd == pytest.approx((1000 * plain.prompt_tokens + 2000 * plain.completion_tokens) / 1e6)
    assert thought.reasoning == "Let me think about it." and refused.refused and not plain.refused
    again = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"))
    assert again.cache.usd == pytest.approx(client.money.spent)
    asked = [{"role": "user", "content": "[think] b"}]
    assert again.cached(asked, 0, {"max_tokens": 50}) == replace(thought, cached=True)


@pytest.mark.parametrize("one_model", [True, False])
def test_a_model_whose_name_changes_is_noticed_and_nothing_is_lost(tmp_path, caplog, one_model):
    def reply(body, number):
        return completion("Fine.", {**body, "model": "t-1" if number < 5 else "t-2"})

    with openai_server.endpoint(reply) as server:
        for start in range(2):  # a run that is started again remembers the name
            cache = Cache(tmp_path / "cache.jsonl")
            client = Client(f"{server.url}#t", Limits(concurrency=1), cache, one_model=one_model)
            replies, stopped = ask_all(client, [f"{start} {i}" for i in range(10)])
            cache.close()
            if one_model:
                assert stopped == (
                    f"{server.url}: t was t-1 and now is t-2, so it may be another model; every answer so far is kept"
                )
                assert sum(reply is not None for reply in replies) == 5 * (not start)
                assert len(server.requests) == 6 + start, "and the one that came is kept"
            else:
                assert stopped is None and all(replies)
    assert len([line for line in caplog.messages if "t was t-1 and now is t-2" in line]) == 2 * (not one_model)


def test_a_pool_asks_whoever_is_free_and_pays_once(tmp_path):
    """One endpoint is overloaded for long; the other answers all, what the first has refused included."""
    busy = Failure(429, "slow down", retry_after="60")
    answered = FaultyTeacher(every_429=0, every_500=0, wait_s=0.02)
    with (
        openai_server.endpoint(lambda b, n: busy if n > 2 else answered(b, n)) as one,
        openai_server.endpoint(answered) as two,
    ):
        cache, money = Cache(tmp_path / "cache.jsonl"), Money()
        clients = [Client(f"{each.url}#t", Limits(concurrency=4), cache, money=money) for each in (one, two)]
        replies, stopped = ask_all(ClientPool(clients), [f"{i}" for i in range(40)])
        assert stopped is None and all(isinstance(reply, Reply) for reply in replies)
        assert {reply.endpoint for reply in replies} == {f"{one.url}#t", f"{two.url}#t"}
        before = len(one.requests) + len(two.requests)
        again, _ = ask_all(ClientPool(clients[::-1]), [f"{i}" for i in range(40)])
        assert [reply.text for reply in again] == [reply.text for reply in replies]
        assert len(one.requests) + len(two.requests) == before
    with pytest.raises(UserError, match="given twice"):
        ClientPool([clients[0], clients[0]])


def test_a_pause_of_hours_ends_the_run_in_one_line(tmp_path):
    with openai_server.endpoint(lambda body, number: Failure(429, "tomorrow", retry_after="7200")) as server:
        for _ in range(2):  # and the next one asks nothing at all
            cache = Cache(tmp_path / "cache.jsonl")
            _, stopped = ask_all(Client(f"{server.url}#t", Limits(concurrency=1), cache), ["a", "b", "c"])
            cache.close()
            assert "asks to wait 120 minutes" in stopped and "start the same command again then" in stopped
            assert len(server.requests) == 1


def test_a_run_that_is_started_again_obeys_the_pause_of_the_one_before(tmp_path):
    path = tmp_path / "cache.jsonl"
    with openai_server.endpoint(lambda body, number: "Fine.") as server:
        before = Cache(path)
        before.open()
        until = time.time() + 1.5
        before.put_pause(f"{server.url}#t", until)
        before.close()
        replies, _ = ask_all(Client(f"{server.url}#t", cache=Cache(path)), ["a"])
        assert replies[0].text == "Fine." and time.time() >= until


def test_money_is_kept_by_many_at_once():
    """A thousand wait for money; what one gives back, the next may have, and none is forgotten."""

    async def work():
        money, most, spent = Money(1.0), [0.0], []

        async def one():
            try:
                await money.reserve(0.125)
            except OverBudget:
                return
            most[0] = max(most[0], money.spent + money._reserved)
            await asyncio.sleep(0)
            money.settle(0.125, 1 / 64)
            spent.append(1)

        await asyncio.gather(*(one() for _ in range(1000)))
        return money, most[0], len(spent)

    money, most, number = asyncio.run(work())
    assert most <= 1.0 and number == 57 and money.spent == 57 / 64


def test_a_full_disk_stops_the_run_before_the_next_paid_request(tmp_path):
    """The disk fills while eight requests are on the way: their answers have their room already."""
    with disks.small_disk(tmp_path / "disk", 4 << 20) as place:
        ballast, filled = place / "ballast", threading.Event()

        def reply(body, number):
            if number == 20:
                with open(ballast, "wb", buffering=0) as file:
                    try:
                        while file.write(b"x" * 4096) == 4096:
                            pass
                    except OSError:
                        filled.set()
            return "word " * 400

        with openai_server.endpoint(reply) as server:
            cache = Cache(place / "cache.jsonl")
            client = Client(f"{server.url}#t", Limits(concurrency=8), cache)
            _, stopped = ask_all(client, [f"{i}" for i in range(1000)], max_tokens=500)
            assert filled.is_set() and "cache.jsonl: No space left on device" in stopped
            assert "every reply is kept" in stopped and "\n" not in stopped
            cache.close()
            asked = [body["messages"][0]["content"] for body in server.requests]
            ballast.unlink()
            client = Client(f"{server.url}#t", Limits(concurrency=8), Cache(place / "cache.jsonl"))
            again, stopped = ask_all(client, asked, max_tokens=500)
            assert stopped is None and len(server.requests) == len(asked) and all(each.cached for each in again)


def test_a_cache_of_another_run_is_not_written_to(tmp_path):
    import subprocess
    import sys

    program = (
        f"from pathlib import Path; from fastft.inference.budget import Cache; c = Cache(Path({str(tmp_path / 'c')!r}))"
    )
    program += "; c.open(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match="another run writes to it"):
        Cache(tmp_path / "c").open()
    other.communicate(b"\n")
    Cache(tmp_path / "c").open()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_nothing_that_is_on_the_way(tmp_path, number, caplog):
    """It comes while four requests are on the way; their answers come, are kept, and nothing else is asked."""
    asked = threading.Barrier(5)

    def reply(body, n):
        if n < 4:
            asked.wait(30)
            wait_until(lambda: "stopping: " in caplog.text, "the signal is heeded")
        return "Fine."

    def stop():
        asked.wait(30)
        os.kill(os.getpid(), number)

    with openai_server.endpoint(reply) as server:
        cache, before = Cache(tmp_path / "cache.jsonl"), signal.getsignal(number)
        client = Client(f"{server.url}#t", Limits(concurrency=4), cache, price=(1.0, 1.0))
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask_all(client, [f"{i}" for i in range(50)])
        cache.close()
        assert len(server.requests) == 4 and signal.getsignal(number) is before
        client = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"))
        replies, _ = ask_all(client, [body["messages"][0]["content"] for body in server.requests])
        assert all(reply.cached for reply in replies) and len(server.requests) == 4


def test_the_second_signal_ends_everything_at_once(caplog):
    asked, done = threading.Event(), threading.Event()

    def reply(body, n):
        asked.set()
        done.wait(60)
        return "Fine."

    def stop():
        asked.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: "stopping: " in caplog.text, "the first is heeded")
        os.kill(os.getpid(), signal.SIGINT)

    with openai_server.endpoint(reply) as server:
        client = Client(f"{server.url}#t", Limits(concurrency=1))
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask_all(client, ["a", "b"])
        done.set()
        assert len(server.requests) == 1


def test_what_another_run_has_paid_for_meanwhile_is_not_asked_again(tmp_path):
    """This run has read the cache before the other wrote to it and ended."""
    with openai_server.endpoint(FaultyTeacher(every_429=0, every_500=0)) as server:
        late = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"))
        early = Client(f"{server.url}#t", cache=Cache(tmp_path / "cache.jsonl"))
        first, _ = ask_all(early, ["a", "b"])
        until = time.time() + 1.5
        early.cache.put_pause(f"{server.url}#t", until)
        early.cache.close()
        replies, _ = ask_all(late, ["a", "b", "c"])
        assert time.time() >= until, "nor is it asked before it is time"
        assert [reply.cached for reply in replies] == [True, True, False] and len(server.requests) == 3
        assert replies[0].text == first[0].text and late.cache.usd == early.cache.usd + replies[2].usd
        with pytest.raises(UserError, match="cannot be asked through batches"):
            ClientPool([Client(f"{server.url}#t", cache=late.cache, batch=True)])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True])
def test_a_run_that_is_killed_again_and_again_pays_once(tmp_path, batch):
    """`benchmarks/teacher.py --kills 20` is the long form."""
    rows = tmp_path / "rows.jsonl"
    kill_runs.write_rows(rows, 60)
    teacher = FaultyTeacher(wait_s=0.0 if batch else 0.1, every_429=25)
    whole = kill_runs.run_killed(rows, tmp_path / "whole", replace(teacher, every_429=0), 0, batch=batch)
    killed = kill_runs.run_killed(rows, tmp_path / "killed", teacher, 4, batch=batch, most_s=0.8)
    assert killed.answers == whole.answers and len(whole.answers) == 60 and killed.kills > 0
    assert killed.paid_twice <= killed.in_flight and killed.repeats_paid == 1
    assert all(after < 1.0 for after in killed.started_in_pauses), "those that were on the way when it came"
