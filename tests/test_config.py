"""The configuration: YAML and flags say the same, mistakes are one line that names the key."""

import re

import pytest
import yaml
from helpers.options import valid_keys

from fastft.config import TrainConfig, parse_config, save_config, stages_of
from fastft.errors import UserError

REQUIRED = ["--model", "m", "--data", "d", "--output_dir", "o"]


def test_the_command_line_overrides_the_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model": "m", "data": "d", "output_dir": "o", "optimizer": {"lr": 1e-3}, "seq_len": 512})
    )
    config = parse_config(["--config", str(path), "--seq_len", "1024", "--schedule.name", "linear"])
    assert (config.optimizer.lr, config.seq_len, config.schedule.name) == (1e-3, 1024, "linear")


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{model: m, data: d, output_dir: o, optimizer: {lr: 2e-5}}")
    assert parse_config(["--config", str(path)]).optimizer.lr == 2e-5


def test_saved_config_reads_back_equal(tmp_path):
    config = parse_config([*REQUIRED, "--optimizer.betas", "[0.9,0.95]", "--eval_data", "e", "--compile", "true"])
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seq_ln", "1"], "unknown key 'seq_ln'; the nearest valid one is 'seq_len'"),
        (
            ["--optimizer.learning_rate", "1"],
            "unknown key 'optimizer.learning_rate'; the nearest valid one is 'optimizer.lr'",
        ),
        (["--learning_rate", "1"], "the nearest valid one is 'optimizer.lr'"),
        (["--warmup_ratio", "1"], "the nearest valid one is 'schedule.warmup_ratio'"),
        (["--zzqqxxyy", "1"], "unknown key 'zzqqxxyy'; --help lists all"),
        (["--optimzer.lr", "1"], "the nearest valid one is 'optimizer.lr'"),
        (["--seq_len", "big"], "seq_len: expected a whole number, got 'big'"),
        (
            ["--schedule.name", "cos"],
            "schedule.name: expected one of cosine, linear, constant, wsd, got 'cos'",
        ),
        (["--seq_len", "0"], "seq_len: 0 is not 1 or more"),
        (["--optimizer.lr", ".inf"], "optimizer.lr: inf is not above 0 and finite"),
        (["--optimizer.betas", "[0.9,1.5]"], "optimizer.betas: (0.9, 1.5) is not at least 0 and below 1"),
        (["--seed", "-1"], "seed: -1 is not between 0 and"),
        (["--schedule.min_ratio", "2"], "schedule.min_ratio: 2.0 is not between 0 and 1"),
        (["--z_loss", "-1"], "z_loss: -1.0 is not 0 or more and finite"),
        (["--trackers", "tensorboard,wandbb"], "trackers: 'wandbb' is not one of tensorboard, wandb, trackio, none"),
        (["--price_per_hour", "-1"], "price_per_hour: -1.0 is not 0 or more and finite"),
        (["--samples.every", "0"], "samples.every: 0 is not 1 or more"),
        (["--max_bad_steps", "0"], "max_bad_steps: 0 is not 1 or more"),
        (["--float8", "true"], "float8: without compile it is slower than bf16; add --compile true"),
        (
            ["--float8", "true", "--compile", "true", "--seq_len", "1000", "--micro_batch_size", "3"],
            "float8: seq_len x micro_batch_size is",
        ),
        (
            ["--optimizer.name", "adamw_8bit", "--optimizer.state_dtype", "bfloat16"],
            "optimizer.state_dtype: adamw_8bit has moments of its own",
        ),
        (["--config", "/nowhere.yaml"], "config: /nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(flags, says):
    with pytest.raises(UserError) as caught:
        parse_config([*REQUIRED, *flags])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["model: [a", "optimizer: {lrr: 1}", "optimzer: {lr: 1}", "window: {a: 1}", "optimizer: null", "schedule: cosine"],
)
def test_mistakes_in_yaml_are_one_line(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_config([*REQUIRED, "--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(caught.value)


def test_missing_required_keys_are_named():
    with pytest.raises(UserError, match="output_dir"):
        parse_config(["--model", "m"])


def test_keys_are_the_fields_names():
    named = """model data eval_data output_dir template seq_len epochs max_steps global_batch_size micro_batch_size seed
    optimizer.name optimizer.state_dtype optimizer.lr optimizer.weight_decay optimizer.betas schedule.name
    schedule.warmup_ratio schedule.decay_ratio schedule.min_ratio max_grad_norm z_loss max_bad_steps float8
    gradient_checkpointing attention compile checkpoint.every checkpoint.keep log_every eval_every""".split()
    assert set(named) <= set(valid_keys(TrainConfig))


def test_every_key_has_a_text_in_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)]
    assert len(entries) > len(valid_keys(TrainConfig))
    bare = [entry for entry in entries if re.match(r"--[\w.]+ \S+(, --[\w.]+\+ \S+)? \((required, )?type:", entry)]
    assert not bare


STAGES = """
model: m
output_dir: o
stages:
  - data: a.jsonl
    epochs: 2
    lr: 1.0e-5
  - data:
      - {path: b.jsonl, weight: 0.5}
      - {path: c.jsonl, epochs: 1}
    max_steps: 7
    schedule: {name: wsd}
"""


def test_stages_take_what_they_do_not_say_from_the_run(tmp_path):
    (tmp_path / "run.yaml").write_text(STAGES)
    config = parse_config(["--config", str(tmp_path / "run.yaml"), "--optimizer.lr", "3e-5"])
    first, second = stages_of(config)
    assert (first.data, first.epochs, first.optimizer.lr, first.schedule.name) == ("a.jsonl", 2, 1e-5, "cosine")
    assert (second.epochs, second.max_steps, second.optimizer.lr, second.schedule.name) == (3, 7, 3e-5, "wsd")
    assert [(s.path, s.weight, s.epochs) for s in second.data] == [("b.jsonl", 0.5, None), ("c.jsonl", 1.0, 1)]
    save_config(config, tmp_path / "saved.yaml")
    assert parse_config(["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--data", "x", "--stages", "[{data: a}]"], "not both"),
        ([], "data"),
        (
            ["--stages", "[{data: a, epoch: 3}]"],
            "unknown key 'stages.0.epoch'; the nearest valid one is 'stages.0.epochs'",
        ),
        (
            ["--stages", "[{data: [{path: a, weigth: 3}]}]"],
            "unknown key 'stages.0.data.0.weigth'; the nearest valid one is 'stages.0.data.0.weight'",
        ),
        (["--stages", "[{data: a, schedule: {nam: wsd}}]"], "the nearest valid one is 'stages.0.schedule.name'"),
        (
            ["--stages", "[{data: a}]", "--stages.0.epochs", "3"],
            "0.epochs: entries of a list have no options of their own",
        ),
        (["--stages", "[{data: a, epochs: 0}]"], "epochs"),
        (["--data", "[{path: a, weight: 0}]"], "weight"),
        (["--stages", "[{data: a}]", "--max_steps", "2"], "max_steps in its stages"),
    ],
)
def test_stages_and_mixtures_that_cannot_be(argv, named):
    with pytest.raises(UserError, match=named) as caught:
        stages_of(parse_config(["--model", "m", "--output_dir", "o", *argv]))
    assert "\n" not in str(caught.value)
