"""`fastft demo`, every stage for real, and what can be done with what it leaves."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import openai_server

import fastft.demo.run
from fastft.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's directory, every stage for real, training cut to a few steps; and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(fastft.demo.run, "TRAINING", [*fastft.demo.run.TRAINING, "--max_steps", "3"])
        patch.setenv("FASTFT_CACHE", str(out.parent / "cache"))
        assert main(["demo", "--output_dir", str(out)]) == 0
    return out, printed.getvalue()


def test_the_demos_model_is_asked_judged_and_reported(demo, tmp_path, monkeypatch, capsys):
    """answer -> judge -> report, the model on this CPU, the judge over HTTP: it likes the letter e."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-e2e-key-0123456789")
    directory, _ = demo
    questions = [
        {"id": f"q{n}", "category": ("one", "two")[n % 2], "turns": [f"What is token {n}?", "Why?"]} for n in range(4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    answers = [str(tmp_path / f"{name}.jsonl") for name in ("short", "long")]
    for path, tokens in zip(answers, ("2", "12")):
        options = ["--model", str(directory / "model"), "--name", Path(path).stem, "--max_tokens", tokens]
        assert main(["answer", str(tmp_path / "questions.jsonl"), "-o", path, "--batch_size", "3", *options]) == 0
    rows = [json.loads(line) for line in Path(answers[1]).read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    assert all(len(row["turns"]) == 2 and row["completion_tokens"] and row["finish_reason"] for row in rows)

    def likes_e(body, number):
        marks = [
            re.findall(
                rf"<answer of Assistant {n} \w+>\n(.*?)\n</answer of", body["messages"][0]["content"], re.DOTALL
            )[-1]
            for n in (1, 2)
        ]
        return "Scores: {} {}".format(*(min(10, 1 + mark.count("e")) for mark in marks))

    judged = tmp_path / "judged"
    with openai_server.endpoint(likes_e) as server:
        command = ["judge", "--answers", *answers, "--questions", str(tmp_path / "questions.jsonl"), "-o", str(judged)]
        assert main([*command, "--judge", f"{server.url}#e"]) == 0
        assert server.paid == 16  # 4 questions, 2 turns, 2 orders
    assert main(["report", str(judged)]) == 0
    results = json.loads((judged / "results.json").read_text())
    assert (results["judgments"], results["unparsed"], results["models"]) == (16, 0, ["short", "long"])
    assert "What is token 0?" in (judged / "report.html").read_text()
    assert "short : long" in capsys.readouterr().out


def test_the_demo_walks_the_whole_road(demo):
    out, printed = demo
    for name in fastft.demo.run.FILES:
        assert (out / name.rstrip("/")).exists(), name
    ledger = json.loads((out / "clean" / "report.json").read_text())
    assert ledger["input"] == ledger["kept"] + sum(ledger["rejected"].values())
    assert ledger["kept"] >= 120 and ledger["parts"] > ledger["kept"] and len(ledger["rejected"]) >= 8
    page = (out / "report.html").read_text()
    assert "What is gradient checkpointing?" in page and "<script src" not in page
    assert "conversations in" in printed


def test_the_demo_says_what_to_do_next(demo):
    """With commands that exist: `fastft chat` with the model that is there, and training with options of the parser."""
    out, printed = demo
    last = printed[printed.index("Talk to it:") :]
    assert f"fastft chat --model {out}/model" in last
    for command in ("fastft clean", "fastft estimate", "torchrun"):
        assert command in last
    options = set(re.findall(r"--([a-z_]+) ", last)) - {"model", "max_tokens"}
    from helpers.options import valid_keys

    from fastft.config import TrainConfig

    assert options <= {*valid_keys(TrainConfig), "nproc"}


def test_a_directory_of_something_else_is_never_replaced(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert main(["demo", "--output_dir", str(tmp_path / "mine")]) == 1
    assert "was not made by the demo; choose another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_the_demos_options(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == {"output_dir": "runs/demo"}
    assert main(["demo", "--output_dri", "x"]) == 2
    assert "the nearest valid one is 'output_dir'" in capsys.readouterr().err
