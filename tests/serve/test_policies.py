"""Routers and experiments behind the real gateway: who answers, and what the headers, the record and the metrics say."""

import contextlib
import json
import stat
from collections import Counter

import pytest
from helpers import gateways, models, routers
from helpers.serving import wait_until

SUM, POEM = "What is 4 plus 9? Add the numbers.", "Write a merry poem about the sea."
SPRING = {
    "name": "spring",
    "policy": "ab",
    "arms": {"control": {"model": "a", "share": 0.5}, "blend": {"model": "chai", "share": 0.5}},
    "until": "2099-12-31",
}
CHAI = {"name": "chai", "policy": "blend", "models": {"a": 1, "b": 1}}


@pytest.fixture(scope="module")
def workers():
    with gateways.scripted("a") as a, gateways.scripted("b") as b:
        yield a, b


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    return routers.train(tmp_path_factory.mktemp("router") / "expert", sums="math", poems="b")


@contextlib.contextmanager
def served(workers, directory, *virtual, environment=None, **more):
    config = {"workers": [{"url": each.entry} for each in workers], "virtual": [*virtual], **more}
    config |= {"record": str(directory / "record")}
    with gateways.gateway(config=config, directory=directory, **(environment or {})) as process:
        yield process


def ask(process, model: str, *questions: str, headers: dict | None = None, **more):
    """Ask the last question; the ones before it have been answered somehow."""
    said = [{"role": role, "content": text} for q in questions for role, text in (("user", q), ("assistant", "Well."))]
    return process.post("/v1/chat/completions", {"model": model, "messages": said[:-1], **more}, **(headers or {}))


def event(directory, reply) -> dict:
    return gateways.event_of(directory / "record", reply.headers["x-fastft-event"])


def test_a_router_sends_each_question_to_its_model_and_every_witness_agrees(workers, expert, tmp_path):
    route = {"name": "expert", "policy": "route", "router": str(expert), "of": {"math": "a"}, "decide_on": "every"}
    with served(workers, tmp_path, route) as process:
        for questions, model in (
            ([SUM], "a"),
            ([POEM], "b"),
            ([SUM, POEM], "b"),
            ([[{"type": "text", "text": POEM}]], "b"),
        ):
            reply = ask(process, "expert", *questions)
            found = event(tmp_path, reply)
            assert reply.json["model"] == reply.headers["x-fastft-model"] == reply.headers["x-fastft-chosen"] == model
            assert found["model"] == found["chosen"] == model and found["policy"] == "route"
            assert found["probabilities"] == {name: float(name == model) for name in "ab"}
            assert found["scores"].keys() == {"a", "b"} and found["scores"][model] == max(found["scores"].values())
            assert reply.headers["x-fastft-why"] == found["why"] and found["why"].startswith(f"{model} 0.")
            assert 0 < found["decision_s"] < found["total_s"]
        completion = process.post("/v1/completions", {"model": "expert", "prompt": POEM})
        assert event(tmp_path, completion)["chosen"] == "b"
        assert process.metric('fastft_gateway_decision_seconds_count{policy="route"}') == 5
        assert process.metric('fastft_gateway_decision_seconds_bucket{le="+Inf",policy="route"}') == 5


def test_where_the_routed_model_is_gone_the_other_one_answers(workers, expert, tmp_path):
    route = {"name": "expert", "policy": "route", "router": str(expert), "of": {"math": "a"}}
    with gateways.scripted("b") as b, served((workers[0], b), tmp_path, route) as process:
        b.kill()
        reply = ask(process, "expert", POEM)
        found = event(tmp_path, reply)
        assert reply.json["model"] == found["model"] == "a" and found["chosen"] == "b" and found["failover"]


def test_a_router_for_other_models_than_those_served_is_one_line_at_the_start(workers, expert, tmp_path):
    route = {"name": "expert", "policy": "route", "router": str(expert)}
    with pytest.raises(AssertionError) as refusal, served(workers, tmp_path, route):
        pass
    lines = [line for line in str(refusal.value).splitlines() if "error: " in line]
    assert (
        len(lines) == 1 and "was trained for math, b, and nothing here is called 'math'; of: {math: NAME}" in lines[0]
    )


