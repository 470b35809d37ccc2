"""`fastft serve --check`: says what each name would do, and what is wrong or doubtful, and starts nothing."""

import json
from dataclasses import dataclass

import pytest
import yaml
from helpers import routers

from fastft import cli

WORKERS = [{"url": "http://127.0.0.1:9/v1#a"}, {"url": "http://127.0.0.1:9/v1#b", "key_env": "B_KEY"}]
CHAI = {
    "name": "chai",
    "policy": "blend",
    "models": {"a": 1, "b": 1},
    "schedule": [{"from_turn": 9, "models": {"a": 1}}],
}
SPRING = {
    "name": "spring",
    "policy": "ab",
    "arms": {"control": {"model": "a", "share": 0.5}, "blend": {"model": "chai", "share": 0.5}},
}


@dataclass
class Said:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Run the check on a file; returns what it said."""
    monkeypatch.setenv("B_KEY", "sk-secret")

    def run(*virtual, text: str | None = None, **more) -> Said:
        path = tmp_path / "serve.yaml"
        path.write_text(text or json.dumps({"workers": WORKERS, "virtual": virtual, **more}))
        capsys.readouterr()
        code = cli.main(["serve", "--check", "--config", str(path)])
        return Said(code, *capsys.readouterr())

    return run


def lines(done) -> dict[str, str]:
    return {words[0]: words[1] for line in done.stdout.splitlines() if len(words := line.split(maxsplit=1)) == 2}


def test_every_name_has_a_line_with_its_models_and_their_probabilities(check, tmp_path):
    routers.train(tmp_path / "expert", sums="math", poems="b")
    route = {"name": "expert", "policy": "route", "router": str(tmp_path / "expert"), "of": {"math": "a"}}
    done = check({"name": "best", "model": "spring"}, CHAI, SPRING, route, record=str(tmp_path / "record"))
    assert done.returncode == 0, done.stderr
    said = lines(done)
    assert said["a"] == "model  http://127.0.0.1:9/v1#a"
    assert said["b"] == "model  http://127.0.0.1:9/v1#b, with the key in B_KEY" and "sk-secret" not in done.stdout
    assert said["chai"] == "blend  a 0.5, b 0.5, drawn for each turn (seed 0); from turn 9: a 1"
    assert said["spring"].startswith("ab     control 0.5: a; blend 0.5: chai.")
    assert said["spring"].endswith("Over all: a 0.75, b 0.25") and said["best"].endswith("Over all: a 0.75, b 0.25")
    assert said["expert"].startswith("route  a (math), b, chosen by ") and "a unless another leads" in said["expert"]
    assert "a random one, kept beside the record" in done.stdout
    assert not done.stderr and not (tmp_path / "record").exists(), "nothing is doubtful, and nothing begins"


@pytest.mark.parametrize(
    "virtual, warning",
    [
        ([SPRING, CHAI], "spring: an experiment without a record cannot be read"),
        (
            [SPRING | {"until": "2020-01-31"}, CHAI],
            "spring: the experiment was over on 2020-01-31: everybody gets control",
        ),
        (
            [SPRING | {"arms": {"control": {"model": "a", "share": 0.5}, "x": {"model": "a", "share": 0.5}}}],
            "an A/A test",
        ),
        ([CHAI | {"models": {"a": 1, "b": 0}}], "chai: no blend: only a has a weight"),
    ],
)
def test_what_is_doubtful_is_said_and_is_no_error(check, virtual, warning):
    done = check(*virtual)
    assert done.returncode == 0 and warning in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "virtual, words",
    [
        ([CHAI | {"models": {"spring": 1}}, SPRING], "virtual: chai -> spring -> chai: goes round"),
        (
            [SPRING | {"arms": {"control": {"model": "a", "share": 0.5}, "n": {"model": "b", "share": 0.4}}}],
            "sum to 0.9",
        ),
        ([SPRING | {"arms": {"control": {"model": "a", "shaer": 0.5}}}], "'virtual.0.arms.control.share'"),
        ([SPRING | {"arms": {"control": {"model": "a"}}}], "virtual.0.arms.control.share: missing"),
        ([SPRING | {"namespace": {"name": "x", "rnge": [0, 1]}}, CHAI], "'virtual.0.namespace.range'"),
        ([SPRING | {"until": "soon"}, CHAI], "until: soon is no day"),
        ([SPRING | {"decide_on": "every"}, CHAI], "decide_on is for the policy route; the policy ab reads arms"),
        ([SPRING], "spring: there is no model 'chai'"),
        ([CHAI | {"name": "a"}], "two models are called 'a'"),
        ([CHAI, CHAI], "two models are called 'chai'"),
        ([{"name": "x", "policy": "route"}], "x: a route needs a trained router"),
        ([{"name": "x", "policy": "route", "router": "nowhere"}], "nowhere holds no router.json"),
        (
            [{"name": "x", "policy": "rout", "router": "nowhere"}],
            "virtual.0.policy: expected one of fixed, blend, route, ab",
        ),
        ([{"name": "x", "policy": "route", "routr": "nowhere"}], "the nearest valid one is 'virtual.0.router'"),
        ([SPRING | {"coverage": "half"}, CHAI], "virtual.0.coverage: expected a number, got 'half'"),
    ],
)
def test_what_is_wrong_is_one_line(check, virtual, words):
    done = check(*virtual)
    errors = done.stderr.splitlines()
    assert done.returncode in (1, 2) and len(errors) == 1 and words in errors[0], done.stderr
    assert not done.stdout


def test_a_day_is_written_as_yaml_has_it_and_a_day_that_does_not_exist_is_named(check, tmp_path):
    text = yaml.safe_dump({"workers": WORKERS, "virtual": [SPRING, CHAI], "record": "r"}).replace(
        "virtual:\n- ", "virtual:\n- until: 2099-01-31\n  "
    )
    done = check(text=text)
    assert done.returncode == 0 and "until 2099-01-31" in done.stdout, done.stderr
    done = check(text=text.replace("2099-01-31", "2099-02-31"))
    assert done.stderr == "error: virtual: spring: until: 2099-02-31 is no day; write 2027-01-31\n"


def test_a_key_that_is_not_set_is_an_error(check, tmp_path):
    done = check(unit_key_env="NO_SUCH_KEY")
    assert done.returncode == 1 and "--unit_key_env NO_SUCH_KEY: there is no such environment variable" in done.stderr


def test_a_record_in_which_a_blends_models_write_differently_is_a_warning(check, tmp_path):
    from fastft.serve.gateway.events import EventLog, ServedTurn

    record = EventLog(tmp_path / "record")
    for n in range(40):
        for model, text in (
            ("a", f"Yes, {n}."),
            ("b", f"Well, {n} is a number of which much can be said, and I shall. " * 4),
        ):
            answer = {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
            turn = ServedTurn(
                path="/v1/chat/completions", asked=model, body=b'{"messages": []}', streamed=False, key=None,
                conversation="c", conversation_from="header", turn=1, policy=None, chosen=model, probabilities={model: 1.0},
                why="asked by name", answered=model, outcome="answered", sent=[json.dumps(answer).encode()],
            )  # fmt: skip
            record.add(turn)
    record.close()
    done = check(CHAI, record=str(tmp_path / "record"))
    assert done.returncode == 0 and "chai: length: b's answers are" in done.stderr


def test_a_router_that_gains_nothing_over_its_best_model_is_a_warning(check, tmp_path):
    path = routers.train(tmp_path / "expert", sums="a", poems="b") / "router.json"
    settings = json.loads(path.read_text())
    settings["report"]["held_out"]["gain_over_best_single"] = [0.4, -0.2, 1.0]
    path.write_text(json.dumps(settings))
    done = check({"name": "expert", "policy": "route", "router": str(tmp_path / "expert")})
    assert (
        done.returncode == 0 and "expert: not worth it: on held-out queries +0.40 [-0.20, 1.00] points" in done.stderr
    )
