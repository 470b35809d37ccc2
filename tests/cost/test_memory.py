"""The memory formula against counted tensors of real steps, its laws, and what is said when memory runs out."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import forks
from helpers import training as runs
from hypothesis import given
from hypothesis import strategies as st

from fastft.config import OptimizerConfig, TrainConfig
from fastft.cost.memory import block_bytes, peak_memory, relief
from fastft.cost.shape import Setup, load_shape, setup_of
from fastft.errors import UserError

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"
SPEC = importlib.util.spec_from_file_location("benchmark_memory", BENCHMARK)
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}
CHECKPOINTING = ["none", "selective", "full"]


def model_config(family: str):
    kv_heads, tied = (4, False) if family == "llama" else (2, True)
    return benchmark.make_config(family, {**SMALL, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied})


def run_config(**options) -> TrainConfig:
    return TrainConfig(model="model", output_dir="none", data="none", **options)


@pytest.fixture(scope="module")
def llama_7b():
    family, sizes = benchmark.SHAPES["llama-7b"]
    return load_shape(benchmark.make_config(family, sizes), "llama-7b")


# Against real steps --------------------------------------------------------------------------------------------------------


def test_the_counter_counts_live_tensors_and_their_peak():
    with benchmark.LiveTensors() as counter:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a * 2
        view = b[10:]
        del b
        c = view.double()
        assert counter.live() == counter.peak == 4000 + 4000 + 8 * 990
        del c, view
        assert counter.live() == 4000
        a.untyped_storage().resize_(0)  # as FSDP2 empties what it has gathered
        assert counter.live() == 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_formula_is_within_a_tenth_of_a_real_step(family, checkpointing, accumulate):
    config = run_config(seq_len=512, global_batch_size=accumulate, gradient_checkpointing=checkpointing)
    measured = benchmark.measure(model_config(family), config, 1)
    expected = benchmark.formula(model_config(family), config, 1, on_gpu=False).total
    assert abs(expected / measured - 1) < 0.1, (expected, measured)


def test_the_formula_holds_for_gemma_2():
    """Norms in fp32, four to a block, soft-capped logits."""
    config = run_config(seq_len=512, global_batch_size=1)
    gemma = benchmark.make_config("gemma2", {**SMALL, "num_key_value_heads": 2, "attn_logit_softcapping": None})
    measured = benchmark.measure(gemma, config, 1)
    assert abs(benchmark.formula(gemma, config, 1, on_gpu=False).total / measured - 1) < 0.1


def offs(*command: str) -> list[float]:
    """How far off the formula is, row by row of the benchmark's table."""
    done = forks.run(command)
    assert done.returncode == 0, done.stderr
    found = [float(percent) / 100 for percent in re.findall(r"([+-]\d+\.\d)%", done.stdout)]
    assert found, done.stdout
    return found


def test_sharded_over_two_processes():
    ranks = [str(Path(__file__).parents[1] / "helpers" / "ranks.py"), "2"]
    small = ["--layers", "2", "--seq_len", "256", "--shape", "small-qwen3"]
    assert max(map(abs, offs(*ranks, str(BENCHMARK), *small))) < 0.1


def test_full_size_as_on_eight_gpus():
    """bf16, flash attention, FSDP2: real operations on tensors without values, for every size of a published model."""
    sizes = ["--shape", "llama-8b", "--shape", "qwen3-4b", "--layers", "3", "--seq_len", "4096"]
    assert max(map(abs, offs(str(BENCHMARK), "--fake", "8", *sizes))) < 0.05


# By hand -------------------------------------------------------------------------------------------------------------------


def test_llama_2_7b_by_hand(llama_7b):
    """A block: norms 2 x 4096 x (4 + 2 + 2), attention 2 x 128 x (64 + 64) + 4 x 32, MLP 4 x 2 x 11008 bytes a token."""
    assert llama_7b.parameters == 6_738_415_616
    assert block_bytes(llama_7b, Setup()) == 65_536 + 32_896 + 88_064 == 186_496
    peak = peak_memory(llama_7b, Setup(gpus=8, accumulates=True, checkpointing="none"))
    assert peak.parameters == peak.gradients == 4 * 6_738_415_616 / 8
    assert peak.optimizer == 8 * 6_738_415_616 / 8
    assert peak.phase == "backward pass of block 31"  # the last one's gradients have left their buffer behind
    assert peak.activations == 2048 * (31 * 186_496 + 2 * 2 * 128)
    assert peak.buffers == 4 * 202_383_360 + 2 * 32_000 * 4096  # and those of the head wait for the embeddings
    assert peak.gathered == 2 * (2 * 32_000 * 4096 + 4096) + 2 * 2 * 202_383_360  # embeddings, head, norm; two blocks
    assert peak.total == sum(peak.parts.values())


