"""A grimoire behind the real gateway: the worker is told the chosen instructions, the client's request stays what it was."""

import json

import pytest
from helpers import gateways

TOLD = "Look at the last digit alone."


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    """What `fastft grimoire build` leaves, as far as the gateway reads it."""
    directory = tmp_path_factory.mktemp("grimoire")
    setting = {"name": "random-simple", "kind": "simple", "prompt": TOLD, "sampler": "random", "text": TOLD}
    content = {"chosen": "random-simple", "settings": [setting], "encoder": "tfidf"}
    (directory / "choice.json").write_text(json.dumps(content))
    return directory


def test_the_worker_is_told_first_and_the_record_has_what_the_client_sent(choice, tmp_path):
    with gateways.scripted("a") as worker:
        virtual = [
            {"name": "wise", "policy": "grimoire", "grimoire": str(choice), "model": "a"},
            {"name": "perhaps", "policy": "blend", "models": {"wise": 1, "a": 0}},
        ]
        config = {"workers": [{"url": worker.entry}], "virtual": virtual, "record": str(tmp_path / "record")}
        asked = [{"role": "user", "content": "Is 7 odd?"}]
        with gateways.gateway(config=config, directory=tmp_path) as process:
            for name in ("wise", "perhaps"):
                reply = process.post("/v1/chat/completions", {"model": name, "messages": asked})
                assert reply.status == 200 and "grimoire random-simple" in reply.headers["x-fastft-why"]
                assert worker.seen["bodies"][-1]["messages"] == [{"role": "system", "content": TOLD}, *asked]
                event = gateways.event_of(tmp_path / "record", reply.headers["x-fastft-event"])
                assert event["model"] == "a" and TOLD not in json.dumps(event)
            own = [{"role": "system", "content": "Be brief."}, *asked]
            process.post("/v1/chat/completions", {"model": "wise", "messages": own})
            sent = worker.seen["bodies"][-1]["messages"]
            assert sent == [{"role": "system", "content": f"{TOLD}\n\nBe brief."}, *asked]
            assert process.post("/v1/chat/completions", {"model": "a", "messages": asked}).status == 200
            assert worker.seen["bodies"][-1]["messages"] == asked
            refused = process.post("/v1/completions", {"model": "wise", "prompt": "7 is"})
            assert refused.status == 400 and "/v1/chat/completions" in refused.json["error"]["message"]


def test_a_model_that_answers_in_place_of_a_dead_one_is_told_nothing(choice, tmp_path):
    with gateways.scripted("a") as worker, gateways.scripted("b") as other:
        virtual = [
            {"name": "wise", "policy": "grimoire", "grimoire": str(choice), "model": "a"},
            {"name": "perhaps", "policy": "blend", "models": {"wise": 1_000_000, "b": 1}},
        ]
        config = {"workers": [{"url": worker.entry}, {"url": other.entry}], "virtual": virtual}
        asked = [{"role": "user", "content": "Is 7 odd?"}]
        with gateways.gateway(config=config, directory=tmp_path) as process:
            worker.kill()
            reply = process.post("/v1/chat/completions", {"model": "perhaps", "messages": asked})
            assert reply.status == 200 and reply.headers["x-fastft-model"] == "b"
            assert other.seen["bodies"][-1]["messages"] == asked


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"grimoire": None}, "a grimoire needs what fastft grimoire build has written"),
        ({"model": None}, "a grimoire needs the weak model"),
        ({"grimoire": "nowhere"}, "nowhere/choice.json: no such file"),
        ({"model": "b"}, "there is no model 'b'"),
        ({"min_run": 2}, "min_run is for the policy blend"),
    ],
)
def test_a_grimoire_that_cannot_be_served_is_refused_in_one_line(choice, changed, words):
    from fastft.errors import UserError
    from fastft.serve.virtual_models import VirtualModel, virtual_models

    keys = {"name": "wise", "policy": "grimoire", "grimoire": str(choice), "model": "a", **changed}
    with pytest.raises(UserError) as refused:
        virtual_models([VirtualModel(**keys)], ["a"])
    assert words in str(refused.value)
