"""The memory of a training step: fastft.cost.memory's formula compared with real steps, for each gradient checkpointing mode.

    python benchmarks/memory.py                                      CPU: small models, fp32, tensors counted; a minute
    python benchmarks/memory.py --shape llama-7b --layers 4          one GPU: bf16, torch.cuda.max_memory_allocated
    torchrun --nproc-per-node 2 benchmarks/memory.py                 sharded, on CPU or GPU
    python benchmarks/memory.py --fake 8 --shape llama-7b            as on 8 GPUs, full size, in tensors without values

It takes three steps of random tokens on random weights with the trainer's own model, sharding, loss, clipping and optimizer.
The first step does not count, because the optimizer has no state yet. On a CPU, and with --fake, the tensors alive after each
operation are summed up, which leaves out what operations hold while they run. On a GPU that is measured, too, and so are the
512 bytes to which the allocator rounds.
"""

import gc
import os
import sys
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.common.command_line import option, parse, run
from fastft.common.distributed import join_ranks
from fastft.config import LoraConfig, OptimizerConfig, TrainConfig
from fastft.cost.memory import GIB, Memory, peak_memory
from fastft.cost.shape import load_shape, setup_of
from fastft.errors import UserError
from fastft.model import attention, build, lora, weights
from fastft.model.activation_checkpointing import recompute
from fastft.train.optim import build_optimizer, clip_gradients, update
from fastft.train.step import accumulate_gradients

SHAPES = {
    "small-llama": ("llama", {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
                              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096}),
    "small-qwen3": ("qwen3", {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
                              "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True}),
    # Llama-2-7B, Llama-3.2-1B, Llama-3.1-8B, Qwen3-4B, Phi-3-mini, and Gemma-2-2B without the soft-capping of attention.
    "llama-7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000}),
    "llama-1b": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
                           "tie_word_embeddings": True}),
    "llama-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}),
    "qwen3-4b": ("qwen3", {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                           "tie_word_embeddings": True}),
    "phi3-mini": ("phi3", {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}),
    "gemma2-2b": ("gemma2", {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
                             "attn_logit_softcapping": None}),
}  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """The most bytes that tensors hold at once, counted after each operation.

    Tensors from before are counted as soon as an operation returns a view of them. (MemTracker of
    torch.distributed._tools.mem_tracker, torch 2.13, counts the same by module, but asks for the module of each tensor, which
    FSDP2's buffers do not have.)
    """

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        before = len(self.storages)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if len(self.storages) != before or "resize" in operation.name():
            self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        """Bytes of all live tensors. Sizes are read anew each time, because FSDP2 empties storages that stay alive."""
        return sum(storage.nbytes() for ref in list(self.storages.values()) if (storage := ref()) is not None)

    def reset(self) -> None:
        self.peak = self.live()

    def _see(self, tensor: Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = id(storage)
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None))


def make_config(family: str, sizes: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, max_position_embeddings=1 << 17, pad_token_id=0, **sizes)


def measure(model_config, config: TrainConfig, world: int, fake: bool = False) -> int:
    """The peak of a step, in bytes, on the first of `world` processes.

    With `fake` this is the only one of them; tensors have shapes and data types but no values, those of a run on GPUs.
    """
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            with GpuPrecision():
                return _peak(model_config, config, world, torch.device("cpu"), torch.bfloat16, fake)
        finally:
            dist.destroy_process_group()
    device = join_ranks()
    return _peak(model_config, config, world, device, torch.bfloat16 if device.type == "cuda" else torch.float32, fake)


class GpuPrecision(ExitStack):
    """A context in which fastft.model computes on a CPU as on a GPU: in bf16, and with attention that only GPUs have.

    (With tensors that have no values, an operation's shapes are all that is computed.)
    """

    def __enter__(self):
        from transformers import AttentionInterface

        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.enter_context(patch.object(build, "MixedPrecisionPolicy", lambda **_: mixed))
        AttentionInterface.register("varlen", attention._varlen)
        return super().__enter__()


