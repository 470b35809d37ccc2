"""A blend answers questions offline: the gateway's draws, a history that all share, one model in memory, no turn paid twice."""

import gc
import json
import weakref
from pathlib import Path

import pytest
from helpers import gateways, models, openai_server
from helpers.judging import run_answer
from helpers.openai_server import Failure

from fastft.compose.blend import BlendPolicy
from fastft.compose.blend_parts import read_blend
from fastft.data.conversation import Conversation, Message
from fastft.inference import engine
from fastft.judge.questions import read_answers


def ask_for(tmp_path, questions: int, turns: int) -> str:
    """Write questions of so many turns; returns their file."""
    rows = [{"id": f"q{i}", "turns": [f"Question {i}.{t}?" for t in range(turns)]} for i in range(questions)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "q.jsonl")


def drawn(policy: BlendPolicy, answers) -> list[list[str]]:
    return [
        [policy.choose(Conversation(each.question_id), turn, []).model for turn in range(1, len(each.turns) + 1)]
        for each in answers
    ]


def told(answers) -> list[list[str]]:
    """The models that the answers name, turn by turn."""
    return [[by["model"] for by in each.answered_by] for each in answers]


def by_name(body: dict, number: int = 0) -> str:
    """An answer from which its model can be told."""
    return f"{body['model']} says {len(body['messages'])}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The directories of two tiny models that differ."""
    at = tmp_path_factory.mktemp("pair")
    return models.make_model(at / "one"), models.make_model(at / "two", "qwen2", template="llama3")


@pytest.mark.slow
def test_the_gateway_draws_the_same_models_for_the_same_conversations(tmp_path):
    with gateways.scripted("a") as a, gateways.scripted("b") as b:
        config = {
            "workers": [{"url": a.entry}, {"url": b.entry}],
            "virtual": [{"name": "chai", "policy": "blend", "models": {"a": 1, "b": 2}, "seed": "7"}],
        }
        blend = ["--model", f"blend:{a.entry},{b.entry}=2", "--name", "chai", "--seed", "7"]
        assert run_answer([ask_for(tmp_path, 8, 3), *blend, "-o", str(tmp_path / "chai.jsonl")]) == 0
        answers = read_answers(tmp_path / "chai.jsonl")
        with gateways.gateway(config=config, directory=tmp_path) as process:
            for answer, offline in zip(answers, told(answers)):
                assert [text[0] for text in answer.turns] == offline, "who answered is who is named"
                messages: list[dict] = []
                for turn, text in enumerate(answer.turns):
                    messages += [{"role": "user", "content": f"Question {answer.question_id[1:]}.{turn}?"}]
                    body = {"model": "chai", "messages": messages}
                    reply = process.post("/v1/chat/completions", body, **{"x-fastft-conversation": answer.question_id})
                    assert reply.json["model"] == offline[turn]
                    messages += [{"role": "assistant", "content": text}]
    assert {model for each in told(answers) for model in each} == {"a", "b"}
    assert answers[0].answered_by[0]["probabilities"] == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert answers[0].answered_by[1]["why"] == "drawn for turn 2" and answers[0].model == "chai"


def test_every_model_reads_what_the_others_have_said(tmp_path):
    with openai_server.endpoint(by_name) as server:
        model = f"blend:{server.url}#a,{server.url}#b"
        assert run_answer([ask_for(tmp_path, 6, 3), "--model", model, "-o", str(tmp_path / "out.jsonl")]) == 0
        last = {body["messages"][0]["content"]: body for body in server.requests if len(body["messages"]) == 5}
    answers = read_answers(tmp_path / "out.jsonl")
    for answer, offline in zip(answers, told(answers)):
        body = last[f"Question {answer.question_id[1:]}.0?"]
        said = [each["content"] for each in body["messages"] if each["role"] == "assistant"]
        assert said == list(answer.turns[:2]) and body["model"] == offline[2]
        assert [text[0] for text in answer.turns] == offline
    assert any(len(set(each)) == 2 for each in told(answers)), "a conversation in which the model changes"


