"""Several files in one run: mixtures by weight, stages one after the other, conversations split to fit a row."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import flags, here, losses, train_here

from fastft.data.batch import ahead, rank_batches
from fastft.data.dataset import Source, TokenizedData, mixed, tokenized
from fastft.data.step_plan import Curriculum, StepPlan
from fastft.data.template.chat_template import load_template


def counted(data: TokenizedData, epochs: int) -> list[list[int]]:
    """How often each conversation is used, by epoch."""
    plan = StepPlan(data, 64, 0, epochs, 4, None)
    rows = [[int(c) for row in plan.rows(epoch) for c in row] for epoch in range(epochs)]
    return [[row.count(c) for c in range(len(data.ids))] for row in rows]


def without_data(arguments: list[str]) -> list[str]:
    """The arguments of a run whose --config names its data."""
    at = arguments.index("--data")
    return arguments[:at] + arguments[at + 2 :]


def some(count: int, path: str) -> TokenizedData:
    ids = [np.arange(5 + i, dtype=np.int32) for i in range(count)]
    trained = [np.ones(len(each), bool) for each in ids]
    return TokenizedData(ids, trained, np.arange(count), 0, 0, {}, [Source(path, count)])


def test_weights_are_times_an_epoch_and_fractions_take_turns():
    data = mixed([some(10, "a"), some(8, "b"), some(4, "c")], [1.0, 2.25, 1.0], [None, None, 2])
    epochs = counted(data, 4)
    assert all(row[:10] == [1] * 10 for row in epochs)
    assert all(sorted(row[10:18]) == [2] * 6 + [3] * 2 for row in epochs)
    assert np.sum(epochs, axis=0)[10:18].tolist() == [9] * 8  # in four epochs each had its turn
    assert [row[18:] for row in epochs] == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("weight", "totals"), [(0.02, [1, 1, 2, 2, 3]), (0.1, [3, 5, 7, 9, 11]), (1.1, [24, 47, 70, 93, 116])]
)
def test_fractions_of_a_conversation_add_up(weight, totals):
    """If each epoch were rounded by itself, 0.02 times 21 would never train on one."""
    epochs = counted(mixed([some(21, "a")], [weight], [None]), 10)
    assert np.cumsum([sum(row) for row in epochs])[:5].tolist() == totals
    assert np.sum(epochs, axis=0).sum() == np.ceil(round(210 * weight, 9))


def test_a_weight_near_nothing_trains_on_something(ground, tmp_path):
    """There is never a run of no steps, which would export the model that it was given."""
    (tmp_path / "run.yaml").write_text(f"data: [{{path: {ground / 'data.jsonl'}, weight: 0.01}}]\n")
    done = here(["train", *without_data(flags(ground, tmp_path / "out", "--config", str(tmp_path / "run.yaml")))])
    assert done.returncode == 0 and "plan: 1 rows" in done.stderr and "done: 1 steps" in done.stderr, done.stderr
    assert len(losses(tmp_path / "out")) == 1


def test_a_single_file_is_no_mixture():
    data = some(10, "a")
    assert mixed([data], [1.0], [None]).sources == data.sources
    assert mixed([data], [2.0], [None]).sources != data.sources


def test_stages_are_numbered_through():
    stages = [StepPlan(some(30, "a"), 64, 0, 2, 3, None), StepPlan(some(40, "b"), 64, 0, 1, 3, 2)]
    curriculum = Curriculum(stages)
    found = [
        (s.stage, s.number, s.epoch, s.data.sources[0].path)
        for s in map(curriculum.step, range(1, curriculum.total + 1))
    ]
    assert [(stage, number) for stage, number, _, _ in found] == [
        (stage, n) for stage, plan in enumerate(stages) for n in range(1, plan.total + 1)
    ]
    assert found[-1] == (1, 2, 0, "b") and stages[1].total == 2


def staged(ground: Path, tmp_path: Path) -> list[str]:
    """Flags of a run of two stages, the second a mixture: epochs end after steps 3, 5 (the stage), 7, 9 and 11."""
    data = ground / "data.jsonl"
    (tmp_path / "stages.yaml").write_text(
        f"stages:\n  - {{data: {data}, epochs: 2, max_steps: 5}}\n"
        f"  - {{data: [{{path: {data}, weight: 0.5}}], epochs: 4, max_steps: 7, lr: 1.0e-3, schedule: {{name: wsd}}}}\n"
    )
    return ["--config", str(tmp_path / "stages.yaml")]


@pytest.mark.slow
def test_cut_at_any_step_a_run_of_stages_goes_on_bit_for_bit(ground, tmp_path):
    def run(out: Path, *more: str) -> None:
        done = here(["train", *without_data(flags(ground, out, *staged(ground, tmp_path), *more))])
        assert done.returncode == 0, done.stderr

    whole = tmp_path / "whole"
    run(whole, "--checkpoint.every", "1", "--checkpoint.keep", "99")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [(r["step"], r["stage"]) for r in rows if "loss" in r] == [(n, 1 if n <= 5 else 2) for n in range(1, 13)]
    for cut in range(1, 12):
        part = tmp_path / f"cut{cut}"
        shutil.copytree(whole / "checkpoints" / f"step-{cut:08d}", part / "checkpoints" / f"step-{cut:08d}")
        run(part, "--checkpoint.every", "0")
        assert losses(part) == losses(whole), cut  # a checkpoint carries the curve up to it
        assert (part / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes(), cut


def test_a_change_is_named_and_can_be_meant(ground, tmp_path):
    out = tmp_path / "out"
    assert train_here(ground, out, "--max_steps", "2").returncode == 0
    changes = ("--optimizer.lr", "3e-4", "--max_steps", "3")
    refused = train_here(ground, out, *changes)
    assert refused.returncode == 1 and "--allow_change true" in refused.stderr
    assert "another run (max_steps was 2 and is 3; lr was 0.01 and is 0.0003);" in refused.stderr
    meant = train_here(ground, out, *changes, "--allow_change", "true")
    assert meant.returncode == 0 and "changed: lr was" in meant.stderr


def test_data_and_templates_that_changed_are_named(ground, tmp_path):
    """A file may have another name, but no other contents; a template is told from a tokenizer."""
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    shutil.copy(ground / "data.jsonl", data)

    def run(*more: str):
        return here(["train", *without_data(flags(ground, out, "--data", str(data), "--seq_len", "400", *more))])

    assert run("--max_steps", "1").returncode == 0

    def refused(*more: str) -> str:
        done = run("--max_steps", "2", "--checkpoint.every", "0", *more)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line[line.index("another run (") : line.index("); use another")]

    data = data.rename(tmp_path / "moved.jsonl")
    assert refused() == "another run (max_steps was 1 and is 2"
    data.write_bytes(data.read_bytes().replace(b"fox", b"cat"))
    assert "data: the contents of moved.jsonl are not those that data.jsonl had" in (said := refused())
    assert "template" not in said and "tokenizer" not in said and "stages" not in said
    assert "template was" in (said := refused("--template", "vicuna")) and "tokenizer" not in said


def test_fewer_steps_than_are_done_are_refused(ground, tmp_path):
    """Otherwise the weights of step 3 would be exported with a card for step 2."""
    out = tmp_path / "out"
    assert train_here(ground, out, "--max_steps", "3").returncode == 0
    done = train_here(ground, out, "--max_steps", "2", "--allow_change", "true")
    assert done.returncode == 1 and "step 3 is done, and these settings end with step 2" in done.stderr


def test_longer_conversations_are_split_on_the_way(ground):
    template = load_template(str(ground / "model"))
    data = tokenized(str(ground / "data.jsonl"), template)
    seq_len = int(np.sort(data.lengths)[-3]) - 1
    split = tokenized(str(ground / "data.jsonl"), template, seq_len)
    assert split.lengths.max() <= seq_len < data.lengths.max()
    assert split.trained_counts.sum() >= data.trained_counts.sum() - 3 and split.lost_rounds == 0
    assert set(split.positions) == set(range(len(data.ids)))


def test_batches_built_ahead_are_those_of_the_steps():
    curriculum = Curriculum([StepPlan(some(30, "a"), 64, 0, 2, 3, None)])
    steps = [curriculum.step(n) for n in range(1, curriculum.total + 1)]
    make = lambda step: list(rank_batches(step, 0, 1, 3, 64, curriculum.max_per_row))  # noqa: E731
    found = list(ahead(iter(steps), make))
    assert [step.number for step, _ in found] == [step.number for step in steps]
    for step, batches in found:
        for mine, theirs in zip(batches, make(step)):
            assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.cu_seqlens, theirs.cu_seqlens)
    assert len({batch.cu_seqlens.shape for _, batches in found for batch in batches}) == 1
