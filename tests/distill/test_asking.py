"""Asking: nothing is paid twice and nothing lost, whatever fails and whenever the run is killed; the ledger adds up."""

import json
import os
import signal
import threading
import time

import pytest
from helpers import disks, openai_server
from helpers.distilling import distill, kept, ledger, query, rejected, right, rows, settings, start, write_lines
from helpers.openai_batches import BatchStore
from helpers.openai_server import Failure, completion

from fastft.distill.settings import TeacherConfig
from fastft.distill.teachers.answers import Answers, without_thoughts
from fastft.distill.teachers.asking import Purse, _client
from fastft.errors import UserError
from fastft.inference.budget import Money


def test_every_query_ends_with_its_reason(tmp_path):
    """One of each: kept, refused, cut, unverified twice, failed, duplicate; and the same command asks only what failed."""
    queries = [query(number) for number in range(1, 9)]
    queries.append({**query(1), "id": "again"})
    write_lines(tmp_path / "queries.jsonl", queries)
    mended = False

    def reply(body, number):
        said = body["messages"][-1]["content"]
        if "What is 2 " in said:
            return "I'm sorry, but I cannot help with sums."
        if "What is 3 " in said:
            return completion("Well, 3 and 3 are", body, "length")
        if "What is 4 " in said:
            return "The answer is 9."
        if "What is 5 " in said:
            return "It is a nice sum."
        if "What is 6 " in said and not mended:
            return Failure(400, "this prompt is flagged")
        if "What is 7 " in said:
            return completion("", body)
        return right(body)

    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, teacher_usd_per_million=[1e6, 1e6], verify={"near": 0})
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 8, "equal requests are paid for once"
        assert rejected(tmp_path) == {
            ("q2", "first"): ("refused", "says that it cannot"),
            ("q3", "first"): ("cut", "longer than max_tokens"),
            ("q4", "first"): ("unverified", "wrong answer"),
            ("q5", "first"): ("unverified", "no answer found"),
            ("q6", "first"): ("failed", rejected(tmp_path)["q6", "first"][1]),
            ("q7", "first"): ("cut", "empty answer"),
            ("again", "first"): ("duplicate", "the same request"),
        }
        assert "flagged" in rejected(tmp_path)["q6", "first"][1]
        [teacher] = ledger(tmp_path)["teachers"]
        counted = [
            teacher[name] for name in ("kept", "refused", "cut", "unverified", "failed", "over_budget", "duplicate")
        ]
        assert counted == [2, 1, 2, 2, 1, 0, 1] and teacher["planned"] == sum(counted) == 9
        answers = rows(tmp_path / "run/answers.jsonl")
        assert teacher["usd"] == sum(each["usd"] for each in answers) > 0
        mended = True
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 9 and ("q6", "first") not in rejected(tmp_path)
    assert [row["id"] for row in kept(tmp_path)] == ["q1", "q6", "q8"]


def test_a_row_says_where_it_comes_from(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(1, system="Be short.")])
    reply = lambda body, number: completion(right(body), body, reasoning_content="1 1?")  # noqa: E731
    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, teacher_usd_per_million=[1, 2], teacher_top_p=0.95)
        assert distill(tmp_path, **given) == 0
    [row] = kept(tmp_path)
    assert [each["role"] for each in row["messages"]] == ["system", "user", "assistant"]
    assert [each["train"] for each in row["messages"]] == [False, False, True]
    origin = row["distill"]
    assert origin["parameters"] == {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024}
    assert (origin["teacher"], origin["message"], origin["version"], origin["reasoning"]) == (
        "first",
        "own",
        "small",
        "1 1?",
    )
    assert origin["request_id"] == "x" and origin["usd"] > 0 and origin["endpoint"] == f"{server.url}#small"
    assert row["source"] == "mine/task1" and row["model"] == "small"


