"""Adapters: what is trained is what is exported, on any number of processes, and after an interruption."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import models
from helpers import training as runs
from safetensors.torch import load_file

from fastft.train.report.metrics import read_metrics

peft = pytest.importorskip("peft")

LORA = ("--lora.r", "8", "--checkpoint.every", "5")


@pytest.fixture(scope="module")
def lora_ground(ground, tmp_path_factory):
    """As `ground`, with logits that adapters can move although the head is frozen."""
    path = tmp_path_factory.mktemp("large_logits")
    models.make_model(path / "model", initializer_range=0.3)
    (path / "data.jsonl").symlink_to(ground / "data.jsonl")
    return path


@pytest.fixture(scope="module")
def whole_run(lora_ground, tmp_path_factory):
    """An uninterrupted run with adapters."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(lora_ground, out)
    return out


def run(ground: Path, out: Path, *flags: str) -> None:
    done = runs.train_here(ground, out, "--eval_data", str(ground / "data.jsonl"), "--epochs", "4", *LORA, *flags)
    assert done.returncode == 0, done.stderr


def eval_loss(out: Path) -> float:
    return [r["eval_loss"] for r in read_metrics(out / "metrics.jsonl") if "eval_loss" in r][-1]


def from_pretrained(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_adapters_learn_and_are_exported_alone_and_merged(lora_ground, whole_run):
    losses = [loss for _, loss, _ in runs.losses(whole_run)]
    assert losses[-1] < 0.8 * losses[0]
    base = from_pretrained(lora_ground / "model")
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with_adapter = peft.PeftModel.from_pretrained(base, whole_run / "adapter")
    merged = from_pretrained(whole_run / "model")
    assert eval_loss(whole_run) == pytest.approx(runs.plain_loss(with_adapter, lora_ground), rel=1e-5)
    assert eval_loss(whole_run) == pytest.approx(runs.plain_loss(merged, lora_ground), rel=1e-5)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, frozen[name]) == ("_proj" not in name), name
    # In fp64, so that what differs is the rounding of the merged weights and no processor's sums.
    words = torch.arange(100)[None]
    torch.testing.assert_close(with_adapter.double()(words).logits, merged.double()(words).logits, rtol=1e-4, atol=1e-5)


def test_checkpoints_hold_adapters_and_their_moments_only(whole_run):
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = sorted((whole_run / "checkpoints").glob("step-*"))[-1]
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert sum(name.startswith("model.") for name in names) == 2 * 7 * 2  # A and B of 7 layers in 2 blocks
    assert all(".lora_" in name or "param_groups" in name for name in names)


def test_a_resumed_run_is_bit_identical(lora_ground, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "out")
    for name in ("model", "adapter", f"checkpoints/{(out / 'checkpoints' / 'latest').read_text().strip()}"):
        shutil.rmtree(out / name)
    run(lora_ground, out)
    assert runs.losses(out) == runs.losses(whole_run)
    for name, tensor in adapter(whole_run).items():
        assert torch.equal(tensor, adapter(out)[name]), name


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_checkpoint_is_exported_merged_as_the_trainer_does(lora_ground, whole_run, tmp_path, quantize):
    from fastft.cli import main

    out = whole_run
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
        out = tmp_path / "run"
        run(lora_ground, out, "--lora.quantize", "nf4")
    first, *_, last = sorted((out / "checkpoints").glob("step-*"))
    for path in (first, last):
        assert main(["export", str(path), str(tmp_path / path.name)]) == 0
    trained = runs.weights(out)
    exported, earlier = (load_file(tmp_path / path.name / "model.safetensors") for path in (last, first))
    assert exported.keys() == earlier.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert all(torch.equal(earlier[name], trained[name]) == ("_proj" not in name) for name in trained)
    assert not (tmp_path / "adapter").exists()
    card = (tmp_path / last.name / "README.md").read_text()
    assert "LoRA of rank 8 on all-linear" in card and "- lora" in card


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(lora_ground, whole_run, tmp_path, quantize):
    one = whole_run
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
        one = tmp_path / "one"
        run(lora_ground, one, "--lora.quantize", "nf4")
        assert runs.losses(one)[0] != runs.losses(whole_run)[0]  # four bits are not the whole weights
        assert eval_loss(one) == pytest.approx(runs.plain_loss(from_pretrained(one / "model"), lora_ground), rel=1e-5)
    options = ("--eval_data", str(lora_ground / "data.jsonl"), "--epochs", "4", *LORA, "--lora.quantize", quantize)
    done = runs.train(lora_ground, tmp_path / "two", *options, processes=2)
    assert done.returncode == 0, done.stderr
    for (_, loss, norm), (_, other, other_norm) in zip(runs.losses(one), runs.losses(tmp_path / "two"), strict=True):
        assert loss == pytest.approx(other, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)
    assert adapter(one).keys() == adapter(tmp_path / "two").keys()


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma2", "phi3", "mixtral"])
def test_adapters_fit_other_architectures(lora_ground, tmp_path, family):
    """Tied embeddings, biases, fused projections, experts (which stay as they are)."""
    options = {"mixtral": {"num_local_experts": 3}}
    models.make_model(tmp_path / "model", family, **options.get(family, {}))
    (tmp_path / "data.jsonl").symlink_to(lora_ground / "data.jsonl")
    run(tmp_path, tmp_path / "out", "--max_steps", "3")
    assert eval_loss(tmp_path / "out") == pytest.approx(
        runs.plain_loss(from_pretrained(tmp_path / "out/model"), tmp_path), rel=1e-4
    )


def test_adapters_are_put_on_the_named_targets_alone(lora_ground, tmp_path):
    run(lora_ground, tmp_path / "out", "--max_steps", "2", "--lora.targets", "q_proj, v_proj", "--lora.dropout", "0.1")
    names = adapter(tmp_path / "out")
    assert len(names) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in names)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and config["lora_alpha"] == 32


@pytest.mark.parametrize(
    ("flags", "absent", "says"),
    [
        (["--lora.targets", "q_proj,lm_head"], None, "lora.targets: q_proj,lm_head is not among the linear layers"),
        ([], "peft", 'lora.r: peft is not installed (pip install "fastft[lora]")'),
        (["--lora.quantize", "nf4"], "bitsandbytes", "lora.quantize: nf4 needs bitsandbytes, which is not installed"),
    ],
)
def test_mistakes_are_one_clear_line(lora_ground, tmp_path, monkeypatch, flags, absent, says):
    if absent:
        monkeypatch.setitem(sys.modules, absent, None)
    runs.fails(runs.train_here(lora_ground, tmp_path / "out", *LORA, *flags), says)


def test_another_rank_is_another_run(lora_ground, whole_run):
    options = ("--eval_data", str(lora_ground / "data.jsonl"), "--epochs", "4", *LORA)
    runs.fails(runs.train_here(lora_ground, whole_run, *options, "--lora.r", "4"), "lora.r was 8 and is 4")
