"""Routers and experiments behind the real gateway: who answers, and what the headers, the record and the metrics say."""

import asyncio
import contextlib
import json
import stat
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import gateways, models, routers
from helpers.serving import wait_until

from fastft import cli
from fastft.compose.policy import FixedPolicy

SUM, POEM = "What is 4 plus 9? Add the numbers.", "Write a merry poem about the sea."
ARMS = {"control": {"model": "a", "share": 0.5}, "blend": {"model": "chai", "share": 0.5}}
SPRING = {"name": "spring", "policy": "ab", "arms": ARMS, "until": "2099-12-31"}
OVER = {"name": "over", "policy": "ab", "arms": ARMS, "until": "2026-01-31"}
CHAI = {"name": "chai", "policy": "blend", "models": {"a": 1, "b": 1}}


@pytest.fixture(scope="module")
def workers():
    with gateways.scripted("a") as a, gateways.scripted("b") as b:
        yield a, b


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    directory = routers.train(tmp_path_factory.mktemp("router") / "expert", sums="math", poems="b")
    return {"name": "expert", "policy": "route", "router": str(directory), "of": {"math": "a"}, "decide_on": "every"}


@contextlib.contextmanager
def served(workers, directory, *virtual):
    config = {
        "workers": [{"url": each.entry} for each in workers],
        "virtual": virtual,
        "record": str(directory / "record"),
    }
    with gateways.gateway(config=config, directory=directory) as process:
        yield process


@pytest.fixture(scope="module")
def everything(workers, expert, tmp_path_factory):
    """A gateway with all policies, and the directory in which its record is."""
    directory = tmp_path_factory.mktemp("everything")
    with served(workers, directory, expert, SPRING, OVER, CHAI) as process:
        yield SimpleNamespace(process=process, directory=directory)


def ask(process, model: str, *questions, headers: dict | None = None, **more):
    """Ask the last question; the ones before it have been answered somehow."""
    said = [{"role": role, "content": text} for q in questions for role, text in (("user", q), ("assistant", "Well."))]
    return process.post("/v1/chat/completions", {"model": model, "messages": said[:-1], **more}, **(headers or {}))


def events(directory, replies) -> list[dict]:
    """The events of replies, as soon as they are written."""
    wanted = [reply.headers["x-fastft-event"] for reply in replies]

    def found() -> dict[str, dict]:
        return {each["id"]: each for each in gateways.events(directory / "record")}

    wait_until(lambda: found().keys() >= {*wanted}, "the events are written")
    return list(map(found().__getitem__, wanted))


def event(directory, reply) -> dict:
    return events(directory, [reply])[0]


def test_a_router_sends_each_question_to_its_model_and_every_witness_agrees(everything):
    process, directory = everything.process, everything.directory
    parts = [{"type": "text", "text": POEM}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    for questions, model in (([SUM], "a"), ([POEM], "b"), ([SUM, POEM], "b"), ([parts], "b")):
        reply = ask(process, "expert", *questions)
        found = event(directory, reply)
        assert reply.json["model"] == reply.headers["x-fastft-model"] == reply.headers["x-fastft-chosen"] == model
        assert found["model"] == found["chosen"] == model and found["policy"] == "route"
        assert found["probabilities"] == {name: float(name == model) for name in "ab"}
        assert found["scores"].keys() == {"a", "b"} and found["scores"][model] == max(found["scores"].values())
        assert reply.headers["x-fastft-why"] == found["why"] and found["why"].startswith(
            f"{model} {found['scores'][model]:.2f}"
        )
        assert 0 < found["decision_s"] < found["total_s"]
    completion = process.post("/v1/completions", {"model": "expert", "prompt": POEM})
    assert event(directory, completion)["chosen"] == "b"
    wait_until(lambda: process.metric('fastft_gateway_decision_seconds_count{policy="route"}') == 5, "all are counted")


@pytest.mark.slow
def test_where_the_routed_model_is_gone_the_other_one_answers(workers, expert, tmp_path):
    with gateways.scripted("b") as b, served((workers[0], b), tmp_path, expert) as process:
        b.kill()
        reply = ask(process, "expert", POEM)
        found = event(tmp_path, reply)
        assert reply.json["model"] == found["model"] == "a" and found["chosen"] == "b" and found["failover"]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"of": {}},
            "was trained for math, b, and nothing here is called 'math'; of: {math: NAME} says which one it is",
        ),
        ({"router": "BROKEN"}, "router.safetensors: cannot be read"),
    ],
)
def test_a_router_that_cannot_serve_is_one_line_at_the_start(expert, tmp_path, capsys, change, words):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/router.json").write_bytes((Path(expert["router"]) / "router.json").read_bytes())
    (tmp_path / "broken/router.safetensors").write_bytes(b"no weights")
    route = expert | change | ({"router": str(tmp_path / "broken")} if change.get("router") else {})
    config = {"port": 0, "workers": [{"url": f"http://127.0.0.1:9/v1#{name}"} for name in "ab"], "virtual": [route]}
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    assert cli.main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and words in said[0]


