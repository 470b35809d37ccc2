"""Battles and votes over the gateway's API, what they become, and the moderation of what is asked."""

import concurrent.futures
import contextlib
import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator

import pytest
from helpers import gateways
from helpers.serving import read_stream, wait_until

from fastft.cli import main
from fastft.errors import UserError
from fastft.judge.judgment import read_judgments
from fastft.serve.arena.battles import identity_words, names_one
from fastft.serve.arena.leaderboard import largest_group, leaderboard
from fastft.serve.arena.votes import outcomes
from fastft.serve.gateway.events import FILE, EventLog, read_votes

NAMES = ("osprey-instruct", "kestrel-instruct")


@pytest.fixture(scope="module")
def workers():
    with gateways.scripted(NAMES[0]) as one, gateways.scripted(NAMES[1]) as other:
        yield one, other


@pytest.fixture(scope="module")
def running(workers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("arena")
    config = {"workers": [{"url": each.entry} for each in workers], "record": str(directory / "record")}
    with gateways.gateway("--check_s", "0.3", config=config, directory=directory) as process:
        process.record = directory / "record"
        yield process


@pytest.fixture
def served(running, workers):
    for number, worker in enumerate(workers):
        worker.do(words=f"answer {number}")
    return running


def begin(served, **request) -> str:
    reply = served.post("/arena/battles", request)
    assert reply.status == 200, reply.content
    return f"/arena/battles/{reply.json['id']}"


def opened(served, path: str, *questions: str):
    connection = served.connect()
    messages = [{"role": "user", "content": each} for each in questions]
    connection.request("POST", path, json.dumps({"messages": messages}), {"Content-Type": "application/json"})
    return connection.getresponse()


def answer(served, path: str, *questions: str):
    return read_stream(opened(served, path, *questions))


def fought(served, question: str = "q", **request) -> str:
    battle = begin(served, **request)
    for side in "ab":
        assert answer(served, f"{battle}/{side}", question).done
    return battle


def test_a_vote_says_who_was_who_and_is_on_the_disk_by_then(served):
    battle = fought(served)
    reply = served.post(f"{battle}/vote", {"winner": "b"})
    assert sorted(reply.json["models"].values()) == sorted(NAMES) and reply.json["counted"] is True
    [vote] = [each for each in read_votes(served.record) if each["battle"] in battle]
    assert vote["winner"] == "b" and vote["models"] == reply.json["models"]


def test_of_many_votes_at_once_one_is_written(served):
    battle = fought(served)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        winners = ["a", "b"] * 8
        replies = list(pool.map(lambda winner: served.post(f"{battle}/vote", {"winner": winner}), winners))
    assert {reply.status for reply in replies} == {200} and len({reply.json["winner"] for reply in replies}) == 1
    assert len([each for each in read_votes(served.record) if each["battle"] in battle]) == 1


def test_both_orders_are_drawn(served):
    seen = set()
    for _ in range(40):
        battle = fought(served)
        seen.add(served.post(f"{battle}/vote", {"winner": "tie"}).json["models"]["a"])
        if len(seen) == 2:
            return
    raise AssertionError(f"side a is always {seen}")


@pytest.mark.parametrize(
    "path, request_, status, code",
    [
        ("vote", {"winner": "a"}, 409, "battle_unfinished"),
        ("vote", {"winner": "both"}, 400, "invalid_value"),
        ("vote", {}, 400, "invalid_value"),
        ("c", {"messages": []}, 404, "not_found"),
    ],
)
def test_what_is_no_vote_is_refused(served, path, request_, status, code):
    reply = served.post(f"{begin(served)}/{path}", request_)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize(
    "request_, status, code",
    [
        ({"models": ["osprey-instruct"]}, 400, "invalid_value"),
        ({"models": [1, 2]}, 400, "invalid_value"),
        ({"models": ["osprey-instruct", "nobody"]}, 404, "model_not_found"),
    ],
)
def test_a_battle_of_what_is_not_there_is_refused(served, request_, status, code):
    reply = served.post("/arena/battles", request_)
    assert (reply.status, reply.error["code"]) == (status, code)


def test_a_battle_that_nobody_knows_is_404(served):
    assert served.post("/arena/battles/none/vote", {"winner": "a"}).error["code"] == "battle_unknown"
    assert served.request("DELETE", f"{begin(served)}/vote").error["code"] == "no_vote"


def test_two_that_were_asked_differently_are_no_battle(served):
    battle = begin(served)
    answer(served, f"{battle}/a", "one question")
    answer(served, f"{battle}/b", "another")
    assert served.post(f"{battle}/vote", {"winner": "a"}).error["code"] == "battle_unequal"
    answer(served, f"{battle}/b", "one question")
    assert served.post(f"{battle}/vote", {"winner": "a"}).status == 200
    assert answer_status(served, f"{battle}/a", "more") == "battle_over"


def answer_status(served, path: str, question: str) -> str:
    response = opened(served, path, question)
    return json.loads(response.read())["error"]["code"]


def test_a_side_whose_worker_died_has_not_answered(served, workers):
    for worker in workers:
        worker.do(die_after=1)
    battle = begin(served)
    broken = answer(served, f"{battle}/a", "q")
    assert broken.events[-1]["error"]["code"] == "worker_lost"
    assert served.post(f"{battle}/vote", {"winner": "b"}).error["code"] == "battle_unfinished"


@pytest.mark.parametrize(
    "script", [{}, {"status": 400}, {"status": 503}, {"error_event": True}, {"die_after": 1}, {"comments": 2}]
)
def test_nothing_that_a_client_receives_tells_the_model(served, workers, script):
    for worker in workers:
        worker.do(words="text", **script)
    battle = begin(served)
    for side in "ab":
        response = opened(served, f"{battle}/{side}", "q")
        said = str(response.getheaders()).lower() + response.read().decode().lower()
        assert not any(word in said for word in ("osprey", "kestrel", "usage", "scripted", "out of memory")), said


def test_a_vote_that_cannot_be_written_does_not_count_and_can_be_given_again(served):
    battle = fought(served)
    lock = sqlite3.connect(served.record / FILE)
    lock.execute("ALTER TABLE votes RENAME TO kept_votes")
    lock.commit()
    refused = served.post(f"{battle}/vote", {"winner": "a"})
    lock.execute("ALTER TABLE kept_votes RENAME TO votes")
    lock.commit()
    lock.close()
    assert (refused.status, refused.error["code"]) == (503, "vote_not_written")
    assert served.post(f"{battle}/vote", {"winner": "b"}).json["winner"] == "b"


def test_votes_become_judgments_and_outcomes(served, tmp_path, capsys):
    questions = {"Which is first?": 0, "Which is second?": 1}
    for question, best in questions.items():
        battle = fought(served, question, models=list(NAMES))
        served.post(f"{battle}/vote", {"winner": "tie"})  # named, so it does not count
        battle = fought(served, question)
        # Who is who is known after the vote only; the answers tell.
        texts = {side: answer(served, f"{battle}/{side}", question).text() for side in "ab"}
        winner = next(side for side in "ab" if texts[side] == f"answer {best}")
        served.post(f"{battle}/vote", {"winner": winner})
    export = ["record", "export", str(served.record), "-o"]
    assert main([*export, str(tmp_path / "b.jsonl"), "--as", "battles"]) == 0
    assert "the names were shown" in capsys.readouterr().out
    won = {j.winner for j in read_judgments(tmp_path / "b.jsonl")[-2:]}
    assert won == set(NAMES)
    assert main([*export, str(tmp_path / "o.jsonl"), "--as", "outcomes"]) == 0
    rows = {row["query"]: row for row in map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())}
    for question, best in questions.items():
        assert rows[question]["rewards"] == {NAMES[best]: 1.0, NAMES[1 - best]: 0.0} and rows[question]["tags"] == []
    assert main([*export, str(tmp_path / "v.jsonl"), "--as", "votes"]) == 0
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == len(list(read_votes(served.record)))
    board = served.get("/arena/leaderboard").json
    assert {each["model"] for each in board["models"]} == set(NAMES) and board["left_out"]["the names were shown"] >= 2