def test_two_teachers_answer_at_once_and_the_second_is_asked_its_part(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(20)])
    both = threading.Barrier(2, timeout=20)

    def reply(body, number):
        if first.pop(body["model"], None):
            both.wait()  # the first request of each waits for the other's
        return right(body)

    first = {"small": True, "big": True}
    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, verify={"near": 0})
        given["teachers"].append({"name": "second", "url": server.url, "model": "big", "share": 0.2})
        assert distill(tmp_path, **given) == 0
        asked = [body["model"] for body in server.requests]
    assert (asked.count("small"), asked.count("big")) == (20, 4)
    assert len(kept(tmp_path, 1)) == 20 and len(kept(tmp_path, 2)) == 4


def test_the_money_holds_over_all_starts(tmp_path):
    """With requests on the way, too: each may cost a dollar, and each costs a half."""
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(30)])

    def reply(body, number):
        return completion(right(body), body).replace(b'"completion_tokens": ', b'"completion_tokens": 500, "c": ')

    with openai_server.endpoint(reply) as server:
        prices = {"teacher_usd_per_million": [0, 1000], "teacher_max_tokens": 1000, "max_usd": 5.0}
        given = settings(tmp_path, server.url, verify={"near": 0}, **prices)
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"21 answers are missing \(stopped before max_usd of \$5.00 would be exceeded\)"
            ):
                distill(tmp_path, **given)
            assert len(server.requests) == 9
            assert ledger(tmp_path)["usd"] == 4.5 and ledger(tmp_path)["teachers"][0]["over_budget"] == 21
        assert distill(tmp_path, "--max_usd", "100", **given) == 0
        assert len(server.requests) == 30


@pytest.mark.slow
def test_an_address_that_cannot_answer_leaves_its_work_to_the_others(tmp_path, caplog):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(12)])
    with openai_server.endpoint(right) as server, openai_server.endpoint(lambda body, n: Failure(404)) as useless:
        given = settings(tmp_path, [useless.url, server.url], verify={"near": 0})
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 12
    assert f"{useless.url}: has no small (404)" in caplog.text
    assert ledger(tmp_path)["teachers"][0]["kept"] == 12


@pytest.mark.slow
def test_a_teacher_that_cannot_answer_stops_itself_alone(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(5)])
    with openai_server.endpoint(right) as server, openai_server.endpoint(lambda body, n: Failure(401)) as closed:
        given = settings(tmp_path, server.url, verify={"near": 0})
        given["teachers"].append({"name": "second", "url": closed.url, "model": "big"})
        with pytest.raises(UserError, match=r"^5 answers are missing \(.* wants a key .*; the same command goes on$"):
            distill(tmp_path, **given)
    assert [each["kept"] for each in ledger(tmp_path)["teachers"]] == [5, 0]
    assert ledger(tmp_path)["teachers"][1]["failed"] == 5


def test_a_model_that_changes_its_name_stops_the_run_and_its_answer_is_kept(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(6)])

    def reply(body, number):
        return completion(right(body), {**body, "model": "small-1" if number < 3 else "small-2"})

    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, teacher_concurrency=1, verify={"near": 0})
        message = (
            "first: the endpoint answered as 'small-1' and now as 'small-2'; set any_version: true to go on with both"
        )
        with pytest.raises(UserError, match=message):
            distill(tmp_path, **given)
        assert len(rows(tmp_path / "run/answers.jsonl")) == len(server.requests) == 4
        with pytest.raises(UserError, match="answers of small-1 and of small-2; set any_version: true"):
            distill(tmp_path, **given)
        given["teachers"][0]["any_version"] = True
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 6
    assert ledger(tmp_path)["teachers"][0]["versions"] == {"small-1": 3, "small-2": 3}


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_no_answer(tmp_path):
    """The answers in flight find room in the reserve."""
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(40)])
    with disks.small_disk(tmp_path / "disk", 9 << 20) as disk:
        long = "so it goes on " * 25_000  # 350 kB
        with openai_server.endpoint(lambda body, n: long + right(body)) as server:
            given = settings(tmp_path, server.url, teacher_concurrency=4, verify={"near": 0}, output=str(disk / "run"))
            with pytest.raises(UserError, match="No space left on device"):
                distill(tmp_path, **given)
            paid = server.paid
            assert 2 <= paid < 40
            assert len(rows(disk / "run/answers.jsonl")) == paid
            disks.grow(disk)
            assert distill(tmp_path, **given) == 0
            assert server.paid == len(rows(disk / "run/answers.jsonl")) == 40


