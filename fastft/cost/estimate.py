"""What a run would cost, before anything is launched: `fastft estimate`, with the configuration of `fastft train`.

    fastft estimate --config run.yaml --counts 1,2,4,8 --mfu 0.4 --price_per_gpu A100-80GB=1.5,H100-80GB=2.5
    fastft estimate --model Qwen/Qwen2.5-7B --tokens 50000000
    fastft estimate --config run.yaml --spot --trace trace.json --page spot.html

For kinds and numbers of GPUs: the peak memory of each GPU and whether it fits (fastft.cost.memory), tokens a second, hours, the
floating-point operations (as fastft.train.metrics counts them), kilowatt-hours and dollars. It reads the model's config and the
conversations' lengths, from the token cache and the packing plan that the run itself will use; no weights, no GPU. With
--spot: dollars and hours on the machines of a catalog, spot and on demand, over preemptions (fastft.spot).

`estimates(...)` returns the rows of the table as data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastft.config import TrainConfig
from fastft.cost.flops import FROZEN, TRAINED, seen_squares, training_flops
from fastft.cost.gpus import Gpu
from fastft.cost.memory import GIB, Memory, peak_memory, trained_in_block
from fastft.cost.shape import Shape, setup_of

RESERVED = 1.5 * GIB
"""Of a GPU's memory, what is not PyTorch's to give: the CUDA context (0.5 GiB), NCCL's and cuBLAS's buffers, fragments."""
MARGIN = 1.1
"""The memory's estimate is held to 10 % of what is measured."""


@dataclass(frozen=True)
class Work:
    """What a run has to compute."""

    steps: int
    tokens: int
    trained: int
    """Tokens that the loss counts."""
    squared_lengths: float
    """Of the conversations, as attention sees them (fastft.cost.flops.seen_squares)."""


@dataclass(frozen=True)
class Estimate:
    """One kind and number of GPUs."""

    gpu: Gpu
    count: int
    memory: Memory | None
    """At the peak, of each GPU; None where the run would be refused."""
    fits: str
    """yes; tight, within the margin of the estimate; no; or no with the key for which the run would be refused."""
    tokens_per_s: float
    hours: float
    flops: float
    kwh: float
    """Of the GPUs alone, at their design power throughout."""
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
    """One estimate for each kind and number of GPUs. `prices`: dollars a GPU and hour, by kind."""
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
    """Why fastft.train would refuse so many processes."""
    if count % config.replicas:
        return "no: replicas"
    if config.global_batch_size % (count * config.micro_batch_size):
        return "no: global_batch_size"
    return None


def _fits(memory: Memory, gpu: Gpu) -> str:
    room = gpu.gib * GIB - RESERVED
    return "yes" if MARGIN * memory.total <= room else "tight" if memory.total <= room else "no"


def choose(found: Sequence[Estimate]) -> Estimate | None:
    """The cheapest that fits, by dollars where all have a price, else by energy; then the fewest GPUs."""
    fitting = [e for e in found if e.fits == "yes"] or [e for e in found if e.fits == "tight"]
    priced = all(e.dollars is not None for e in fitting)
    return min(fitting, key=lambda e: (round(e.dollars if priced else e.kwh, 6), e.count), default=None)


# The work ------------------------------------------------------------------------------------------------------------------


def planned_work(config: TrainConfig, windows: Sequence[int | None] = (None,)) -> tuple[Work, int]:
    """(the work of the run's own packing plan, tokens that the tokenizer knows). Fills the token cache. `windows` are those of
    the model's attention.

    Raises UserError as training would, for the data, the tokenizer or the template.
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
        squared += seen_squares(lengths, windows)
    return Work(curriculum.total, tokens, trained, squared), len(template.tokenizer)


def assumed_work(config: TrainConfig, tokens: int, windows: Sequence[int | None] = (None,)) -> Work:
    """Work of `tokens` an epoch in full windows, each one conversation, all trained: the most that they can be."""
    steps = config.epochs * -(-tokens // (config.seq_len * config.global_batch_size))
    total = config.epochs * tokens
    if config.max_steps and config.max_steps < steps:
        steps = config.max_steps
        total = min(total, steps * config.seq_len * config.global_batch_size)
    return Work(steps, total, total, seen_squares(np.array([config.seq_len]), windows) * total / config.seq_len)