def test_a_virtual_model_fights_under_its_own_name_and_draws_for_each_battle(workers, tmp_path):
    for worker in workers:
        worker.do(words="text")
    config = {
        "workers": [{"url": each.entry} for each in workers],
        "virtual": [
            {"name": "mixed", "policy": "blend", "models": dict.fromkeys(NAMES, 1)},
            {"name": "alias", "model": NAMES[0]},
        ],
        "record": str(tmp_path / "record"),
    }
    with gateways.gateway(config=config, directory=tmp_path) as served:
        for _ in range(12):
            battle = begin(served, models=["mixed", NAMES[0]])
            assert answer(served, f"{battle}/a", "always the same").text() == "text"
        wait_until(lambda: len(gateways.events(tmp_path / "record")) == 12, "all is written")
        events = gateways.events(tmp_path / "record")
        assert {event["model"] for event in events} == set(NAMES), "each battle has its own draw"
        assert {(e["asked"], e["policy"], e["conversation_from"]) for e in events} == {("mixed", "blend", "battle")}
        assert {e["conversation"] for e in events} == {f"battle-{e['battle']['id']}-a" for e in events}
        drawn = fought(served)
        models = served.post(f"{drawn}/vote", {"winner": "tie"}).json["models"]
        assert "alias" not in models.values()