def _peak(model_config, config: TrainConfig, world: int, device: torch.device, low: torch.dtype, fake: bool) -> int:
    gc.collect()  # the model before, whose parts refer to each other
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    # As fastft.model.build.prepare_model, with random weights.
    mesh = build.make_mesh(device, config.replicas)
    backend = "varlen" if fake else attention.choose_attention(config.attention, device)[0]
    causal_lm = build.build_model(model_config, backend, "model")
    trained = build.TrainedModel(causal_lm)
    if config.lora.r:
        lora.add_adapters(causal_lm, trained.blocks, config.lora, "model", low)
    for block in trained.blocks:
        recompute(block, config.gradient_checkpointing)
    build.shard(trained, mesh, config.offload, set())

    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), LiveTensors() as counter:
        shapes = {name: parameter.shape for name, parameter in trained.named_parameters()}
        home = torch.device("cpu") if config.offload else device
        weights.fill(
            trained,
            lambda name: 0.02 * torch.randn(shapes[name]),
            home,
            lambda parameter: torch.float32 if parameter.requires_grad else low,
        )
        optimizer = build_optimizer(trained.train(), config)
        micro_batches = config.global_batch_size // (world * config.micro_batch_size)
        peak = 0
        for number in range(3):
            counter.reset()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            batches = [RandomBatch(config, model_config.vocab_size) for _ in range(micro_batches)]
            accumulate_gradients(trained, batches, 1, device)
            norm = clip_gradients(trained, config.max_grad_norm)
            update(optimizer, 1e-6, norm.isfinite())
            measured = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else counter.peak
            peak = max(peak, measured if number else 0)
    return peak


class RandomBatch:
    """A micro-batch as fastft.data.batch.Batch, of two conversations, every token trained."""

    def __init__(self, config: TrainConfig, words: int):
        self.tokens, self.words = config.seq_len * config.micro_batch_size, words

    def to(self, device: torch.device) -> dict:
        n, half = self.tokens, self.tokens // 2
        positions = torch.arange(n, device=device)
        return {
            "input_ids": torch.randint(self.words, (1, n), device=device),
            "position_ids": torch.where(positions < half, positions, positions - half)[None],
            "cu_seqlens": torch.tensor([0, half, n], dtype=torch.int32, device=device),
            "max_seqlen": n,
            "loss_index": positions[:-1],
            "targets": torch.randint(self.words, (n - 1,), device=device),
        }


@dataclass
class MemoryConfig:
    """What to measure."""

    shape: list[str] = option(several=True)
    """Models, by the names in SHAPES; by default the small ones."""
    layers: int | None = None
    """Number of blocks, instead of the shape's own."""
    seq_len: int = 2048
    micro_batch_size: int = 1
    accumulate: int = 1
    """Micro-batches a step."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    lora_r: int = 0
    fake: int | None = None
    """Use tensors without values, as on this many GPUs."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.shape if name not in SHAPES]:
            raise UserError(f"shape: {unknown[0]!r} is not one of {', '.join(SHAPES)}")


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/memory.py", __doc__.splitlines()[0], MemoryConfig)
    world = options.fake or int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = bool(options.fake) or torch.cuda.is_available()

    table = Table("model", "checkpointing", "formula's peak", title=f"GiB of each of {world} processes")
    for heading in ("formula", "measured", "off by"):
        table.add_column(heading, justify="right")
    for name in options.shape or ["small-llama", "small-qwen3"]:
        family, sizes = SHAPES[name]
        model_config = make_config(
            family, {**sizes, **({"num_hidden_layers": options.layers} if options.layers else {})}
        )
        for checkpointing in ("none", "selective", "full"):
            config = TrainConfig(
                model="model",
                output_dir="none",
                data="none",
                seq_len=options.seq_len,
                micro_batch_size=options.micro_batch_size,
                global_batch_size=world * options.micro_batch_size * options.accumulate,
                gradient_checkpointing=checkpointing,
                optimizer=OptimizerConfig(name=options.optimizer),
                lora=LoraConfig(r=options.lora_r),
            )
            measured = measure(model_config, config, world, fake=bool(options.fake))
            expected = formula(model_config, config, world, on_gpu)
            off = expected.total / measured - 1
            gib = [f"{size / GIB:.3f}" for size in (expected.total, measured)]
            table.add_row(name, checkpointing, expected.phase, *gib, f"{off:+.1%}")
    if int(os.environ.get("RANK", 0)) == 0:
        Console(soft_wrap=True).print(table)
    if dist.is_initialized():
        dist.destroy_process_group()


def formula(model_config, config: TrainConfig, world: int, on_gpu: bool) -> Memory:
    return peak_memory(load_shape(model_config, "model"), setup_of(config, world, on_gpu))


if __name__ == "__main__":
    raise SystemExit(run(main))
