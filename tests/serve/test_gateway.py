"""A gateway in a process of its own before scripted workers, over real sockets: choice, failover, limits, keys, record."""

import concurrent.futures
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import gateways
from helpers.serving import ENVIRONMENT, read_stream, wait_until

QUICK = ["--comment_s", "0.4", "--slow_client_s", "2", "--silence_s", "4", "--check_s", "0.3"]


@pytest.fixture(scope="module")
def a():
    with gateways.scripted("m") as worker:
        yield worker


@pytest.fixture(scope="module")
def b():
    with gateways.scripted("m") as worker:
        yield worker


@pytest.fixture(scope="module")
def other():
    with gateways.scripted("org/other") as worker:
        yield worker


@pytest.fixture(scope="module")
def running(a, b, other, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gateway")
    config = {
        "workers": [{"url": each.entry} for each in (a, b, other)],
        "virtual": [{"name": "best", "policy": "fixed", "model": "org/other"}],
        "record": str(directory / "record"),
    }
    with gateways.gateway(*QUICK, config=config, directory=directory) as process:
        process.record = directory / "record"
        yield process


@pytest.fixture
def served(running, a, b, other):
    """The gateway, idle, before workers that do as they should."""
    for worker in (a, b, other):
        worker.do()
    wait_until(lambda: running.get("/health").json == {"status": "ok", "workers": 3, "in_flight": 0}, "all is well")
    # An answer from each ends a row of failures: with those of the next test, it would be left alone for longer and longer.
    asked = [len(worker.seen["bodies"]) for worker in (a, b)]
    wait_until(lambda: running.chat("").status == 200 and _were_asked((a, b), asked), "both have answered")
    return running


def _were_asked(workers, before) -> bool:
    return all(len(worker.seen["bodies"]) > n for worker, n in zip(workers, before))


def in_parallel(calls) -> list:
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def opened(served, **more):
    """A streamed request, and its response with nothing read."""
    connection = served.connect()
    body = json.dumps(served.ask("hello", stream=True, **more))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


WHOLE = "m0 m1 m2 m3 "


# Answers -------------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_through_unchanged_streamed_or_whole(served):
    whole = served.chat("hello")
    assert whole.status == 200 and whole.json["choices"][0]["message"]["content"] == WHOLE
    assert whole.headers["x-fastft-model"] == whole.headers["x-fastft-asked"] == whole.json["model"] == "m"
    stream = served.stream("hello")
    assert stream.text() == WHOLE and stream.done and stream.finish_reasons() == ["stop"]


def test_the_request_reaches_the_worker_byte_for_byte_and_without_the_clients_headers(served, a, b):
    body = served.ask("hello", top_k=3, tools=[], unknown={"deep": [1, 2.50]})
    served.post("/v1/chat/completions", body, Authorization="Bearer mine", Cookie="c=1")
    got = [seen for worker in (a, b) for seen in zip(worker.seen["bodies"], worker.seen["headers"]) if seen[0] == body]
    assert len(got) == 1
    assert "authorization" not in got[0][1] and "cookie" not in got[0][1]


def test_usage_comes_only_if_asked_and_a_chunk_without_choices_is_no_trouble(served):
    asked = served.stream("hello", stream_options={"include_usage": True})
    assert asked.events[-1]["choices"] == [] and asked.events[-1]["usage"]["completion_tokens"] == 4
    assert asked.finish_reasons() == ["stop"] and asked.done
    assert all("usage" not in event for event in served.stream("hello").events)


def test_a_stream_that_is_cut_at_every_byte_arrives_whole(served, a, b):
    """No event is split where the worker's network has split it."""
    text = "A family 👩\u200d👩\u200d👧 and 日本語, ¿Dónde? 🎉"
    for worker in (a, b):
        worker.do(words=text)
    connection, response = opened(served)
    stream = read_stream(response)
    connection.close()
    assert stream.text() == text and stream.done


def test_a_virtual_model_is_answered_by_the_one_that_its_policy_chose(served, other):
    before = len(other.seen["bodies"])
    reply = served.post("/v1/chat/completions", served.ask("hello") | {"model": "best"})
    assert reply.json["model"] == reply.headers["x-fastft-model"] == "org/other"
    assert reply.headers["x-fastft-asked"] == "best"
    assert other.seen["bodies"][before]["model"] == "org/other"
    event = gateways.event_of(served.record, reply.headers["x-fastft-event"])
    assert (event["asked"], event["policy"], event["chosen"], event["model"]) == (
        "best",
        "fixed",
        "org/other",
        "org/other",
    )
    assert event["probabilities"] == {"m": 0.0, "org/other": 1.0}


def test_models_are_listed_and_looked_up_by_names_with_slashes(served):
    assert [each["id"] for each in served.get("/v1/models").json["data"]] == ["best", "m", "org/other"]
    assert served.get("/v1/models/org/other").json["id"] == "org/other"
    assert served.get("/v1/models/nobody").status == 404


def test_an_unknown_model_is_404_with_the_names_that_are_served(served):
    reply = served.post("/v1/chat/completions", served.ask("x") | {"model": "gpt-9"})
    assert reply.status == 404 and reply.error["code"] == "model_not_found"
    assert all(name in reply.error["message"] for name in ("gpt-9", "best", "m", "org/other"))


def test_requests_are_spread_over_equal_workers(served, a, b):
    before = len(a.seen["bodies"]), len(b.seen["bodies"])
    for worker in (a, b):
        worker.do(delay_s=0.3, chunks=1)
    in_parallel([lambda: served.chat("hello")] * 8)
    assert (len(a.seen["bodies"]) - before[0], len(b.seen["bodies"]) - before[1]) == (4, 4)


def test_ties_are_shuffled(served, a, b):
    before = len(a.seen["bodies"])
    for _ in range(24):
        served.chat("hello")
    assert 1 <= len(a.seen["bodies"]) - before <= 23


# Workers that fail ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [{"status": 500}, {"status": 503}, {"status": 429}, {"die_after": 0}, {"first_s": 60}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_byte_another_worker_answers(served, a, b, script, stream):
    a.do(**script)
    for _ in range(30):  # until chance asks the one that fails first
        connection, response = opened(served) if stream else (None, served.chat("hello"))
        if stream:
            answer, reply_id = read_stream(response), response.getheader("x-fastft-event")
            connection.close()
            assert answer.text() == WHOLE and answer.done and answer.finish_reasons() == ["stop"]
        else:
            assert response.status == 200 and response.json["choices"][0]["message"]["content"] == WHOLE
            reply_id = response.headers["x-fastft-event"]
        event = gateways.event_of(served.record, reply_id)
        assert event["outcome"] == "answered" and event["answers"][0]["content"] == WHOLE
        if event["failover"]:
            assert [each["worker"] for each in event["tries"]] == [a.url, b.url]
            return
    raise AssertionError("the worker that fails was never asked")


def test_comment_lines_are_no_first_byte(served, a, b):
    """A stream that has got comments only is still answered by another worker."""
    a.do(comments=3, die_after=0)
    for _ in range(12):
        connection, response = opened(served)
        stream = read_stream(response)
        connection.close()
        assert stream.text() == WHOLE and stream.done and not any("error" in event for event in stream.events)
        if "waiting" in stream.comments:
            return
    raise AssertionError("the worker with the comments was never asked")


def test_a_stream_that_waits_is_kept_alive_with_comments(served, a, b):
    for worker in (a, b):
        worker.do(first_s=1.5)
    connection, response = opened(served)
    stream = read_stream(response)
    connection.close()
    assert stream.comments and set(stream.comments) == {"waiting"} and stream.text() == WHOLE


@pytest.mark.parametrize("die_after", [1, 3, 4])
def test_after_the_first_byte_a_stream_ends_with_an_error_event(served, a, b, die_after):
    """After 4 chunks all of the text is there, but no finish_reason."""
    for worker in (a, b):
        worker.do(die_after=die_after)
    connection, response = opened(served)
    stream = read_stream(response)
    connection.close()
    assert stream.text() == "".join(f"m{i} " for i in range(die_after))
    assert stream.events[-1]["error"]["code"] == "worker_lost" and stream.done and not stream.finish_reasons()
    event = gateways.event_of(served.record, response.getheader("x-fastft-event"))
    assert event["outcome"] == "died" and event["answers"][0]["content"] == stream.text()
    assert event["answers"][0]["finish_reason"] is None and event["model"] == "m"


def test_an_error_event_of_the_worker_is_passed_on_and_recorded(served, a, b):
    for worker in (a, b):
        worker.do(error_event=True, done=False)
    connection, response = opened(served)
    stream = read_stream(response)
    connection.close()
    assert stream.events[-1] == {"error": {"message": "out of memory"}} and stream.done
    assert gateways.event_of(served.record, response.getheader("x-fastft-event"))["outcome"] == "error"


def test_an_engine_that_sends_no_done_gets_one(served, a, b):
    """As transformers serve does."""
    for worker in (a, b):
        worker.do(done=False)
    connection, response = opened(served)
    stream = read_stream(response)
    connection.close()
    assert stream.done and stream.text() == WHOLE
    assert gateways.event_of(served.record, response.getheader("x-fastft-event"))["outcome"] == "answered"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_4xx_is_the_clients_and_no_failure_of_the_worker(served, a, b, status):
    for worker in (a, b):
        worker.do(status=status)
    for _ in range(8):
        reply = served.chat("hello")
        assert reply.status == status and reply.error["message"] == f"m says {status}"
    assert served.get("/health").json["workers"] == 3
    event = gateways.event_of(served.record, reply.headers["x-fastft-event"])
    assert event["outcome"] == "refused" and len(event["tries"]) == 1 and event["model"] is None


def test_a_queue_that_is_full_everywhere_is_told_with_its_retry_after(served, a, b):
    for worker in (a, b):
        worker.do(status=429, retry_after=7)
    reply = served.chat("hello")
    assert reply.status == 429 and reply.headers["retry-after"] == "7"
    assert served.get("/health").json["workers"] == 3


def test_a_worker_that_goes_on_failing_is_left_alone_and_comes_back(served, other):
    other.do(status=500)
    ask = served.ask("hello") | {"model": "org/other"}
    for _ in range(3):
        assert served.post("/v1/chat/completions", ask).status == 500
    asked = len(other.seen["bodies"])
    reply = served.post("/v1/chat/completions", ask)
    assert reply.status == 503 and reply.error["code"] == "no_worker" and reply.headers["retry-after"]
    assert len(other.seen["bodies"]) == asked
    other.do()
    wait_until(lambda: served.post("/v1/chat/completions", ask).status == 200, "the worker is asked again")


def test_a_worker_that_fails_its_health_check_is_passed_over(served, other):
    other.do(health=503)
    wait_until(lambda: served.get("/health").json["workers"] == 2, "the check has failed")
    assert served.post("/v1/chat/completions", served.ask("x") | {"model": "org/other"}).status == 503
    other.do()
    wait_until(lambda: served.get("/health").json["workers"] == 3, "the check has passed")


def test_a_kept_connection_that_the_worker_has_closed_is_no_failure(served, other):
    """The request goes over a fresh connection, once; nobody sees it."""
    other.do(close_kept=True)
    ask = served.ask("hello") | {"model": "org/other"}
    for _ in range(12):
        reply = served.post("/v1/chat/completions", ask)
        assert reply.status == 200
    event = gateways.event_of(served.record, reply.headers["x-fastft-event"])
    assert [each["outcome"] for each in event["tries"]] == ["answered"]


# Clients -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_ends_its_request_at_the_worker(served, a, b, stream, begun):
    """The record says so, too."""
    for worker in (a, b):
        worker.do(chunks=500, delay_s=0.05, first_s=0 if begun else 30)
    left = a.seen["left"] + b.seen["left"]
    connection = served.open(served.ask(f"leave {stream} {begun}", stream=stream))
    if begun and stream:
        assert b"m0" in connection.recv(4096) + connection.recv(4096)
    wait_until(lambda: a.seen["running"] + b.seen["running"] == 1, "the worker has the request")
    connection.close()
    wait_until(lambda: a.seen["running"] + b.seen["running"] == 0, "the worker is free")
    assert a.seen["left"] + b.seen["left"] == left + 1
    wait_until(lambda: served.get("/health").json["in_flight"] == 0, "the gateway is free")
    question = f"leave {stream} {begun}"
    found = lambda: [e for e in gateways.events(served.record) if e["messages"][0]["content"] == question]  # noqa: E731
    wait_until(found, "the event is written")
    assert found()[0]["outcome"] == "client_left"


def test_two_hundred_clients_that_leave_leave_nothing_behind(served, a, b):
    for worker in (a, b):
        worker.do(chunks=500, delay_s=0.05)

    def mine():
        return [e for e in gateways.events(served.record) if e["messages"][0]["content"] == "two hundred"]

    def leave():
        connection = served.open(served.ask("two hundred", stream=True))
        connection.recv(100)
        connection.close()

    for _ in range(4):
        in_parallel([leave] * 50)
    wait_until(lambda: a.seen["running"] + b.seen["running"] == 0, "the workers are free")
    wait_until(lambda: served.get("/health").json["in_flight"] == 0, "the gateway is free")
    wait_until(lambda: len(mine()) == 200, "all of them are recorded")
    assert {each["outcome"] for each in mine()} == {"client_left"}


def test_a_client_that_does_not_read_is_dropped_and_holds_nobody_up(served, a, b):
    for worker in (a, b):
        worker.do(chunks=200_000)
    slow = served.open(served.ask("slow", stream=True), receive_buffer=4096)
    wait_until(lambda: a.seen["running"] + b.seen["running"] == 1, "the worker has the request")
    for worker in (a, b):
        worker.do()
    assert served.chat("hello").status == 200
    wait_until(lambda: served.get("/health").json["in_flight"] == 0, "the slow client is dropped")
    slow.close()
    found = lambda: [e for e in gateways.events(served.record) if e["outcome"] == "slow_client"]  # noqa: E731
    wait_until(found, "it is recorded")


def test_background_calls_are_no_turns_of_a_conversation(served):
    """What Open WebUI asks for by itself, and what says so in a header."""
    title = served.chat("### Task:\nGenerate a concise, 3-5 word title")
    marked = served.post("/v1/chat/completions", served.ask("tags"), **{"x-fastft-background": "true"})
    for reply in (title, marked):
        event = gateways.event_of(served.record, reply.headers["x-fastft-event"])
        assert event["conversation"] is None and event["conversation_from"] == "background"


def test_a_conversation_keeps_its_id_over_its_turns(served):
    ids = []
    messages = [{"role": "system", "content": "be kind"}]
    for turn in range(1, 4):
        messages.append({"role": "user", "content": f"question {turn}"})
        reply = served.post("/v1/chat/completions", {"model": "m", "messages": messages})
        messages.append(reply.json["choices"][0]["message"])
        event = gateways.event_of(served.record, reply.headers["x-fastft-event"])
        assert event["turn"] == turn and event["conversation_from"] == "messages"
        ids.append(event["conversation"])
    assert len(set(ids)) == 1
    given = served.post("/v1/chat/completions", served.ask("x"), **{"x-fastft-conversation": "mine"})
    assert gateways.event_of(served.record, given.headers["x-fastft-event"])["conversation"] == "mine"


# Bad input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, code",
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "m", "messages": "\xff"}', "invalid_json"),
        (b'{"model": "m", "temperature": NaN}', "invalid_json"),
        (b'{"model": 3}', "invalid_value"),
        (b"{}", "invalid_value"),
        (b'{"model": "m", "messages": ' + b"[" * 300 + b"]" * 300 + b"}", "invalid_json"),
    ],
)
def test_a_body_that_cannot_be_read_is_400(served, body, code):
    reply = served.post("/v1/chat/completions", body)
    assert reply.status == 400 and reply.error["code"] == code


