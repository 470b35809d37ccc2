"""A blend behind the real gateway: each turn says who answered, a retry asks the same model, and a failover is called one."""

import contextlib
from collections import Counter

import pytest
from helpers import gateways

BLEND = {"name": "chai", "policy": "blend", "models": {"a": 1, "b": 1}}


@pytest.fixture(scope="module")
def workers():
    with gateways.scripted("a") as a, gateways.scripted("b") as b:
        yield a, b


@contextlib.contextmanager
def blended(workers, directory, **virtual):
    config = {
        "workers": [{"url": each.entry} for each in workers],
        "virtual": [BLEND | virtual],
        "record": str(directory / "record"),
    }
    with gateways.gateway(config=config, directory=directory) as process:
        process.name = "chai"
        yield process


def ask(process, conversation: str, turn: int = 1):
    """Ask for a turn of a conversation, whose earlier answers are some text; return the reply."""
    said = [{"role": role, "content": f"{role} {n}"} for n in range(1, turn) for role in ("user", "assistant")]
    body = {"model": "chai", "messages": [*said, {"role": "user", "content": f"user {turn}"}]}
    return process.post("/v1/chat/completions", body, **{"x-fastft-conversation": conversation})


def test_a_conversation_is_answered_by_both_and_every_witness_agrees(workers, tmp_path):
    with blended(workers, tmp_path) as process:
        answered = []
        for turn in range(1, 11):
            reply = ask(process, "one", turn)
            model = reply.json["model"]
            event = gateways.event_of(tmp_path / "record", reply.headers["x-fastft-event"])
            text = reply.json["choices"][0]["message"]["content"]
            assert reply.headers["x-fastft-model"] == model == event["model"] == event["chosen"] == text[0]
            assert reply.headers["x-fastft-asked"] == event["asked"] == "chai"
            assert event["policy"] == "blend" and event["probabilities"] == {"a": 0.5, "b": 0.5}
            assert event["turn"] == turn and not event["failover"]
            answered.append(model)
        assert set(answered) == {"a", "b"}
        assert [ask(process, "one", turn).json["model"] for turn in range(1, 11)] == answered, "asked again"
    with blended(workers, tmp_path) as restarted:
        assert [ask(restarted, "one", turn).json["model"] for turn in range(1, 11)] == answered, "after a restart"


def test_draws_are_uniform_over_many_turns(workers, tmp_path):
    with blended(workers, tmp_path) as process:
        counts = Counter(ask(process, f"c{n // 5}", n % 5 + 1).json["model"] for n in range(1000))
    assert sum((counts[name] - 500) ** 2 / 500 for name in "ab") < 10.8  # chi-square, 1 degree, p = 0.001


def test_where_the_drawn_model_is_gone_another_one_answers_and_the_record_says_so(workers, tmp_path):
    _, b = workers
    with gateways.scripted("a") as a, blended((a, b), tmp_path) as process:
        a.kill()
        for n in range(8):
            reply = ask(process, f"c{n}")
            event = gateways.event_of(tmp_path / "record", reply.headers["x-fastft-event"])
            assert (
                reply.status == 200 and reply.json["model"] == reply.headers["x-fastft-model"] == event["model"] == "b"
            )
            assert event["failover"] == (event["chosen"] == "a")
        assert "a" in {each["chosen"] for each in gateways.events(tmp_path / "record")}


@pytest.mark.parametrize(
    "virtual, words",
    [
        ({"models": {"a": 1, "bb": 1}}, "there is no model 'bb'; did you mean 'b'?"),
        ({"models": {"a": 0, "b": 0}}, "blend chai: its weights sum to 0"),
        ({"models": {}}, "a blend needs models with their weights"),
        ({"model": "a", "policy": "fixed"}, "models is for the policy blend; the policy fixed reads model"),
        ({"schedule": [{"from_turn": 2, "models": {"a": 1}}] * 2}, "two parts of the schedule begin at the same turn"),
        ({"wieghts": {"a": 1}}, "wieghts"),
        ({"policy": "blnd"}, "blnd"),
    ],
)
def test_a_blend_that_cannot_be_is_one_line(workers, tmp_path, virtual, words):
    with pytest.raises(AssertionError) as refusal, blended(workers, tmp_path, **virtual):
        pass
    said = [line for line in str(refusal.value).splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0] and "Traceback" not in str(refusal.value)
