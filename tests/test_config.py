"""The configuration: YAML and flags say the same, mistakes are one line that names the key."""

import pytest
import yaml

from fastft.config import TrainConfig, parse_config, save_config, valid_keys

REQUIRED = ["--model", "m", "--data", "d", "--output_dir", "o"]


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model": "m", "data": "d", "output_dir": "o", "optimizer": {"lr": 1e-3}, "window": 512})
    )
    config = parse_config(["--config", str(path), "--window", "1024", "--schedule.name", "linear"])
    assert (config.optimizer.lr, config.window, config.schedule.name) == (1e-3, 1024, "linear")


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
        (["--windw", "1"], "unknown key 'windw'; the nearest valid one is 'window'"),
        (["--optimizer.learning_rate", "1"], "unknown key 'optimizer.learning_rate'"),
        (["--optimzer.lr", "1"], "the nearest valid one is 'optimizer.lr'"),
        (["--window", "big"], "window: expected int, got 'big'"),
        (
            ["--schedule.name", "cos"],
            "schedule.name: expected one of ['cosine', 'linear', 'constant', 'wsd'], got 'cos'",
        ),
        (["--window", "0"], "window: 0 is not 1 or more"),
        (["--optimizer.lr", ".inf"], "optimizer.lr: inf is not above 0 and finite"),
        (["--optimizer.betas", "[0.9,1.5]"], "optimizer.betas: (0.9, 1.5) is not from 0 up to, not with, 1"),
        (["--seed", "-1"], "seed: -1 is not between 0 and"),
        (["--schedule.min_ratio", "2"], "schedule.min_ratio: 2.0 is not between 0 and 1"),
        (["--z_loss", "-1"], "z_loss: -1.0 is not 0 or more and finite"),
        (["--max_bad_steps", "0"], "max_bad_steps: 0 is not 1 or more"),
        (["--float8", "true"], "float8: without compile it is slower than bf16; add --compile true"),
        (
            ["--optimizer.name", "adamw_8bit", "--optimizer.state_dtype", "bfloat16"],
            "optimizer.state_dtype: adamw_8bit has moments of its own",
        ),
        (["--config", "/nowhere.yaml"], "File does not exist: '/nowhere.yaml'"),
    ],
)
def test_mistakes_are_one_line(flags, says):
    with pytest.raises(ValueError) as caught:
        parse_config([*REQUIRED, *flags])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["model: [a", "optimizer: {lrr: 1}", "optimzer: {lr: 1}", "window: {a: 1}", "optimizer: null", "schedule: cosine"],
)
def test_mistakes_in_yaml_are_one_line(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        parse_config([*REQUIRED, "--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(caught.value)


def test_missing_required_keys_are_named():
    with pytest.raises(ValueError, match="data, output_dir"):
        parse_config(["--model", "m"])


def test_keys_are_the_fields_names():
    named = """model data eval_data output_dir template window epochs max_steps global_batch_size micro_batch_size seed
    optimizer.name optimizer.state_dtype optimizer.lr optimizer.weight_decay optimizer.betas schedule.name
    schedule.warmup_ratio schedule.decay_ratio schedule.min_ratio max_grad_norm z_loss max_bad_steps float8
    gradient_checkpointing attention compile checkpoint.every checkpoint.keep log_every eval_every""".split()
    assert set(named) <= set(valid_keys(TrainConfig))