def test_a_body_that_is_too_large_is_413_whether_or_not_it_says_so(served):
    connection = served.connect()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(100 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    connection = served.connect()
    pieces = (b"x" * (1 << 20) for _ in range(17))
    connection.request("POST", "/v1/chat/completions", pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/embeddings", "/web/../setup.cfg", "/web/vendor.json", "/v1/chat/completions"]
)
def test_what_does_not_exist_is_404_in_openais_shape(served, path):
    reply = served.get(path)
    assert reply.status == 404 and reply.error["code"] == "not_found"


def test_another_sites_page_is_refused_and_its_own_is_not(served):
    own = f"http://{served.address[0]}:{served.address[1]}"
    options = served.request("OPTIONS", "/v1/chat/completions", headers={"Origin": own})
    assert options.status == 204 and options.headers["access-control-allow-origin"] == own
    assert "access-control-allow-credentials" not in options.headers
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        refused = served.request("OPTIONS", "/v1/chat/completions", headers={"Origin": origin})
        assert refused.status == 403 and "access-control-allow-origin" not in refused.headers
        assert served.post("/v1/chat/completions", served.ask("x"), Origin=origin).status == 403
    rebound = {"Origin": "http://evil.example", "Host": "evil.example"}
    assert served.post("/v1/chat/completions", served.ask("x"), **rebound).status == 403


def test_metrics_count_what_happened(served):
    name = 'fastft_gateway_requests_total{model="m",outcome="answered"}'
    before = served.metric(name)
    served.chat("hello")
    assert served.metric(name) == before + 1 and served.metric("fastft_gateway_workers") == 3


# Deaths --------------------------------------------------------------------------------------------------------------------


def test_kill_9_of_a_worker_while_50_streams_run(tmp_path):
    """Each ends with an error event, or is answered elsewhere before its first byte; none hangs; the record is equal."""
    with (
        gateways.scripted("m") as a,
        gateways.scripted("m") as b,
        gateways.gateway("--model", a.entry, b.entry, "--record", str(tmp_path / "r"), *QUICK) as served,
    ):
        for worker in (a, b):
            worker.do(chunks=40, delay_s=0.05)

        def stream(number):
            connection, response = opened(served)
            try:
                return read_stream(response), response.getheader("x-fastft-event")
            finally:
                connection.close()

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            streams = [pool.submit(stream, number) for number in range(50)]
            wait_until(lambda: a.seen["running"] >= 10, "streams run")
            a.kill()
            ended = [each.result(timeout=60) for each in streams]
        text = "".join(f"m{i} " for i in range(40))
        lost = [each for each, _ in ended if not each.finish_reasons()]
        assert lost, "the worker that was killed had streams"
        for each, reply_id in ended:
            assert each.done and each.status == 200
            event = gateways.event_of(tmp_path / "r", reply_id)
            answers = event["answers"]
            assert (answers[0]["content"] if answers else "") == each.text()
            if each in lost:
                assert each.events[-1]["error"]["code"] == "worker_lost" and event["outcome"] == "died"
            else:
                assert each.text() == text and event["outcome"] == "answered"
        later = in_parallel([lambda: served.chat("hello")] * 10)
        assert [each.status for each in later] == [200] * 10


def test_no_request_is_lost_while_workers_die_and_come_back():
    """Whole answers: a death before the first byte is never the client's."""
    with (
        gateways.scripted("m") as steady,
        gateways.scripted("m") as first,
        gateways.gateway("--model", steady.entry, first.entry, *QUICK) as served,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        port = first.address[1]
        replies = [pool.submit(served.chat, "hello") for _ in range(200)]
        first.kill()
        with gateways.scripted("m", port):
            replies += [pool.submit(served.chat, "hello") for _ in range(200)]
            assert [each.result().status for each in replies] == [200] * 400


def test_sigterm_lets_answers_finish_and_takes_nothing_new(tmp_path):
    with (
        gateways.scripted("m") as a,
        gateways.gateway("--model", a.entry, "--record", str(tmp_path / "r"), *QUICK) as served,
    ):
        a.do(chunks=20, delay_s=0.1)
        connection, response = opened(served)
        response.readline()
        waiting = socket.create_connection(served.address)  # a connection from before
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in _health_over(waiting), "it drains")
        stream = read_stream(response)
        connection.close()
        waiting.close()
        assert stream.done and stream.finish_reasons() == ["stop"]
        assert served.process.wait(30) == 0
        assert [each["outcome"] for each in gateways.events(tmp_path / "r")] == ["answered"]


def _health_over(connection: socket.socket) -> str:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection.recv(4096).decode()


def test_after_the_grace_time_answers_end_with_an_error_event(tmp_path):
    flags = ["--record", str(tmp_path / "r"), "--grace_s", "0.5", *QUICK]
    with gateways.scripted("m") as a, gateways.gateway("--model", a.entry, *flags) as served:
        a.do(chunks=5000, delay_s=0.1)
        connection, response = opened(served)
        response.readline()
        served.process.send_signal(signal.SIGTERM)
        stream = read_stream(response)
        connection.close()
        assert stream.events[-1]["error"]["code"] == "shutting_down" and stream.done
        assert served.process.wait(30) == 0
        assert [each["outcome"] for each in gateways.events(tmp_path / "r")] == ["shut_down"]


# Keys ----------------------------------------------------------------------------------------------------------------------

KEY, ADMIN, UPSTREAM = "sk-alice-0123456789", "sk-admin-0123456789", "sk-upstream-0123456789"


@pytest.fixture(scope="module")
def locked(a, tmp_path_factory):
    directory = tmp_path_factory.mktemp("locked")
    digest = lambda key: hashlib.sha256(key.encode()).hexdigest()  # noqa: E731
    config = {
        "workers": [{"url": a.entry, "key_env": "UPSTREAM_KEY"}],
        "keys": [
            {"name": "alice", "sha256": digest(KEY)},
            {"name": "bob", "sha256": digest("sk-bob"), "per_minute": 2},
        ],
        "admin_key_env": "ADMIN_KEY",
        "record": str(directory / "record"),
        "record_texts": False,
        "origins": ["https://chat.example.org"],
    }
    variables = {"UPSTREAM_KEY": UPSTREAM, "ADMIN_KEY": ADMIN}
    with gateways.gateway(*QUICK, config=config, directory=directory, **variables) as process:
        process.record = directory / "record"
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_asked_for_and_the_worker_gets_its_own(locked, a):
    a.do()
    assert locked.chat("x").status == 401
    assert locked.post("/v1/chat/completions", locked.ask("x"), **bearer("sk-wrong")).error["code"] == "invalid_api_key"
    assert locked.get("/v1/models").status == locked.get("/metrics").status == 401
    assert locked.get("/health").status == 200
    assert locked.post("/v1/chat/completions", locked.ask("x"), **bearer(KEY)).status == 200
    assert a.seen["headers"][-1]["authorization"] == f"bearer {UPSTREAM}"
    options = locked.request("OPTIONS", "/v1/models", headers={"Origin": "https://chat.example.org"})
    assert options.status == 204 and options.headers["access-control-allow-origin"] == "https://chat.example.org"


def test_a_key_has_its_rate_limit(locked):
    replies = [locked.post("/v1/chat/completions", locked.ask("x"), **bearer("sk-bob")) for _ in range(4)]
    assert [each.status for each in replies] == [200, 200, 429, 429]
    assert 1 <= int(replies[2].headers["retry-after"]) <= 30 and replies[2].error["type"] == "rate_limit_error"
    assert locked.post("/v1/chat/completions", locked.ask("x"), **bearer(KEY)).status == 200


def test_without_texts_the_record_holds_hashes_only(locked):
    question = "a question that nobody may read"
    reply = locked.post("/v1/chat/completions", locked.ask(question), **bearer(KEY))
    event = gateways.event_of(locked.record, reply.headers["x-fastft-event"])
    assert event["key"] == "alice" and event["completion_tokens"] == 4
    assert event["answers"][0]["content_sha256"] == hashlib.sha256(WHOLE.encode()).hexdigest()
    written = b"".join(each.read_bytes() for each in locked.record.iterdir())
    assert question.encode() not in written and WHOLE.encode() not in written


def test_no_secret_is_said_or_recorded(locked):
    written = b"".join(each.read_bytes() for each in locked.record.iterdir()) + "".join(locked.said).encode()
    assert not [key for key in (KEY, ADMIN, UPSTREAM, "sk-bob") if key.encode() in written]


def test_workers_are_added_and_removed_with_the_admin_key_only(locked, other):
    other.do()
    entry = {"url": other.entry}
    assert locked.post("/admin/workers", entry).status == 401
    assert locked.post("/admin/workers", entry, **bearer(KEY)).status == 401
    added = locked.post("/admin/workers", entry, **bearer(ADMIN))
    assert added.status == 200 and added.json["name"] == "org/other"
    ask = locked.ask("x") | {"model": "org/other"}
    assert locked.post("/v1/chat/completions", ask, **bearer(KEY)).status == 200
    assert "authorization" not in other.seen["headers"][-1]
    assert locked.request("DELETE", "/admin/workers", entry, bearer(ADMIN)).json == {"removed": [other.entry]}
    assert locked.post("/v1/chat/completions", ask, **bearer(KEY)).status == 404
    assert locked.request("DELETE", "/admin/workers", entry, bearer(ADMIN)).status == 404


def test_a_lease_that_is_not_renewed_runs_out(locked, other):
    other.do()
    entry = {"url": other.entry, "lease_s": 1}
    assert locked.post("/admin/workers", entry, **bearer(ADMIN)).status == 200
    assert locked.post("/admin/workers", entry, **bearer(ADMIN)).status == 200
    names = lambda: [each["id"] for each in locked.get("/v1/models", **bearer(KEY)).json["data"]]  # noqa: E731
    assert "org/other" in names()
    wait_until(lambda: "org/other" not in names(), "the lease has run out")


@pytest.mark.parametrize(
    "entry, code",
    [
        ({"url": "http://127.0.0.1:9/v1#x"}, "worker_unreachable"),
        ({"url": "file:///etc/passwd#x"}, "invalid_value"),
        ({"url": "OTHER#x"}, "worker_has_no_such_model"),
        ({"url": "OTHER"}, "invalid_value"),
        ({"url": "OTHER#org/other", "key_env": "HOME"}, "invalid_value"),
        ({"url": "OTHER#org/other", "lease_s": "long"}, "invalid_value"),
    ],
)
def test_a_worker_that_cannot_be_added_is_refused(locked, other, entry, code):
    entry = entry | {"url": entry["url"].replace("OTHER", other.url)}
    reply = locked.post("/admin/workers", entry, **bearer(ADMIN))
    assert reply.status == 400 and reply.error["code"] == code


def test_without_an_admin_key_nobody_is_the_admin(served, other):
    reply = served.post("/admin/workers", {"url": other.entry})
    assert reply.status == 403 and reply.error["code"] == "no_admin_key"


# The command ---------------------------------------------------------------------------------------------------------------


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastft", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**ENVIRONMENT, **environment})


@pytest.fixture
def directory(tmp_path):
    for name in ("one", "two/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "/nowhere"], "/nowhere: no such directory"),
        (["--model", "DIR"], "holds no model (there is no config.json); DIR/one is one"),
        (["--model", "DIR/one", "DIR/two/one"], "is called 'one', too; give one another name: NAME=DIR/two/one"),
        (["--model", "a=DIR/one", "http://127.0.0.1:9/v1#a"], "a directory is called 'a', too"),
        (["--model", "http://127.0.0.1:9/v1"], "must be URL#MODEL"),
        ([], "there is nothing to serve"),
        (["--model", "u=DIR/one", "--host", "0.0.0.0"], "others can reach this address; give a key"),
        (["--model", "u=DIR/one", "--api_key_env", "NO_SUCH"], "no such environment variable"),
        (["--model", "u=DIR/one", "--recrod", "r"], "unknown key 'recrod'; the nearest valid one is 'record'"),
        (["--model", "u=DIR/one", "--port", "BUSY"], "Address already in use; choose another --port"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_started(directory, flags, said):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        flags = [f.replace("DIR", str(directory)).replace("BUSY", str(busy.getsockname()[1])) for f in flags]
        done = serve(*flags)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and said.replace("DIR", str(directory)) in done.stderr


@pytest.mark.parametrize(
    "config, said",
    [
        ({"worker": []}, "unknown key 'worker'; the nearest valid one is 'workers'"),
        ({"workers": [{"url": "http://h/v1#a", "key": "sk-x"}]}, "unknown key 'workers.key'"),
        ({"workers": [{"url": "http://h/v1#a", "key_env": "NO_SUCH"}]}, "key_env NO_SUCH: there is no such"),
        ({"virtual": [{"name": "v", "policy": "fixed", "model": "b"}]}, "there is no model 'b'"),
        ({"virtual": [{"name": "v", "policy": "blend", "model": "a"}]}, "v: a blend needs models"),
        ({"keys": [{"name": "k", "sha256": "sk-plain"}]}, "must be 64 hexadecimal digits"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, config, said):
    (tmp_path / "serve.yaml").write_text(json.dumps({"workers": [{"url": "http://h/v1#a"}], **config}))
    done = serve("--config", str(tmp_path / "serve.yaml"))
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1
    assert said in re.sub(r"workers\.\d+\.", "workers.", done.stderr)
    assert "sk-plain" not in done.stderr


def test_many_messages_and_a_slow_request_do_no_harm(served):
    messages = [{"role": "user", "content": "x"}] * 10_000
    assert served.post("/v1/chat/completions", {"model": "m", "messages": messages}).status == 200
    slow = socket.create_connection(served.address)
    slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert served.chat("hello").status == 200
    slow.close()
    time.sleep(0.1)
    assert served.get("/health").json["in_flight"] == 0


def test_http_10_and_head_and_junk_do_no_harm(served):
    for junk in (
        b"GET /health HTTP/1.0\r\n\r\n",
        b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x00\xff\r\n\r\n",
    ):
        connection = socket.create_connection(served.address)
        connection.sendall(junk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        connection.close()
    assert served.chat("hello").status == 200


def test_a_connection_that_has_ended_is_forgotten(served):
    """Each cost 7 KB for half a minute: the timer that waits for its first request kept it."""

    def come_and_go(times: int) -> int:
        for _ in range(times):
            assert served.get("/v1/models").status == 200
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    before = come_and_go(300)
    assert come_and_go(1000) - before < 3000  # KB
