"""Optimizer, schedule, clipping and skipped steps: against plain arithmetic, alone and in whole runs.

The tests of 8-bit moments need torchao and say so when it is missing: pip install "fastft[torchao]".
"""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import clipping, models
from helpers.training import HERE, command, fails, flags, losses, run, train_here, weights
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.config import OptimizerConfig, ScheduleConfig, TrainConfig
from fastft.data.dataset import Source, TokenizedData, conversation_names
from fastft.train.optim import build_optimizer, clip_gradients, learning_rate, parameter_groups, update
from fastft.train.report.metrics import read_metrics


def config(**options) -> TrainConfig:
    return TrainConfig("model", "data", "out", **options)


# The schedule ------------------------------------------------------------------------------------------------------------

schedules = st.builds(
    ScheduleConfig,
    st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup_ratio=st.floats(0, 1),
    decay_ratio=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
)


@given(schedules, st.integers(1, 300))
def test_every_schedule_rises_to_the_peak_and_falls_to_its_minimum(schedule, total):
    peak = 3e-4
    rates = [
        learning_rate(config(schedule=schedule, optimizer=OptimizerConfig(lr=peak)), n, total)
        for n in range(1, total + 1)
    ]
    warmup = math.ceil(schedule.warmup_ratio * total)
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(0 < rate <= peak for rate in rates)
    assert rising == sorted(rising) and (not rising or rising[-1] == peak)
    assert falling == sorted(falling, reverse=True)
    floor = peak if schedule.name == "constant" else peak * schedule.min_ratio
    assert all(rate >= floor * (1 - 1e-12) for rate in falling)
    if schedule.name == "constant":
        assert all(rate == peak for rate in falling)


@given(schedules, st.integers(2, 300))
def test_the_step_after_the_last_would_be_at_the_minimum(schedule, total):
    assume(schedule.name != "constant" and schedule.warmup_ratio < 0.9)
    settings = config(schedule=schedule)
    minimum = settings.optimizer.lr * schedule.min_ratio
    assert learning_rate(settings, total + 1, total) == pytest.approx(minimum, abs=1e-18)


@given(st.integers(10, 300), st.floats(0, 0.5), st.floats(0.01, 0.5))
def test_wsd_keeps_the_peak_until_its_decay(total, warmup_ratio, decay_ratio):
    settings = config(schedule=ScheduleConfig("wsd", warmup_ratio, decay_ratio))
    rates = [learning_rate(settings, n, total) for n in range(1, total + 1)]
    decays = min(math.ceil(decay_ratio * total), total - math.ceil(warmup_ratio * total))
    below = [n for n in range(math.ceil(warmup_ratio * total), total) if rates[n] < settings.optimizer.lr]
    assert len(below) == decays
    for i, n in enumerate(below, 1):
        assert rates[n] == pytest.approx(settings.optimizer.lr * (1 - math.sqrt(i / (decays + 1))))


# Parameters, gradients -----------------------------------------------------------------------------------------------------


def test_matrices_decay_norms_and_biases_do_not():
    layer = nn.ModuleDict({"embed": nn.Embedding(4, 3), "linear": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    layer.experts_bias = nn.Parameter(torch.zeros(2, 3))
    layer.frozen = nn.Linear(3, 3).requires_grad_(False)
    decay, rest = parameter_groups(layer, 0.1)
    names = {p: name for name, p in layer.named_parameters()}
    assert [names[p] for p in decay["params"]] == ["embed.weight", "linear.weight"]
    assert [names[p] for p in rest["params"]] == ["experts_bias", "linear.bias", "norm.weight", "norm.bias"]
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_a_group_that_would_be_empty_is_left_out():
    assert len(parameter_groups(nn.Linear(3, 2, bias=False), 0.1)) == 1
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9])
def test_gradients_are_clipped_to_the_norm_of_all(max_norm):
    model = clipping.layers()
    clipping.backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_gradients(model, max_norm)
    wanted = torch.cat([g.double().flatten() for g in before]).norm()
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    factor = min(1.0, max_norm / wanted.item()) if max_norm else 1.0
    for p, grad in zip(model.parameters(), before):
        torch.testing.assert_close(p.grad, grad * factor)


