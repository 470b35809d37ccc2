"""RUN/report.html is made from a run's files alone, shows them as they are, and is safe whatever they hold."""

import contextlib
import json
import re
import shutil

import pytest
import yaml
from helpers import models
from helpers import training as runs
from helpers.pages import CHROMIUM, HOSTILE, browse, rows, texts
from lxml import html as lxml_html

from fastft.cli import main
from fastft.common.html import visible
from fastft.config import parse_config, save_config
from fastft.errors import UserError
from fastft.train.report import page as run_page
from fastft.train.report.page import refresh_page, write_run_report


def facts(**changes) -> dict:
    file = {"file": "data.jsonl", "conversations": 1200, "tokens": 98_765, "trained_tokens": 54_321, "weight": 1.0}
    file |= {"epochs": None}
    known = {"id": "c0ffee00", "model": "base", "template": "the tokenizer's own", "end_of_turn": "</s>", "steps": 200}
    known |= {"steps_of_stages": [200], "data": [[file]], "eval_data": [file | {"file": "held.jsonl"}]}
    return known | {"devices": "8 x NVIDIA H100", "versions": {"fastft": "0.1.0", "torch": "2.13.0"}} | changes


def make_run(directory, metrics=None, samples=(), **changes):
    directory.mkdir(exist_ok=True)
    arguments = ["--model", "/somewhere/base", "--data", "/somewhere/data.jsonl", "--output_dir", str(directory)]
    save_config(parse_config([*arguments, "--samples.prompts", "/somewhere/prompts.txt"]), directory / "config.yaml")
    (directory / "run.json").write_text(json.dumps(facts(**changes)))
    metrics = rows(100, 10) if metrics is None else metrics
    more = {"memory_gib": 71.25, "mfu": 0.41, "elapsed_s": 4000.0, "cost": 12.5}
    lines = [row if "eval_loss" in row else row | more for row in metrics]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if samples:
        (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return directory


SAMPLES = [{"step": step, "prompt": "What is 2 + 2?", "answer": f"answer {step}"} for step in (0, 50, 100)]


def page_of(directory) -> str:
    return write_run_report(directory).read_text(encoding="utf-8")


def test_the_page_has_its_pieces(tmp_path):
    page = page_of(make_run(tmp_path / "first", samples=SAMPLES))
    assert texts(page, "//h1") == ["first"]
    assert texts(page, "//h2") == ["Training", "Answers over time", "Data", "Settings", "Files"]
    (lede,) = texts(page, "//*[@class='lede']")
    assert re.match(
        r"base on 8 x NVIDIA H100: step 100 of 200. The training loss went from [\d.]+ to [\d.]+; the held-out loss is [\d.]+",
        lede,
    )
    totals = " ".join(texts(page, "//dl[@class='totals']"))
    for total in ("100 3 epochs", "41.0 %", "71.2 GiB", "$12.50", "1 h 06 min", "10.0 % of positions"):
        assert total in totals.replace("\u00a0", " "), total
    names = ["Loss", "Learning rate", "Gradient norm", "Tokens/s", "MFU", "Rows full", "Memory of a process, GiB"]
    assert texts(page, "//figure//*[@class='name']") == names
    assert texts(page, "//h4") == ["Before training", "After step 50", "After step 100"]
    assert texts(page, "//*[@class='text']") == ["answer 0", "answer 50", "answer 100"]
    assert texts(page, "//table[@class='data']//tbody//tr") == [
        "data.jsonl training 1,200 98,765 54,321 1",
        "held.jsonl held out 1,200 98,765 54,321 –",
    ]
    settings = texts(page, "//dl[@class='settings']/div")
    assert {"model base", "data data.jsonl", "samples.prompts prompts.txt", "optimizer.lr 2e-05"} <= set(settings)
    assert "/somewhere" not in page


def test_a_finished_run_says_so_and_stages_are_named(tmp_path):
    file = facts()["data"][0][0]
    page = page_of(make_run(tmp_path / "run", steps=100, data=[[file], [file | {"weight": 2.5, "epochs": 2}]]))
    assert "all 100 steps are done" in texts(page, "//*[@class='lede']")[0]
    assert texts(page, "//table[@class='data']//tbody//tr")[:2] == [
        "data.jsonl stage 1 1,200 98,765 54,321 1",
        "data.jsonl stage 2, 2 epochs 1,200 98,765 54,321 2.5",
    ]
    assert "Answers over time" not in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = page_of(make_run(tmp_path / "run", metrics=[]))
    assert "Nothing was trained" in page and "step 0 of 200" in page


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_reaches_the_page_unescaped(tmp_path, text):
    file = facts()["data"][0][0] | {"file": text}
    changes = {"model": text, "template": text, "devices": text, "data": [[file]], "versions": {text: text}}
    samples = [{"step": 0, "prompt": text, "answer": text}]
    plain = lxml_html.fromstring(page_of(make_run(tmp_path / "plain", samples=SAMPLES)))
    page = page_of(make_run(tmp_path / "run", samples=samples, **changes))
    hostile = lxml_html.fromstring(page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)
    assert {e.tag for e in hostile.iter()} <= {e.tag for e in plain.iter()} | {"code"}
    assert len(hostile.xpath("//script")) == 1
    assert not [name for e in hostile.iter() for name in e.attrib if name.startswith("on")]
    assert hostile.xpath("//h3")[0].text_content() == visible(text)


def test_the_verb_makes_it_again_from_a_real_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    models.make_model(tmp_path / "model")
    models.make_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    stages = [{"data": str(tmp_path / "data.jsonl"), "max_steps": 2}, {"data": str(tmp_path / "data.jsonl")}]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": stages, "epochs": 1}))
    arguments = ["--config", str(tmp_path / "stages.yaml"), "--model", str(tmp_path / "model"), "--seq_len", "160"]
    assert main(["train", *arguments, "--output_dir", str(run), "--global_batch_size", "4"]) == 0
    written = (run / "report.html").read_text()
    assert {"model", "metrics.jsonl", "checkpoints"} <= set(texts(written, "//table[@class='files']//th"))
    assert [line[:21] for line in texts(written, "//table[@class='data']//tbody//tr")] == [
        "data.jsonl stage 1 21",
        "data.jsonl stage 2 21",
    ]
    assert str(tmp_path) not in written
    (run / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    without_date = re.compile(r"<time.*?</time>")
    assert without_date.sub("", (run / "report.html").read_text()) == without_date.sub("", written)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    for directory, says in ((tmp_path / "gone", "no such directory"), (tmp_path, "is no run of fastft train")):
        assert main(["report", str(directory)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {directory}: {says}")


def without(key: str) -> dict:
    """The facts of a run without one of them."""
    return {name: value for name, value in facts().items() if name != key}


FILE = facts()["data"][0][0]


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        *map(without, facts()),
        facts(steps="200"),
        facts(versions=["0.1.0"]),
        facts(data=[FILE]),
        facts(data=[[FILE, 5]]),
        facts(eval_data=[{name: value for name, value in FILE.items() if name != "epochs"}]),
        facts(eval_data=[FILE | {"tokens": None}]),
    ],
)
def test_facts_that_are_not_whole_are_one_line(damaged, tmp_path, capsys):
    """All of them, and not only those that were thought of first: the page and the model card need each."""
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps(damaged))
    assert main(["report", str(run)]) == 1
    assert f"{run / 'run.json'}: is damaged; start the same training command again" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    models.make_model(tmp_path / "model")
    models.make_data(tmp_path / "data.jsonl")
    (tmp_path / "out" / "report.html" / "in the way").mkdir(parents=True)
    done = runs.train_here(tmp_path, tmp_path / "out", "--max_steps", "1")
    assert done.returncode == 0 and "report.html could not be written" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    samples = [{"step": 0, "prompt": text, "answer": text} for text in HOSTILE]
    dom, complaints = browse(tmp_path, page_of(make_run(tmp_path / "run", samples=samples)))
    assert complaints == [] and "Answers over time" in dom
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@pytest.mark.parametrize(
    "error, goes_on",
    [
        (PermissionError(13, "Permission denied", "/x"), True),
        (UserError("no"), True),
        (FileNotFoundError(2, "x"), False),
    ],
)
def test_a_page_that_the_disk_refuses_does_not_end_a_run_but_a_bug_does(tmp_path, monkeypatch, error, goes_on):
    def fails(directory):
        raise error

    monkeypatch.setattr(run_page, "write_run_report", fails)
    with contextlib.nullcontext() if goes_on else pytest.raises(type(error)):
        refresh_page(tmp_path)