def test_each_user_sees_one_arm_for_good_and_the_record_tells_who_without_the_name(everything, workers):
    process, directory = everything.process, everything.directory
    users = [f"user-{n}" for n in range(24)]
    replies = [ask(process, "spring", "hello", user=user) for user in users * 2]
    arms = {}
    for user, reply, found in zip(users * 2, replies, events(directory, replies)):
        assert found["policy"] == "ab" and found["experiment"] == "spring" and found["share"] == 0.5
        assert found["counted"] and found["exposed"] and found["probabilities"] == {"a": 0.75, "b": 0.25}
        assert reply.json["model"] == found["chosen"] and (found["arm"] == "blend" or found["chosen"] == "a")
        assert found.get("through", []) == (["chai"] if found["arm"] == "blend" else [])
        assert reply.headers["x-fastft-why"] == found["why"] and f"arm {found['arm']}" in found["why"]
        assert arms.setdefault(user, (found["unit"], found["arm"])) == (found["unit"], found["arm"]), "for good"
    assert len({unit for unit, _ in arms.values()}) == 24, "each user is one unit"
    assert 3 < Counter(arm for _, arm in arms.values())["blend"] < 21
    assert "user-" not in str(gateways.events(directory / "record"))
    assert stat.S_IMODE((directory / "record/unit.key").stat().st_mode) == 0o600
    with served(workers, directory, SPRING, CHAI) as restarted:
        found = event(directory, ask(restarted, "spring", "hello", headers={"X-User-Id": "user-7"}))
        assert (found["unit"], found["arm"]) == arms["user-7"], "after a restart, and by the header"


def test_the_name_in_the_request_comes_before_the_header_and_nobody_gets_the_control(everything):
    process, directory = everything.process, everything.directory
    utf8 = "Zoë".encode().decode("latin-1")  # as the header's bytes are read
    pairs = [
        ({"user": "u1"}, {"X-User-Id": "u2"}),
        ({}, {"X-User-Id": "u1"}),
        ({"user": "Zoë"}, {}),
        ({}, {"X-User-Id": utf8}),
    ]
    named, other, zoe, same = events(directory, [ask(process, "spring", "hi", headers=h, **more) for more, h in pairs])
    assert named["unit"] == other["unit"] != zoe["unit"] == same["unit"]
    nobody = [ask(process, "spring", "hi", **more) for more in ({}, {"user": ""}, {"user": 7}, {"user": "x" * 257})]
    nobody.append(ask(process, "spring", "hi", user="u1", headers={"x-fastft-background": "1"}))
    for found in events(directory, nobody):
        assert (found["arm"], found["unit"], found["counted"], found["exposed"]) == ("control", None, False, False)
    assert any("over: the experiment was over on 2026-01-31" in line for line in process.said), "the start says so, too"
    after = events(directory, [ask(process, "over", "hi", user=f"u{n}") for n in range(6)])
    assert {(each["arm"], each["counted"]) for each in after} == {("control", False)}, "its last day has passed"


def test_a_long_decision_leaves_the_event_loop_and_a_short_one_does_not(expert):
    from fastft.compose.router.policy import RoutePolicy
    from fastft.serve.gateway.app import Gateway, GatewaySettings
    from fastft.serve.gateway.pool import WorkerPool

    policy = RoutePolicy("expert", Path(expert["router"]), of=expert["of"], decide_on="every")
    policy.load()
    threads, scores = [], policy.router.scores
    policy.router.scores = lambda texts: threads.append(threading.current_thread().name) or scores(texts)
    gateway = Gateway(WorkerPool(), GatewaySettings(), {"best": FixedPolicy("expert"), "expert": policy})

    async def decide(*questions: str) -> str:
        messages = [{"role": "user", "content": text} for text in questions]
        scope = {"path": "/v1/chat/completions", "headers": []}
        turn = await gateway._turn(scope, {"messages": messages}, b"{}", "best", None)
        assert gateway.deciding == 0
        return turn.chosen

    assert asyncio.run(decide(POEM)) == "b" and asyncio.run(decide(*routers.SUMS)) == "a"
    assert [name.partition("_")[0] for name in threads] == ["MainThread", "decisions"]


