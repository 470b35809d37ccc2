"""What a run would cost, before anything is launched: memory, hours, energy and dollars on kinds and numbers of GPUs.

    work, vocabulary = planned_work(config)                     # from the data, or assumed_work(config, tokens) without any
    found = estimates(config, shape, work, [GPUS["H100-80GB"]], [1, 2, 4, 8], mfu=0.4, prices={"H100-80GB": 2.5})
    print(choose(found))

The peak memory of each GPU comes from fastft.cost.memory, the floating-point operations from fastft.cost.flops, as in
training. The estimate reads the model's config and the lengths of the conversations, from the token cache and the step plan
that the run itself will use. It needs no weights, no GPU and no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastft.config import TrainConfig
from fastft.cost.flops import FROZEN, TRAINED, attended_squares, training_flops
from fastft.cost.gpus import Gpu
from fastft.cost.memory import GIB, Memory, peak_memory, trained_in_block
from fastft.cost.shape import Shape, setup_of

RESERVED = 1.5 * GIB
"""GPU memory that PyTorch cannot use: the CUDA context (0.5 GiB), the buffers of NCCL and cuBLAS, fragmentation."""
MARGIN = 1.1
"""Allows for an estimate of the memory that is 10 % too low; the tests and benchmarks/memory.py prove that limit."""


@dataclass(frozen=True)
class Work:
    """What a run has to compute: numbers of steps and tokens."""

    steps: int
    tokens: int
    trained: int
    """Tokens that the loss counts."""
    squared_lengths: float
    """The sum of squared lengths of the conversations, as attention computes them (fastft.cost.flops.attended_squares)."""


@dataclass(frozen=True)
class Estimate:
    """What the run costs on one kind and number of GPUs."""

    gpu: Gpu
    count: int
    memory: Memory | None
    """The peak memory of each GPU; None if training would refuse this number of GPUs."""
    fits: str
    """One of "yes", "tight" (fits, but by less than the estimate's margin), "no", and "no: KEY" (training refuses that key)."""
    tokens_per_s: float
    hours: float
    flops: float
    kwh: float
    """Energy of the GPUs alone, at their design power all the time."""
    dollars: float | None


def estimates(
    config: TrainConfig,
    shape: Shape,
    work: Work,
    gpus: Sequence[Gpu],
    counts: Sequence[int],
    mfu: float,
    prices: dict[str, float] | None = None,
) -> list[Estimate]:
    """One estimate for each kind and number of GPUs. `prices` maps the name of a kind to dollars per GPU and hour."""
    adapters = trained_in_block(shape, setup_of(config, gpus=1)) if config.lora.r else 0
    weight = FROZEN if config.lora.r else TRAINED
    flops = training_flops(
        work.tokens,
        work.trained,
        work.squared_lengths,
        shape.layers * (weight * shape.block + TRAINED * adapters),
        weight * shape.vocabulary * shape.hidden,
        shape.layers,
        shape.heads * shape.head_dim,
    )
    found = []
    for gpu in gpus:
        price = (prices or {}).get(gpu.name)
        for count in counts:
            seconds = flops / (count * mfu * gpu.bf16_flops)
            hours = seconds / 3600
            refused = _refusal(config, count)
            memory = None if refused else peak_memory(shape, setup_of(config, count))
            found.append(
                Estimate(
                    gpu=gpu,
                    count=count,
                    memory=memory,
                    fits=refused or _fits(memory, gpu),
                    tokens_per_s=work.tokens / seconds,
                    hours=hours,
                    flops=flops,
                    kwh=count * gpu.watts * hours / 1000,
                    dollars=None if price is None else count * price * hours,
                )
            )
    return found


def _refusal(config: TrainConfig, count: int) -> str | None:
    """Say why training would refuse this number of processes, as in `Estimate.fits`; None if it would not."""
    if count % config.replicas:
        return "no: replicas"
    if config.global_batch_size % (count * config.micro_batch_size):
        return "no: global_batch_size"
    return None


def _fits(memory: Memory, gpu: Gpu) -> str:
    """Say whether a step fits on the GPU, as in `Estimate.fits`."""
    room = gpu.gib * GIB - RESERVED
    return "yes" if MARGIN * memory.total <= room else "tight" if memory.total <= room else "no"


def choose(found: Sequence[Estimate]) -> Estimate | None:
    """The cheapest estimate that fits, or the cheapest tight one if none does; None if there is neither. They are compared
    in dollars if all have a price, else in energy; if equal, the one with fewer GPUs is chosen.
    """
    fitting = [e for e in found if e.fits == "yes"] or [e for e in found if e.fits == "tight"]
    priced = all(e.dollars is not None for e in fitting)
    return min(fitting, key=lambda e: (round(e.dollars if priced else e.kwh, 6), e.count), default=None)


# The work ------------------------------------------------------------------------------------------------------------------


def planned_work(config: TrainConfig, windows: Sequence[int | None] = (None,)) -> tuple[Work, int]:
    """Compute the work from the run's own step plan; return it with the size of the tokenizer's vocabulary.

    This fills the token cache. `windows` are the model's sliding windows (fastft.cost.flops.attention_windows). Raises
    UserError for the data, the tokenizer or the template, as training would.
    """
    from fastft.config import stages_of
    from fastft.data.step_plan import Curriculum, plan_stage
    from fastft.data.template.chat_template import load_template

    template = load_template(config.model, config.template)
    curriculum = Curriculum([plan_stage(stage, template) for stage in stages_of(config)])
    tokens, trained, squared = 0, 0, 0.0
    counts = [stage.data.trained_counts for stage in curriculum.stages]
    for number in range(1, curriculum.total + 1):
        step = curriculum.step(number)
        conversations = np.concatenate(step.rows)
        lengths = curriculum.stages[step.stage].lengths[conversations]
        tokens += int(lengths.sum())
        trained += int(counts[step.stage][conversations].sum())
        squared += attended_squares(lengths, windows)
    return Work(curriculum.total, tokens, trained, squared), len(template.tokenizer)


def assumed_work(config: TrainConfig, tokens: int, windows: Sequence[int | None] = (None,)) -> Work:
    """The largest work that `tokens` an epoch can make: each row is one full-length conversation, and every token is
    trained."""
    steps = config.epochs * -(-tokens // (config.seq_len * config.global_batch_size))
    total = config.epochs * tokens
    if config.max_steps and config.max_steps < steps:
        steps = config.max_steps
        total = min(total, steps * config.seq_len * config.global_batch_size)
    return Work(steps, total, total, attended_squares(np.array([config.seq_len]), windows) * total / config.seq_len)