def test_a_second_run_in_the_same_place_is_kept_out(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(1)])
    inside = threading.Event()

    def reply(body, number):
        inside.set()
        with pytest.raises(UserError, match="another fastft distill is at work there"):
            distill(tmp_path, **settings(tmp_path, server.url))
        return right(body)

    with openai_server.endpoint(reply) as server:
        assert distill(tmp_path, **settings(tmp_path, server.url)) == 0
    assert inside.is_set() and len(kept(tmp_path)) == 1


def faulty():
    """The endpoint that the engines of others were tried against: waits, errors, a prompt it never takes, an odd body."""
    malformed = iter([b'{"choices": "none"}'])

    def reply(body: dict, number: int):
        said = body["messages"][-1]["content"]
        if number % 9 == 8:
            return Failure(429, retry_after="0.1")
        if number % 31 == 30:
            return Failure(500)
        if "What is 50 " in said:
            return Failure(400, "not this one")
        if "What is 52 " in said:
            return completion("", body)
        time.sleep(0.01)
        return next(malformed, right(body)) if "What is 51 " in said else right(body)

    return reply


def killed_runs(tmp_path, kills: int, total: int = 80) -> tuple[int, int]:
    """Run with so many SIGKILLs, each after some more answers. Returns (answers sent, requests in flight at the kills)."""
    write_lines(
        tmp_path / "queries.jsonl", [query(n) for n in range(total)] + [{**query(n), "id": f"r{n}"} for n in range(8)]
    )
    with openai_server.endpoint(faulty()) as server:
        given = settings(
            tmp_path, server.url, teacher_concurrency=8, teacher_retries=20, verify={"near": 0, "repeats": "share"}
        )
        for kill in range(1, kills + 1):
            process = start(tmp_path, **given)
            while server.paid < kill * total // (kills + 2) and process.poll() is None:
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert distill(tmp_path, **given) == 0
        return server.paid, 8 * kills


@pytest.mark.slow
def test_kills_lose_nothing_and_pay_nothing_twice_but_what_was_in_flight(tmp_path):
    (tmp_path / "whole").mkdir()
    once, _ = killed_runs(tmp_path / "whole", 0)
    paid, in_flight = killed_runs(tmp_path, 3)
    assert [row["messages"] for row in kept(tmp_path)] == [row["messages"] for row in kept(tmp_path / "whole")]
    assert len(kept(tmp_path)) == 86  # 88 without the prompt that is never taken and the empty answer
    assert rejected(tmp_path).keys() == {("q50", "first"), ("q52", "first")}
    assert once <= paid <= once + in_flight
    answers = rows(tmp_path / "run/answers.jsonl")
    assert len({row["key"] for row in answers}) == len(answers) == 79


@pytest.mark.slow
def test_a_run_that_is_started_again_obeys_the_wait_of_the_one_before(tmp_path):
    """What an endpoint asked for is kept over starts, and nothing else: its answers are in answers.jsonl."""
    write_lines(tmp_path / "queries.jsonl", [query(1)])
    with openai_server.endpoint(lambda body, n: right(body) if n else Failure(429, retry_after="0.3")) as server:
        assert distill(tmp_path, **settings(tmp_path, server.url)) == 0
    path = tmp_path / "run/endpoints/first-1.jsonl"
    [pause] = rows(path)
    assert list(pause) == ["pause"] and pause["pause"]["endpoint"] == f"{server.url}#small"
    path.write_text(json.dumps({"pause": {**pause["pause"], "until": time.time() + 1000}}) + "\n")
    teacher = TeacherConfig("first", server.url, "small")
    client = _client(teacher, 0, Purse(None, Money()), Answers(tmp_path / "run/answers.jsonl"))
    assert client.connections[0].pace.wait_s() > 200