def test_the_norm_is_that_of_all_shards_whatever_the_mesh(tmp_path):
    """FSDP over 4 ranks, and HSDP: 2 copies of 2 shards. FSDP averages over ranks, whose gradients are equal here."""
    alone = clipping.layers()
    clipping.backward(alone)
    norm = clip_gradients(alone, 1.0)
    done = run(command(4, [str(HERE / "clipping.py"), str(tmp_path / "out.pt"), "1.0"]), cwd=HERE)
    assert done.returncode == 0, done.stderr
    for found in torch.load(tmp_path / "out.pt", weights_only=True):
        torch.testing.assert_close(found["norm"], norm)
        torch.testing.assert_close(found["gradients"], [p.grad for p in alone.parameters()])


# One step ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager():
    """torchao's kernels take a minute to compile on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason='torchao is not installed: pip install "fastft[torchao]"')


def settings_of(kind: str) -> OptimizerConfig:
    if kind == "adamw_8bit":
        needs_torchao()
        return OptimizerConfig("adamw_8bit", lr=1e-2, weight_decay=0.1)
    return OptimizerConfig(state_dtype=kind, lr=1e-2, weight_decay=0.1)


KINDS = ("float32", "bfloat16", "adamw_8bit")


def set_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def torch_copy(state: dict) -> dict:
    """A copy by saving and loading, because 8-bit moments cannot be copied."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_everything_as_it_was(eager, kind, first):
    """Weights, moments, and the count of steps on which Adam's bias correction depends; the first step is like the others."""
    torch.manual_seed(0)
    model = nn.Linear(64, 96)  # 6,144 weights, enough for 8 bits
    optimizer = build_optimizer(model, config(optimizer=settings_of(kind)))
    finite, bad = torch.tensor(True), torch.tensor(False)
    if not first:
        set_gradients(model, 1)
        update(optimizer, 1e-2, finite)
    twin = nn.Linear(64, 96)
    twin.load_state_dict(model.state_dict())
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    update(optimizer, 1e-2, bad)
    assert all(torch.equal(p, earlier) for p, earlier in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    assert all(float(s["step"]) == (0 if first else 1) for s in optimizer.state.values())

    other = build_optimizer(twin, config(optimizer=settings_of(kind)))
    if not first:
        other.load_state_dict(torch_copy(optimizer.state_dict()))
    for seed in (2, 3):
        for m, o in ((model, optimizer), (twin, other)):
            set_gradients(m, seed)
            update(o, 1e-3, finite)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_fp32_steps_are_pytorchs_own():
    model, twin = clipping.layers(), clipping.layers()
    optimizer = build_optimizer(model, config(optimizer=OptimizerConfig(weight_decay=0.1)))
    plain = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=3e-4, fused=True)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(twin, seed)
        update(optimizer, 3e-4, torch.tensor(True))
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_bf16_moments_are_fp32_ones_rounded_between_steps():
    """By hand: the update in fp32, then both moments rounded. Weights stay fp32."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False)
    optimizer = build_optimizer(model, config(optimizer=OptimizerConfig(state_dtype="bfloat16", weight_decay=0.1)))
    weight, m, v = model.weight.detach().double(), torch.zeros(8, 16), torch.zeros(8, 16)
    for step in range(1, 6):
        set_gradients(model, step)
        grad = model.weight.grad.clone()
        update(optimizer, 1e-2, torch.tensor(True))
        m32, v32 = m.lerp(grad, 1 - 0.9), 0.999 * v + (1 - 0.999) * grad * grad
        denominator = (v32.double() / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 / (1 - 0.9**step) * m32.double() / denominator
        m, v = m32.bfloat16().float(), v32.bfloat16().float()
        torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-7)
    state = optimizer.state[model.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    torch.testing.assert_close(state["exp_avg_sq"].float(), v, rtol=2**-7, atol=0)


def test_8_bit_steps_are_close_to_fp32_ones(eager):
    needs_torchao()
    torch.manual_seed(0)
    model, twin = nn.Linear(64, 96), nn.Linear(64, 96)
    twin.load_state_dict(model.state_dict())
    start = model.weight.detach().clone()
    optimizer = build_optimizer(model, config(optimizer=OptimizerConfig("adamw_8bit")))
    exact = build_optimizer(twin, config())
    for seed in range(5):
        for m, o in ((model, optimizer), (twin, exact)):
            set_gradients(m, seed)
            update(o, 1e-3, torch.tensor(True))
    assert type(optimizer.state[model.weight]["exp_avg"]).__name__ == "OptimState8bit"
    moved = (twin.weight - start).norm()
    assert 0 < (model.weight - twin.weight).norm() < 0.05 * moved


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_clipping_and_update_do_not_wait_for_the_device(kind):
    model = clipping.layers()
    optimizer = build_optimizer(model, config(optimizer=OptimizerConfig(state_dtype=kind)))
    set_gradients(model, 0)
    with Reads() as reads:
        norm = clip_gradients(model, 1.0)
        update(optimizer, 1e-3, norm.isfinite())
        assert reads.count == 0
        bool(norm.isfinite())
        assert reads.count == 1  # it does count


# Whole runs ------------------------------------------------------------------------------------------------------------------

RARE = "§"  # in no text but that of the broken conversation


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose embedding of one token is not a number, and conversations of which one holds that token."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("broken")
    models.make_model(path / "model")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path / "model")(RARE, add_special_tokens=False)["input_ids"]
    tensors = load_file(path / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"][ids[-1]] = math.nan
    save_file(tensors, path / "model" / "model.safetensors", metadata={"format": "pt"})
    models.make_data(path / "plain.jsonl")
    lines = path.joinpath("plain.jsonl").read_text().splitlines()
    conversation = json.loads(lines[17])
    conversation["messages"][0]["content"] = RARE
    lines[17] = json.dumps(conversation)
    (path / "data.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(broken, tmp_path_factory):
    """The directory of a run that skips every step with the broken conversation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = train_here(broken, out, "--checkpoint.every", "1", "--checkpoint.keep", "99")
    assert done.returncode == 0, done.stderr
    return out