def test_a_router_without_its_weights_ends_the_start_with_one_line(workers, expert, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/router.json").write_bytes((expert / "router.json").read_bytes())
    (tmp_path / "broken/router.safetensors").write_bytes(b"no weights")
    route = {"name": "expert", "policy": "route", "router": str(tmp_path / "broken"), "of": {"math": "a"}}
    with pytest.raises(AssertionError) as refusal, served(workers, tmp_path, route):
        pass
    assert "Traceback" not in str(refusal.value) and "broken" in str(refusal.value).splitlines()[-1]


def test_each_user_sees_one_arm_and_the_record_tells_who_without_the_name(workers, tmp_path):
    users = [f"user-{n}" for n in range(40)]
    with served(workers, tmp_path, SPRING, CHAI) as process:
        arms = {}
        for user in users * 2:
            reply = ask(process, "spring", f"hello, I am not {user}", user=user)
            found = event(tmp_path, reply)
            assert found["policy"] == "ab" and found["experiment"] == "spring" and found["share"] == 0.5
            assert found["counted"] and found["exposed"] and found["probabilities"] == {"a": 0.75, "b": 0.25}
            assert reply.json["model"] == found["chosen"] and (found["arm"] == "blend" or found["chosen"] == "a")
            assert found.get("through", []) == (["chai"] if found["arm"] == "blend" else [])
            assert reply.headers["x-fastft-why"] == found["why"] and f"arm {found['arm']}" in found["why"]
            assert arms.setdefault(user, (found["unit"], found["arm"])) == (found["unit"], found["arm"]), "for good"
    assert len({unit for unit, _ in arms.values()}) == 40, "each user is one unit"
    assert 8 < Counter(arm for _, arm in arms.values())["blend"] < 32
    assert stat.S_IMODE((tmp_path / "record/unit.key").stat().st_mode) == 0o600
    stored = [{k: v for k, v in each.items() if k != "messages"} for each in gateways.events(tmp_path / "record")]
    assert "user-" not in str(stored)
    with served(workers, tmp_path, SPRING, CHAI) as process:
        found = event(tmp_path, ask(process, "spring", "hello", headers={"X-User-Id": "user-7"}))
        assert (found["unit"], found["arm"]) == arms["user-7"], "after a restart, and by the header"


def test_the_name_in_the_request_comes_before_the_header_and_nobody_gets_the_control(workers, tmp_path):
    with served(workers, tmp_path, SPRING, CHAI, environment={"UNITS": "s3cret"}, unit_key_env="UNITS") as process:
        named = event(tmp_path, ask(process, "spring", "hello", user="u1", headers={"X-User-Id": "u2"}))
        other = event(tmp_path, ask(process, "spring", "hello", headers={"X-User-Id": "u1"}))
        assert named["unit"] == other["unit"]
        for more in ({}, {"user": ""}, {"user": 7}, {"user": "x" * 257}):
            found = event(tmp_path, ask(process, "spring", "hello", **more))
            assert (found["arm"], found["unit"], found["counted"], found["exposed"]) == ("control", None, False, False)
        background = event(tmp_path, ask(process, "spring", "hello", user="u1", headers={"x-fastft-background": "1"}))
        assert not background["exposed"], "no person has seen it"
    assert not (tmp_path / "record/unit.key").exists()


def test_after_its_last_day_an_experiment_serves_the_control(workers, tmp_path):
    with served(workers, tmp_path, SPRING | {"until": "2026-01-31"}, CHAI) as process:
        found = [event(tmp_path, ask(process, "spring", "hello", user=f"u{n}")) for n in range(6)]
    assert {(each["arm"], each["counted"]) for each in found} == {("control", False)}


def test_an_anonymous_battle_hides_what_the_policy_chose(workers, expert, tmp_path):
    route = {"name": "expert", "policy": "route", "router": str(expert), "of": {"math": "a"}}
    with served(workers, tmp_path, route, SPRING, CHAI) as process:
        battles = [process.post("/arena/battles", {}).json for _ in range(6)]
        for battle in battles:
            request = {"messages": [{"role": "user", "content": POEM}]}
            reply = process.post(f"/arena/battles/{battle['id']}/a", request)
            assert reply.status == 200 and not [
                name for name in reply.headers if name in ("x-fastft-chosen", "x-fastft-why")
            ]
        wait_until(lambda: len(gateways.events(tmp_path / "record")) == 6, "all are recorded")
        assert "spring" not in {
            name for each in gateways.events(tmp_path / "record") for name in each["battle"]["drawn_from"]
        }


@pytest.mark.slow
def test_draws_are_uniform_over_3000_turns_and_the_same_after_a_restart(workers, tmp_path):
    def draws() -> list[str]:
        with served(workers, tmp_path, CHAI) as process:
            connection = process.connect()
            found = []
            for n in range(3000):
                said = [{"role": role, "content": "x"} for _ in range(n % 10) for role in ("user", "assistant")]
                body = {"model": "chai", "messages": [*said, {"role": "user", "content": "x"}]}
                found.append(_model(connection, body, f"c{n // 10}"))
            connection.close()
            return found

    first = draws()
    counts = Counter(first)
    assert sum((counts[name] - 1500) ** 2 / 1500 for name in "ab") < 10.8  # chi-square, 1 degree, p = .001
    assert draws() == first


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
