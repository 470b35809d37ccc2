"""Reading a run's data: what is left out and said, with no process group, as when a price is estimated."""

import json
import logging

import numpy as np
import pytest
import torch.distributed as dist

from fastft.config import SourceConfig, TrainConfig
from fastft.data.dataset import fit_to_seq_len, load_data, tokenized
from fastft.data.step_plan import plan_stage
from fastft.data.template.chat_template import load_template
from fastft.errors import UserError


@pytest.fixture(scope="module")
def template(ground):
    return load_template(str(ground / "model"))


def config(ground, **options) -> TrainConfig:
    return TrainConfig(
        model=str(ground / "model"),
        data=str(ground / "data.jsonl"),
        output_dir="unused",
        global_batch_size=4,
        **options,
    )


def test_data_is_loaded_without_a_process_group_and_what_is_left_out_is_said(ground, template, caplog, monkeypatch):
    # Another test may have left its process group in this process, so that one joined here is caught as it is made.
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("joined a process group"))
    path = str(ground / "data.jsonl")
    whole = tokenized(path, template)
    limit = int(np.median(whole.lengths))
    with caplog.at_level(logging.INFO, "fastft"):
        kept = load_data(path, template, config(ground, seq_len=limit, overlong="drop"))
    wanted = (whole.lengths <= limit) & (whole.trained_counts > 0)
    assert kept.positions.tolist() == np.flatnonzero(wanted).tolist() and 0 < wanted.sum() < len(wanted)
    [line] = [message for message in caplog.messages if message.startswith("data: ")]
    assert f"{wanted.sum()} conversations, {whole.lengths[wanted].sum():,} tokens" in line
    assert f"left out: {(whole.lengths > limit).sum()} longer than the sequence length" in line


def test_conversations_that_are_too_long_are_refused_with_the_ways_out(ground, template):
    path = str(ground / "data.jsonl")
    with pytest.raises(UserError) as error:
        load_data(path, template, config(ground, seq_len=20, overlong="refuse"))
    assert f"{path}: " in str(error.value) and "longer than the sequence length of 20 tokens" in str(error.value)
    assert all(way in str(error.value) for way in ("--overlong split", "--max_tokens 20", "--overlong drop"))
    assert "\n" not in str(error.value)


def test_a_file_with_nothing_to_train_on_is_refused(tmp_path, template):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "train": False}]
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    whole = tokenized(str(data), template)
    with pytest.raises(
        UserError, match=r"no conversation is left to train on \(3 read, 0 longer .*, 3 without a trained"
    ):
        fit_to_seq_len(whole, 4096, "refuse", str(data))


def test_answers_that_the_file_marks_are_not_trained_and_counted(tmp_path, template, caplog):
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    turns = [ask, {**answer, "label": False}, ask, {**answer, "finish_reason": "length"}, ask, answer]
    records = [{"messages": turns}, {"messages": [ask, answer], "kto_tag": False}, {"messages": [ask, answer]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stage = TrainConfig(model="unused", data="unused", output_dir="unused", seq_len=4096)
    with caplog.at_level(logging.INFO, "fastft"):
        kept = [load_data(str(tmp_path / "data.jsonl"), template, stage) for _ in ("tokenised", "from the cache")]
    one, other = [message for message in caplog.messages if message.startswith("data: ")]
    assert one == other
    assert "2 conversations" in one and "1 without an answer to learn" in one
    assert "learn, 3 answers that the file marks as not to be learned (1 of them as cut); " in one
    learned = [[token for token, trained in zip(kept[1].ids[n], kept[1].trained[n]) if trained] for n in (0, 1)]
    assert learned[0] == learned[1]  # one "hello" of each, and its end of turn


def test_a_file_without_marks_says_nothing_of_them(tmp_path, template, caplog):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "finish_reason": "stop"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns}))
    stage = TrainConfig(model="unused", data="unused", output_dir="unused", seq_len=4096)
    with caplog.at_level(logging.INFO, "fastft"):
        load_data(str(tmp_path / "data.jsonl"), template, stage)
    assert "without an answer to learn; 0 boundaries" in caplog.text


def test_a_stage_is_planned_without_a_process_group(ground, template, caplog):
    """The same steps as the training run's own; without processes to count, none are named."""
    stage = config(ground, seq_len=160, epochs=2, overlong="drop")
    stage.data = [
        SourceConfig(str(ground / "data.jsonl"), weight=0.5),
        SourceConfig(str(ground / "data.jsonl"), epochs=1),
    ]
    again = plan_stage(stage, template)
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastft"):
        plan = plan_stage(stage, template)
    for number in (1, plan.total):
        first, second = plan.step(number), again.step(number)
        assert [row.tolist() for row in first.rows] == [row.tolist() for row in second.rows] and first.rows
    assert plan.step(plan.total).epoch == 1
    [line] = [message for message in caplog.messages if message.startswith("plan: ")]
    assert line.endswith(f"{plan.total} steps of 4 rows") and "rows of 160 tokens (lower bound" in line