def test_directories_are_loaded_one_at_a_time_and_a_killed_run_continues(pair, tmp_path, monkeypatch, capsys):
    alive, loads, generated = weakref.WeakSet(), [], []

    class Watched(engine.ChatModel):
        def __init__(self, model: str):
            gc.collect()
            assert not alive, "another model is still in memory"
            loads.append(model)
            if len(loads) == 3:
                raise KeyboardInterrupt  # as Ctrl-C
            super().__init__(model)
            alive.add(self)

        def answer_batch(self, dialogues, *arguments):
            generated.extend(tuple(message.content for message in each) for each in dialogues)
            return super().answer_batch(dialogues, *arguments)

    monkeypatch.setattr(engine, "ChatModel", Watched)
    one, two = pair
    command = [ask_for(tmp_path, 6, 3), "--model", f"blend:{one},{two}", "--max_tokens", "4", "--batch_size", "4"]
    command += ["-o", str(tmp_path / "blend.jsonl")]
    assert run_answer(command) == 130
    before = len(generated)
    turns = (tmp_path / "blend.turns.jsonl").read_text()
    assert turns.count("\n") == 1 + before > 1
    (tmp_path / "blend.turns.jsonl").write_text(turns + '{"question_id": "q1", "tu')  # as kill -9 leaves it
    assert run_answer(command) == 0
    assert len(generated) == 18 and len(set(generated)) == 18, "no turn is answered twice"
    assert len(loads) <= 7, "a model answers all that waits for it before the next is loaded"
    answers = read_answers(tmp_path / "blend.jsonl")
    assert told(answers) == drawn(BlendPolicy("blend", {"one": 1, "two": 1}), answers)
    assert not (tmp_path / "blend.turns.jsonl").exists()
    row = json.loads((tmp_path / "blend.jsonl").read_text().splitlines()[0])
    assert set(row["parameters"]["model"]) == {"one", "two"} and row["parameters"]["from_turn"] == {
        "1": {"one": 1, "two": 1}
    }
    assert "turns: " in capsys.readouterr().out
    assert run_answer([*command, "--seed", "1"]) == 1
    assert "was made with" in capsys.readouterr().err


def test_a_directory_answers_in_a_blend_as_it_does_alone(pair, tmp_path):
    """The same words from the same prompt, in its own template: what is said before comes from an endpoint."""
    one, _ = pair
    with openai_server.endpoint(by_name) as server:
        schedule = {"models": {f"{server.url}#a": 1}, "schedule": [{"from_turn": 2, "models": {str(one): 1}}]}
        (tmp_path / "blend.yaml").write_text(json.dumps(schedule))
        command = [ask_for(tmp_path, 2, 3), "--model", f"blend:{tmp_path / 'blend.yaml'}", "--max_tokens", "5"]
        assert run_answer([*command, "-o", str(tmp_path / "out.jsonl")]) == 0
        assert len(server.requests) == 2
    answers = read_answers(tmp_path / "out.jsonl")
    assert told(answers) == [["a", "one", "one"]] * 2
    chat = engine.ChatModel(str(one))
    for answer, number in zip(answers, range(2)):
        said = [Message("user", f"Question {number}.0?"), Message("assistant", "a says 1")]
        said += [Message("user", f"Question {number}.1?")]
        assert chat.answer_batch([said], 5)[0].text == answer.turns[1]


def test_models_that_write_differently_are_a_warning_with_numbers(tmp_path, caplog):
    def reply(body, number):
        return "A short answer, as ever." if body["model"] == "a" else "1. Hello\n2. there\n\n" + "and more words " * 30

    with openai_server.endpoint(reply) as server:
        command = [ask_for(tmp_path, 40, 1), "--model", f"blend:{server.url}#a,{server.url}#b"]
        assert run_answer([*command, "-o", str(tmp_path / "out.jsonl")]) == 0
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned[0].startswith("length: b's answers are 19.5 times as long as a's (typically ")
    assert warned[1:] == ["lists: in 100 % of b's answers and in 0 % of a's"]


def test_a_model_that_cannot_answer_costs_its_question_and_not_the_turns_before(tmp_path, capsys):
    broken = [True]

    def reply(body, number):
        return Failure(400, "no") if broken[0] and len(body["messages"]) == 3 else by_name(body)

    with openai_server.endpoint(reply) as server:
        command = [ask_for(tmp_path, 4, 2), "--model", f"blend:{server.url}#a,{server.url}#b"]
        command += ["-o", str(tmp_path / "out.jsonl")]
        assert run_answer(command) == 1
        assert "4 of 4 questions are not answered (q" in (said := capsys.readouterr().err) and "turn 2, " in said
        asked = [body for body in server.requests if len(body["messages"]) == 1]
        first = {body["messages"][0]["content"]: body["model"] for body in asked}
        (tmp_path / "out.cache.jsonl").unlink(missing_ok=True)  # so that only the file of turns can know
        broken[0] = False
        assert run_answer(command) == 0 and server.paid == 8
    answers = read_answers(tmp_path / "out.jsonl")
    assert [by[0] for by in told(answers)] == [first[f"Question {i}.0?"] for i in range(4)]