def test_keys_that_attention_repeats_are_counted_for_every_head():
    """varlen before torch 2.12: of Llama-3.1-8B 32 heads instead of 8, of keys and of values."""
    family, sizes = benchmark.SHAPES["llama-8b"]
    shape = load_shape(benchmark.make_config(family, {**sizes, "num_hidden_layers": 1}), "llama-8b")
    assert block_bytes(shape, Setup(repeats_kv=True)) - block_bytes(shape, Setup()) == 2 * 2 * 128 * (32 - 8)


def test_what_the_settings_are_for(llama_7b):
    def part(name, **options):
        return getattr(peak_memory(llama_7b, setup_of(run_config(**options), gpus=8)), name)

    state = part("optimizer")
    assert part("optimizer", optimizer=OptimizerConfig(state_dtype="bfloat16")) == state / 2
    assert part("optimizer", replicas=2) == 2 * state
    assert part("optimizer", offload=True) == part("parameters", offload=True) == 0


def test_mixtures_of_experts_are_refused():
    experts = benchmark.make_config("qwen3_moe", {**SMALL, "num_key_value_heads": 2, "num_experts": 4})
    with pytest.raises(UserError, match="mixtures of experts"):
        load_shape(experts, "some model")


setups = st.builds(
    Setup,
    gpus=st.sampled_from([1, 2, 8]),
    seq_len=st.sampled_from([512, 2048, 16384]),
    micro_batch=st.sampled_from([1, 2]),
    accumulates=st.booleans(),
    checkpointing=st.sampled_from(CHECKPOINTING),
    offload=st.booleans(),
    lora_r=st.sampled_from([0, 16]),
    moments=st.sampled_from([8.0, 4.0, 2.03125]),
)


@given(setup=setups)
def test_what_saves_memory_never_costs_any(llama_7b, setup):
    total = lambda **changes: peak_memory(llama_7b, replace(setup, **changes)).total  # noqa: E731
    # Sharing brings the next block.
    assert total(gpus=2 * setup.gpus) <= total() or (setup.gpus == 1 and (setup.lora_r or setup.offload))
    assert total() <= total(seq_len=2 * setup.seq_len)
    slack = 2 * setup.tokens * 4096  # the last block's input, which is kept beside what is made of it
    assert (
        total(checkpointing="full") - slack <= total(checkpointing="selective") <= total(checkpointing="none") + slack
    )
    assert total(offload=True) <= total(offload=False)
    helps = relief(llama_7b, setup)
    peaks = [r.peak.total for r in helps]
    assert peaks == sorted(peaks) and all(peak < total() for peak in peaks)
    named = " ".join(r.setting for r in helps)
    assert not (setup.offload and "offload" in named) and not (setup.moments < 4 and "adamw_8bit" in named)
    assert not (setup.checkpointing == "full" and "checkpointing" in named)
    assert ("--lora.r" in named) <= (setup.lora_r == 0)


# Out of memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["fastft.train.loop.train_step", "fastft.model.build.TrainedModel.forward"])
def test_out_of_memory_names_what_helps(ground, tmp_path, where):
    """The real run up to its first step, or to the proof before it, which ends as PyTorch ends it on a full GPU."""
    code = (
        "import sys, torch, fastft.cli, fastft.model.build, fastft.train.loop\n"
        "def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')\n"
        f"{where} = full\n"
        "sys.exit(fastft.cli.main(['train', *sys.argv[1:]]))"
    )
    flags = [*runs.flags(ground, tmp_path / "run"), "--gradient_checkpointing", "none"]
    done = forks.run(["-c", code, *flags, "--micro_batch_size", "4"])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: out of memory: a step is estimated at ")
    assert len(re.findall(r"\(\d+\.\d GiB\)", last)) == 3 and "--gradient_checkpointing full (" in last, last
