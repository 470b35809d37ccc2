"""Answers over time are those of transformers, on any number of processes, and do not change the training."""

import json
import shutil

import pytest
from helpers import models
from helpers import training as runs

from fastft.cli import main
from fastft.data.conversation import Message
from fastft.data.template.chat_template import load_template
from fastft.train.report.page import answers_over_time

PROMPTS = ["hello there", "the quick <b>brown</b>", '{"prompt": "x"}', json.dumps({"messages": [
    {"role": "system", "content": "be kind"}, {"role": "user", "content": "the lazy dog says hello"}]})]  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    """The flags that ask PROMPTS every fourth step."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS))
    return ["--samples.prompts", str(prompts), "--samples.every", "4", "--samples.max_new_tokens", "9"]


@pytest.fixture(scope="module")
def run(ground, asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    done = runs.train_here(ground, out, "--checkpoint.every", "4", "--checkpoint.keep", "9", *asked)
    assert done.returncode == 0, done.stderr
    return out


def rows(out) -> list[tuple[int, str, str]]:
    lines = (out / "samples.jsonl").read_text().splitlines()
    return [(row["step"], row["prompt"], row["answer"]) for row in map(json.loads, lines)]


def generated(model_dir, messages: list[Message], tokens: int) -> str:
    """The library's own greedy answer, one prompt at a time, with a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    template = load_template(str(model_dir))
    ids = torch.tensor([template.encode_prompt(messages)])
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=template.stop_token_ids)
    return template.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("step", [0, 4, 9])
def test_the_answers_are_those_of_generate(ground, run, tmp_path, step):
    said = [answer for at, _, answer in rows(run) if at == step]
    if step == 0:
        model = ground / "model"
    else:
        model = tmp_path / "model"
        assert main(["export", str(run / "checkpoints" / f"step-{step:08d}"), str(model)]) == 0
    prompts = [[Message("user", text)] for text in (*PROMPTS[:2], "x")]
    prompts += [[Message("system", "be kind"), Message("user", "the lazy dog says hello")]]
    assert said == [generated(model, messages, 9) for messages in prompts]


def test_they_are_asked_at_the_start_on_the_way_and_at_the_end(run):
    assert [step for step, _, _ in rows(run)] == [step for step in (0, 4, 8, 9) for _ in PROMPTS]
    assert [text for step, text, _ in rows(run) if step == 0][2:] == [
        "x",
        "[system] be kind\n\nthe lazy dog says hello",
    ]


def test_they_do_not_change_the_training(ground, run, tmp_path):
    """Bit for bit."""
    assert runs.train_here(ground, tmp_path / "out").returncode == 0
    assert runs.losses(tmp_path / "out") == runs.losses(run)
    for name, tensor in runs.weights(run).items():
        assert tensor.equal(runs.weights(tmp_path / "out")[name]), name


def test_they_do_not_change_dropout(ground, asked, tmp_path):
    models.make_model(tmp_path / "model", attention_dropout=0.3)
    shutil.copy(ground / "data.jsonl", tmp_path / "data.jsonl")
    more = ["--max_steps", "4"]
    assert runs.train_here(tmp_path, tmp_path / "without", *more).returncode == 0
    assert runs.train_here(tmp_path, tmp_path / "with", *more, *asked, "--samples.every", "1").returncode == 0
    assert runs.losses(tmp_path / "with") == runs.losses(tmp_path / "without")
    models.make_model(tmp_path / "model", attention_dropout=0.0)
    assert runs.train_here(tmp_path, tmp_path / "plain", *more).returncode == 0
    assert runs.losses(tmp_path / "plain") != runs.losses(tmp_path / "without"), "nothing was dropped"


@pytest.mark.slow
def test_two_processes_say_the_same_and_their_checkpoints_are_exported_by_one(ground, run, asked, tmp_path):
    out = tmp_path / "out"
    done = runs.train(ground, out, "--checkpoint.every", "4", *asked, processes=2)
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(run)
    assert main(["export", str(out), str(tmp_path / "model")]) == 0
    ours = runs.load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in runs.weights(out).items():
        assert tensor.equal(ours[name]), name


def test_after_an_interruption_there_is_one_curve(ground, run, asked, tmp_path):
    out = shutil.copytree(run, tmp_path / "out")
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000009")
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    assert runs.train_here(ground, out, "--checkpoint.every", "4", *asked).returncode == 0
    assert rows(out) == rows(run)
    facts, whole = (json.loads((directory / "run.json").read_text()) for directory in (out, run))
    assert facts.pop("earlier_s") > whole.pop("earlier_s") == 0  # what the earlier start took
    assert facts == whole


def test_answers_are_thinned_out_evenly_and_the_last_is_kept():
    samples = [{"step": step, "prompt": p, "answer": f"{p}{step}"} for step in range(0, 101, 10) for p in "ab"]
    (first, answers), (second, _) = answers_over_time(samples)
    assert (first, second) == ("a", "b")
    assert answers == [(step, f"a{step}") for step in (0, 20, 40, 60, 80, 100)]
    assert answers_over_time(samples[:2]) == [("a", [(0, "a0")]), ("b", [(0, "b0")])]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\xff\xfe", "cannot be read"),
        (b'fine\n{"prompt": 7}', "line 2, message 1: its content is a number, not text"),
        (b'{"messages": []}', "line 1: its messages do not end"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: its messages do not end"),
        (b'{"question": "x"}', "line 1: is no JSON object with prompt or messages"),
        (b'{"prompt": "x"', "line 1: is no JSON object with prompt or messages"),
        (b"word " * 200, "more than the sequence length of 160; shorten it, or lower samples.max_new_tokens"),
    ],
)
def test_mistakes_are_one_clear_line(ground, tmp_path, content, says):
    (tmp_path / "prompts.txt").write_bytes(content)
    more = ["--samples.prompts", str(tmp_path / "prompts.txt"), "--samples.max_new_tokens", "8"]
    runs.fails(runs.train_here(ground, tmp_path / "out", *more), f"samples.prompts: {tmp_path / 'prompts.txt'}", says)


def test_a_file_that_is_not_there_is_one_clear_line(ground, tmp_path):
    runs.fails(runs.train_here(ground, tmp_path / "out", "--samples.prompts", "./nowhere"), "./nowhere: cannot be read")


# Dry run -------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_plan_memory_and_price_and_writes_nothing(ground, tmp_path):
    done = runs.train_here(ground, tmp_path / "out", "--dry_run", "true", "--price_per_hour", "36000")
    assert done.returncode == 0, done.stderr
    for says in ("plan: 10 rows of 160 tokens", "step 2 of 2, the 4 fullest rows", "GiB", "9 steps", ", $"):
        assert says in done.stderr, says
    assert not (tmp_path / "out").exists()


def test_a_dry_run_leaves_a_run_alone_whatever_its_settings(ground, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = runs.train_here(ground, run, "--dry_run", "true", "--seq_len", "200")
    assert done.returncode == 0 and "nothing was written" in done.stderr, done.stderr
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_the_fullest_step_has_the_rows_with_most_tokens(ground):
    from fastft.data.dataset import tokenized
    from fastft.data.step_plan import Curriculum, StepPlan, fullest_step

    data = tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    wide, narrow = (StepPlan(data, window, 0, 1, 4, None) for window in (200, 140))
    step = fullest_step(Curriculum([narrow, wide]), 3)
    sums = sorted((int(wide.lengths[row].sum()) for row in wide.rows(0)), reverse=True)
    assert step.stage == 1 and [int(wide.lengths[row].sum()) for row in step.rows] == sums[:3]