def skipped(out: Path) -> list[int]:
    return [row["skipped_steps"] for row in read_metrics(out / "metrics.jsonl") if "skipped_steps" in row]


def test_bad_steps_are_skipped_and_counted(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    bad = [row["step"] for row in rows if row["loss"] is None]
    assert len(bad) == 3 < len(rows) / 2  # once an epoch
    assert all(row["grad_norm"] is None for row in rows if row["step"] in bad)
    assert skipped(whole) == [sum(step <= row["step"] for step in bad) for row in rows]
    assert "NaN" not in (whole / "metrics.jsonl").read_text()
    learned = [row["loss"] for row in rows if row["loss"] is not None]
    assert learned[-1] < 0.9 * learned[0]
    exported = weights(whole)
    assert int(exported["model.embed_tokens.weight"].isnan().any(1).sum()) == 1
    assert all(tensor.isfinite().all() for name, tensor in exported.items() if "embed_tokens" not in name)


def test_ranks_agree_on_what_is_skipped(broken, whole, tmp_path):
    """The broken conversation is on one rank only; both skip the step."""
    out = tmp_path / "out"
    done = run(command(2, ["-m", "fastft.train", *flags(broken, out)]))
    assert done.returncode == 0, done.stderr
    assert skipped(out) == skipped(whole)
    for (_, loss, norm), (_, other, other_norm) in zip(losses(whole), losses(out), strict=True):
        assert (loss, norm) == (other, other_norm) == (None, None) or loss == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_after_a_bad_step_it_is_bit_identical(broken, tmp_path, eager, kind):
    optimizer = settings_of(kind)
    more = ["--optimizer.name", optimizer.name, "--optimizer.state_dtype", optimizer.state_dtype]
    more += ["--checkpoint.every", "1", "--checkpoint.keep", "99", "--epochs", "1"]
    whole = tmp_path / "whole"
    assert train_here(broken, whole, *more).returncode == 0
    bad = next(row["step"] for row in read_metrics(whole / "metrics.jsonl") if row["loss"] is None)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "model")
    for path in (cut / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > bad:
            shutil.rmtree(path)
    done = train_here(broken, cut, *more)
    assert f"resumed: step {bad} from" in done.stderr
    assert losses(cut) == losses(whole) and skipped(cut) == skipped(whole) and skipped(whole)[-1] > 0
    again, first = weights(cut), weights(whole)
    assert all(torch.equal(first[name].nan_to_num(7), again[name].nan_to_num(7)) for name in first)


def test_bad_steps_in_a_row_end_the_run_and_name_their_conversations(broken, tmp_path):
    data, out = tmp_path / "one.jsonl", tmp_path / "out"
    data.write_text((broken / "data.jsonl").read_text().splitlines()[17])
    done = train_here(broken, out, "--data", str(data), "--epochs", "9", "--max_bad_steps", "2", "--log_every", "50")
    fails(done, "steps 1 to 2: the loss or the gradient was not a finite number", "look at their conversations: c17")
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2]
    assert not (out / "model").exists()