def test_units_depend_on_the_key_and_on_nothing_else(monkeypatch, tmp_path):
    from fastft.serve.command import _unit_key
    from fastft.serve.settings import ServeConfig
    from fastft.serve.virtual_models import VirtualModel, virtual_models

    arms = {name: {"model": name, "share": 0.5} for name in ("control", "b")}
    virtual = virtual_models(
        [VirtualModel("spring", policy="ab", arms={n: SimpleNamespace(**arm) for n, arm in arms.items()})],
        ["control", "b"],
    )
    monkeypatch.setenv("UNITS", "s3cret")
    named = ServeConfig(record=str(tmp_path), unit_key_env="UNITS")
    assert len(_unit_key(named, virtual)) == 32 and not (tmp_path / "unit.key").exists()
    kept = ServeConfig(record=str(tmp_path))
    assert _unit_key(kept, virtual) == _unit_key(kept, virtual) != _unit_key(named, virtual)
    assert _unit_key(ServeConfig(), virtual) is None, "without a record there are no units"


def test_an_anonymous_battle_hides_what_the_policy_chose_and_draws_no_experiment(everything):
    process = everything.process
    for _ in range(6):
        battle = process.post("/arena/battles", {}).json
        reply = process.post(f"/arena/battles/{battle['id']}/a", {"messages": [{"role": "user", "content": POEM}]})
        assert reply.status == 200 and not {"x-fastft-chosen", "x-fastft-why", "x-fastft-model"} & reply.headers.keys()
    battles = [each["battle"] for each in gateways.events(everything.directory / "record") if "battle" in each]
    assert {name for each in battles for name in each["drawn_from"]} <= {"a", "b", "chai", "expert"}


@pytest.mark.slow
def test_draws_are_uniform_over_3000_turns_and_the_same_after_a_restart(workers, tmp_path):
    def draws(turns: int) -> list[str]:
        with served(workers, tmp_path, CHAI) as process:
            connection = process.connect()
            found = []
            for n in range(turns):
                said = [{"role": role, "content": "x"} for _ in range(n % 10) for role in ("user", "assistant")]
                body = {"model": "chai", "messages": [*said, {"role": "user", "content": "x"}]}
                found.append(_model(connection, body, f"c{n // 10}"))
            connection.close()
            return found

    first = draws(3000)
    counts = Counter(first)
    assert sum((counts[name] - 1500) ** 2 / 1500 for name in "ab") < 10.8  # chi-square, 1 degree, p = .001
    assert draws(600) == first[:600]


def _model(connection, body: dict, conversation: str) -> str:
    headers = {"Content-Type": "application/json", "x-fastft-conversation": conversation}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    response.read()
    return response.getheader("x-fastft-model")


@pytest.mark.slow
def test_two_models_blend_a_conversation_of_ten_turns_and_texts_record_and_headers_agree(tmp_path):
    for name, width in (("narrow", 32), ("wide", 64)):
        models.make_model(tmp_path / name, hidden_size=width, max_position_embeddings=4096)
    blend = {"name": "chai", "policy": "blend", "models": {"narrow": 1, "wide": 1}, "seed": "3"}
    config = {"model": [str(tmp_path / "narrow"), str(tmp_path / "wide")], "virtual": [blend], "repeatable": True}
    config["record"] = str(tmp_path / "record")
    with gateways.gateway(config=config, directory=tmp_path) as process:
        said, answered = [], []
        for turn in range(1, 11):
            said.append({"role": "user", "content": f"Question {turn}?"})
            body = {"messages": said, "max_tokens": 12, "temperature": 0}
            headers = {"x-fastft-conversation": "one"}
            reply = process.post("/v1/chat/completions", body | {"model": "chai"}, **headers)
            model, text = reply.json["model"], reply.json["choices"][0]["message"]["content"]
            found = event(tmp_path, reply)
            assert reply.headers["x-fastft-model"] == reply.headers["x-fastft-chosen"] == found["model"] == model
            assert found["turn"] == turn and found["answers"][0]["content"] == text and found["messages"] == said
            alone = process.post("/v1/chat/completions", body | {"model": model}).json
            assert alone["choices"][0]["message"]["content"] == text, "the model says the same when it is asked by name"
            said.append({"role": "assistant", "content": text})
            answered.append(model)
        assert set(answered) == {"narrow", "wide"}