# Without sockets -----------------------------------------------------------------------------------------------------------


def vote(number: int, a: str, b: str, winner: str = "a", **more) -> dict:
    fields = {
        "battle": str(number), "key": None, "winner": winner, "models": {"a": a, "b": b}, "turns": {"a": ["x"], "b": ["y"]},
        "question": f"q{number}", "counted": True, "why_not": None,
    }  # fmt: skip
    return fields | more


def test_the_leaderboard_counts_the_last_word_of_each_battle():
    withdrawn = vote(1, "m", "n", "withdrawn", counted=False, why_not="taken back")
    board = leaderboard([vote(1, "m", "n"), vote(2, "n", "m", "both_bad"), vote(3, "m", "n"), withdrawn])
    assert (board["votes"], board["left_out"]) == (2, {"taken back": 1})
    [m, n] = board["models"]
    assert (m["model"], m["won"], m["lost"], m["tie"], m["both_bad"]) == ("m", 1, 0, 0, 1)
    assert (n["won"], n["lost"], n["both_bad"], n["rank"]) == (0, 1, 1, 1)
    pair = next(each for each in board["pairs"] if each["model"] == "n")
    assert (pair["lost"], pair["both_bad"]) == (1, 1)


def test_a_router_gets_one_row_a_question_of_those_that_were_asked_alone():
    events = [{"id": each, "messages": [{"role": "user", "content": f"text of {each}"}]} for each in ("x", "z")]
    longer = vote(3, "m", "n", turns={"a": ["z", "z2"], "b": ["y", "y2"]}, question="long")
    twice = [vote(1, "m", "n", question="q"), vote(2, "n", "m", "tie", question="q")]
    bad = vote(4, "m", "n", "both_bad", question="bad", turns={"a": ["z"], "b": ["y"]})
    assert list(outcomes([*twice, longer, bad], events)) == [
        {"id": "q", "query": "text of x", "tags": [], "rewards": {"m": 0.75, "n": 0.25}},
        {"id": "bad", "query": "text of z", "tags": [], "rewards": {"m": 0.0, "n": 0.0}},
    ]
    with pytest.raises(UserError, match="hashes only"):
        list(outcomes(twice, [{"id": "x", "messages_sha256": "0"}]))


def test_votes_are_reported_as_judgments_are(tmp_path, capsys):
    log = EventLog(tmp_path / "record")
    for number in range(6):
        log.add_vote(vote(number, "m", "n", ["a", "a", "b", "tie", "both_bad", "a"][number])).result(30)
    log.close()
    export = [
        "record",
        "export",
        str(tmp_path / "record"),
        "--as",
        "battles",
        "-o",
        str(tmp_path / "d" / "judgments.jsonl"),
    ]
    assert main(export) == 0 and main(["report", str(tmp_path / "d")]) == 0
    [pair] = json.loads((tmp_path / "d" / "results.json").read_text())["pairs"]
    assert (pair["total"]["wins"], pair["total"]["ties"], pair["total"]["losses"]) == (1, 2, 3)
    assert "both answers are bad" in (tmp_path / "d" / "results.md").read_text()