def test_a_run_that_diverges_ends_and_all_conversations_are_in_a_file(broken, tmp_path):
    out = tmp_path / "out"
    done = train_here(
        broken, out, "--data", str(broken / "plain.jsonl"), "--optimizer.lr", "1e30", "--checkpoint.every", "1"
    )
    fails(done, "steps 2 to 4", "more, all in", "bad_conversations.txt")
    named = (out / "bad_conversations.txt").read_text().splitlines()
    assert len(named) == len(set(named)) > 10 and set(named) <= {f"c{i}" for i in range(24)}


def test_the_count_of_bad_steps_in_a_row_survives_a_resume(broken, tmp_path):
    """Stopped after 2 of 3, it ends at the third, as without the stop."""
    out, plain = tmp_path / "out", str(broken / "plain.jsonl")
    arguments = ["--data", plain, "--optimizer.lr", "1e30", "--checkpoint.every", "1", "--checkpoint.keep", "9"]
    fails(train_here(broken, out, *arguments), "steps 2 to 4")
    fails(train_here(broken, out, *arguments), "steps 2 to 4")


def test_names_are_those_in_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"id": "x", "part": 1, "parts": 3, "messages": turns},
        {"messages": turns},
        {"id": "z", "messages": turns},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "o", "messages": turns}))
    sources = [Source(str(path), 2), Source(str(other), 1)]
    data = TokenizedData([], [], np.array([2, 1, 0]), 0, 0, {}, sources)  # the first file's `x` has nothing to learn
    assert conversation_names(data, [2, 0, 1]) == ["o", "z", "data.jsonl-1"]
    assert conversation_names(replace(data, positions=np.array([0, 1, 0])), [0]) == ["x (part 2 of 3)"]


# 8-bit moments ---------------------------------------------------------------------------------------------------------------


def test_without_torchao_one_line_says_so(broken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    done = train_here(broken, tmp_path / "out", "--optimizer.name", "adamw_8bit")
    fails(done, "optimizer.name: adamw_8bit needs torchao, which is not installed")


@pytest.mark.parametrize(("width", "fits"), [(256, True), (64, False)])
def test_8_bit_moments_go_on_with_another_number_of_processes_or_say_why_not(
    broken, tmp_path, eager, monkeypatch, width, fits
):
    """Rows of 256 can be cut anywhere; half of 556 rows of 64 would end within a block of 256 numbers."""
    needs_torchao()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    models.make_model(tmp_path / "model", hidden_size=width)
    shutil.copy(broken / "plain.jsonl", tmp_path / "data.jsonl")
    more = ["--optimizer.name", "adamw_8bit", "--checkpoint.every", "4", "--epochs", "2", "--optimizer.lr", "1e-3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_here(tmp_path, whole, *more).returncode == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for path in sorted((cut / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    done = run(command(2, ["-m", "fastft.train", *flags(tmp_path, cut, *more)]))
    if not fits:
        assert "2 processes would cut its 8-bit moments within their blocks; continue with 1 process" in done.stderr
        return
    assert done.returncode == 0 and "resumed: step 4" in done.stderr, done.stderr
    for (_, loss, norm), (_, other, other_norm) in zip(losses(whole), losses(cut), strict=True):
        assert loss == pytest.approx(other, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)