def test_a_dry_run_says_how_many_turns_each_model_would_answer_and_asks_nothing(tmp_path, capsys):
    with openai_server.endpoint(by_name) as server:
        command = [ask_for(tmp_path, 10, 2), "--model", f"blend:{server.url}#a,{server.url}#b", "--max_tokens", "10"]
        command += ["-o", str(tmp_path / "out.jsonl"), "--dry_run", "--usd_per_million", "1,1000"]
        assert run_answer([*command, "0,2000"]) == 0
        assert not server.requests and not (tmp_path / "out.jsonl").exists()
    said = capsys.readouterr().out
    answers = [type("A", (), {"question_id": f"q{i}", "turns": ("", "")}) for i in range(10)]
    models_ = [model for each in drawn(BlendPolicy("blend", {"a": 1, "b": 1}), answers) for model in each]
    a, b = models_.count("a"), models_.count("b")
    assert f"would ask 20 turns: 80 prompt tokens, at most 200 reply tokens, at most ${a / 100 + b / 50:.2f}" in said
    assert f"(a {a}, b {b})" in said


def test_where_two_directories_have_one_name_they_are_called_by_their_places(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for place in ("x/model", "y/model", "z"):
        Path(place).mkdir(parents=True)
        Path(place, "config.json").write_text("{}")
    assert read_blend("blend:x/model,y/model,z").places == {"x/model": "x/model", "y/model": "y/model", "z": "z"}
    named = read_blend("blend:vicuna=x/model=3,y/model")
    assert named.places == {"vicuna": "x/model", "model": "y/model"}
    assert named.policy.weights == [{"vicuna": 3.0, "model": 1.0}]
    (tmp_path / "z.yml").write_text(
        json.dumps(
            {
                "name": "chai",
                "seed": "5",
                "min_run": 2,
                "models": {"vicuna=x/model": 1},
                "schedule": [{"from_turn": 9, "models": {"vicuna": 1, "spring=y/model": 1}}],
            }
        )
    )
    blend = read_blend("blend:z.yml")
    assert blend.places == {"vicuna": "x/model", "spring": "y/model"} and blend.policy.name == "chai"
    assert blend.described == {
        "policy": "blend",
        "seed": "5",
        "min_run": 2,
        "from_turn": {"1": {"vicuna": 1}, "9": {"vicuna": 1, "spring": 1}},
    }
    assert read_blend("blend:z.yml", seed="6").policy.seed == "6" and not caplog.text
    read_blend("blend:z")
    assert "--model blend:z: is a blend of one model" in caplog.text


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("blend:nowhere,other", "nowhere: no such directory; write blend:DIR,DIR"),
        ("blend:empty", "empty: holds no model (config.json)"),
        ("blend:", "--model blend: names no models; write blend:DIR,DIR"),
        ("blend:here,,here", "names no model between two commas"),
        ("blend:here,here", "here is given twice; here=2 gives it twice the weight"),
        ("blend:here=0", "blend blend: its weights sum to 0"),
        ("blend:here=-1", "the weight of one is -1"),
        ("blend:http://127.0.0.1:9/v1", "must be URL#name"),
        ("blend:none.yaml", "none.yaml: no such file; it should describe a blend"),
        ("blend:wrong.yaml", "wrong.yaml: unknown key 'modles.here'; the nearest valid one is 'models'"),
        ("blend:empty.yaml", "empty.yaml: a blend needs models with their weights"),
        ("blend:twice.yaml", "two parts of the schedule begin at the same turn"),
        ("blend:first.yaml", "the schedule begins at turn 1, which is decided by models"),
        ("here --seed 3", "--seed is for the draws of a blend"),
    ],
)
def test_a_blend_that_cannot_be_is_one_line(model, words, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").symlink_to(pair[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.yaml").write_text("modles: {here: 1}")
    (tmp_path / "empty.yaml").write_text("seed: '1'")
    stage = {"from_turn": 2, "models": {"here": 1}}
    (tmp_path / "twice.yaml").write_text(json.dumps({"models": {"here": 1}, "schedule": [stage, stage]}))
    stage = {"from_turn": 1, "models": {"here": 1}}
    (tmp_path / "first.yaml").write_text(json.dumps({"models": {"here": 1}, "schedule": [stage]}))
    capsys.readouterr()
    assert run_answer(["--model", *model.split(), "-o", "out.jsonl"]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not list(tmp_path.glob("out*"))