def test_ranks_differ_only_where_intervals_do():
    clear = [vote(i, "m", "n") for i in range(60)]
    assert [each["rank"] for each in leaderboard(clear)["models"]] == [1, 2]
    even = [vote(i, "m", "n", "ab"[i % 2]) for i in range(60)]
    assert [each["rank"] for each in leaderboard(even)["models"]] == [1, 1]


def test_models_that_never_met_the_others_are_not_rated_among_them():
    board = leaderboard([vote(1, "a", "b"), vote(2, "b", "c"), vote(3, "x", "y")])
    assert {each["model"]: each["rating"] is not None for each in board["models"]} == {
        "a": True, "b": True, "c": True, "x": False, "y": False,
    }  # fmt: skip
    assert largest_group([]) == set()


@pytest.mark.parametrize(
    "text, names, said",
    [
        ("I am SmolLM2!", ["smollm2-135m-instruct"], True),
        ("I'm ChatGPT, made by OpenAI.", ["mine"], True),
        ("This is runs/Falcon7", ["falcon7"], True),
        ("A model can instruct.", ["my-model-instruct"], False),
        ("Beyond the hills", ["yond"], False),
        ("one or two", ["m", "old"], False),
    ],
)
def test_when_an_answer_names_a_model(text, names, said):
    assert names_one(text, identity_words(names)) == said


# Moderation ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def moderation_endpoint() -> Iterator:
    """An endpoint that flags what holds "bad"; `asked` has the bodies and keys that it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.asked.append((body, self.headers["authorization"]))
            results = [
                {"flagged": "bad" in text, "categories": {"violence": "bad" in text, "x": False}}
                for text in body["input"]
            ]
            content = json.dumps({"results": results}).encode()
            self.send_response(server.status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status = [], 200
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_what_is_asked_is_moderated_first(workers, tmp_path, fail):
    for worker in workers:
        worker.do(words="fine")
    with moderation_endpoint() as endpoint:
        url = f"http://127.0.0.1:{endpoint.server_port}/v1/moderations"
        config = {
            "workers": [{"url": workers[0].entry}],
            "moderation": {"url": url, "model": "omni", "key_env": "MODERATION_KEY", "fail": fail},
            "record": str(tmp_path / "record"),
        }
        with gateways.gateway(config=config, directory=tmp_path, MODERATION_KEY="secret") as process:
            process.name, asked = NAMES[0], len(workers[0].seen["bodies"])
            assert process.chat("hello").status == 200
            assert process.chat("hello").status == 200
            assert endpoint.asked == [({"input": ["hello"], "model": "omni"}, "Bearer secret")], "each text once"
            refused = process.chat("a bad thing")
            assert (refused.status, refused.error["code"]) == (400, "content_flagged") and "violence" in refused.error[
                "message"
            ]
            assert len(workers[0].seen["bodies"]) == asked + 2, "the model has not seen it"
            endpoint.status = 500
            reply = process.chat("something new")
            assert reply.status == (200 if fail == "open" else 503)
            about = process.get("/about").json
            assert about["moderation"] is True
            wait_until(lambda: len(gateways.events(tmp_path / "record")) == 4, "all is written")
        events = gateways.events(tmp_path / "record")
        assert [event["outcome"] for event in events][:3] == ["answered", "answered", "refused"]
        assert events[2]["moderation"] == {"flagged": True, "categories": ["violence"]} and events[2]["tries"] == []
        assert events[3]["moderation"] == {"unreachable": True}


def test_a_moderation_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path), "--moderation.url", "openai"]) == 1
    (tmp_path / "config.json").write_text("{}")
    assert main(["serve", "--model", str(tmp_path), "--moderation.url", "openai"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: moderation.url openai: must be an http(s) address"