@pytest.mark.slow
def test_a_line_that_a_kill_has_cut_is_asked_again(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(3)])
    with openai_server.endpoint(right) as server:
        given = settings(tmp_path, server.url, teacher_concurrency=1, verify={"near": 0})
        assert distill(tmp_path, **given) == 0
        path = tmp_path / "run/answers.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 4
        assert [json.loads(line)["text"] for line in path.read_bytes().splitlines()] == [
            json.loads(line)["text"] for line in whole.splitlines()
        ]


@pytest.mark.slow
def test_ctrl_c_waits_for_the_answers_in_flight(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(40)])
    asked, go = threading.Semaphore(0), threading.Event()

    def reply(body, number):
        asked.release()
        go.wait(30)
        return right(body)

    with openai_server.endpoint(reply) as server:
        process = start(tmp_path, **settings(tmp_path, server.url, teacher_concurrency=3))
        for _ in range(3):
            assert asked.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        while "waiting for the answers in flight" not in (tmp_path / "output.txt").read_text():
            time.sleep(0.02)
        go.set()
        assert process.wait(30) == 130
        assert server.paid == len(rows(tmp_path / "run/answers.jsonl")) == 3


def test_ctrl_c_sends_nothing_that_waits_and_keeps_what_is_on_the_way_beside_a_batch(tmp_path):
    """Three wait for their turn of two a minute, and a second teacher's batch is left where it is."""
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(8)])
    store = BatchStore(polls=10**9)

    def reply(body, number):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return right(body)

    with openai_server.endpoint(reply, batches=store) as server:
        given = settings(tmp_path, server.url, teacher_rpm=2, teacher_concurrency=4)
        given["teachers"].append({"name": "second", "url": server.url, "model": "big", "mode": "batch"})
        with pytest.raises(KeyboardInterrupt):
            distill(tmp_path, **given)
        assert server.paid == len(server.requests) == len(rows(tmp_path / "run/answers.jsonl")) == 1


@pytest.mark.slow
def test_another_model_under_the_name_of_a_teacher_is_asked_and_money_knows_what_was_before(tmp_path):
    """The first answers stay, and count against the money of the run; so do those of a teacher that is no longer named."""
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(6)])
    with openai_server.endpoint(right) as server:
        given = settings(tmp_path, server.url, teacher_usd_per_million=[1e5, 1e5], verify={"near": 0}, max_usd=1000)
        assert distill(tmp_path, **given) == 0
        cost = ledger(tmp_path)["usd"]
        for name, model in (("first", "larger"), ("other", "largest")):
            given["teachers"][0] |= {"name": name, "model": model}
            assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 18 and ledger(tmp_path)["usd"] == pytest.approx(3 * cost)
        given["teachers"][0] |= {"model": "fourth", "max_tokens": 1}
        with pytest.raises(UserError, match=r"6 answers are missing .*max_usd of"):
            distill(tmp_path, **{**given, "max_usd": 3 * cost})
        assert len(server.requests) == 18


@pytest.mark.parametrize(
    "said, thoughts, text",
    [
        ("<think>\nTwo.\n</think>\n\nThe answer is 2.", "Two.", "The answer is 2."),
        ("Two, I think.\n</think>\nThe answer is 2.", "Two, I think.", "The answer is 2."),
        ("<think>\nTwo, or", "Two, or", ""),
        ("Write <think> and </think>\naround it.", "", "Write <think> and </think>\naround it."),
        ("The tag </think> ends them.", "", "The tag </think> ends them."),
    ],
)
def test_thoughts_in_a_text_are_kept_apart(said, thoughts, text):
    assert without_thoughts(said) == (thoughts, text)


@pytest.mark.slow
def test_a_stage_of_a_teacher_that_is_no_longer_asked_is_gone(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(4)])
    with openai_server.endpoint(right) as server:
        given = settings(tmp_path, server.url, verify={"near": 0}, student={"held_out": 0.5})
        given["teachers"].append({"name": "second", "url": server.url, "model": "big"})
        assert distill(tmp_path, **given) == 0
        given["teachers"].pop()
        assert distill(tmp_path, **{**given, "student": {}}) == 0
    assert [path.parent.name for path in (tmp_path / "run").glob("*/conversations.jsonl")] == ["stage1"]
