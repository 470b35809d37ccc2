"""What a run would cost, before anything is launched: `fastft estimate`, with the configuration of `fastft train`.

    fastft estimate --config run.yaml --counts 1,2,4,8 --mfu 0.4 --price_per_gpu A100-80GB=1.5,H100-80GB=2.5
    fastft estimate --model Qwen/Qwen2.5-7B --tokens 50000000
    fastft estimate --config run.yaml --spot --trace trace.json --page spot.html

For kinds and numbers of GPUs: the peak memory of each GPU and whether it fits (fastft.memory), tokens a second, hours, the
floating-point operations (as fastft.metrics counts them), kilowatt-hours and dollars. It reads the model's config and the
conversations' lengths, from the token cache and the packing plan that the run itself will use; no weights, no GPU. With
--spot: dollars and hours on the machines of a catalog, spot and on demand, over preemptions (fastft.spot).

`estimates(...)` returns the rows of the table as data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastft.config import TrainConfig, parse_classes
from fastft.memory import (
    FP32,
    GIB,
    Memory,
    Shape,
    load_shape,
    peak_memory,
    relief,
    setup_of,
    trained_in_block,
    trained_parameters,
)
from fastft.metrics import FROZEN, TRAINED, attention_windows, peak_flops, seen_squares, training_flops
from fastft.spot.candidates import SpotConfig, compare
from fastft.spot.prices import read_prices
from fastft.spot.report import show

RESERVED = 1.5 * GIB
"""Of a GPU's memory, what is not PyTorch's to give: the CUDA context (0.5 GiB), NCCL's and cuBLAS's buffers, fragments."""
MARGIN = 1.1
"""The memory's estimate is held to 10 % of what is measured."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Its peak in FLOP/s is in fastft.metrics, by the same name."""

    name: str
    gib: float
    """Memory that torch.cuda.get_device_properties reports, about."""
    watts: float
    """Thermal design power."""


# From NVIDIA's data sheets of these products (A10G: of AWS G5; A100, H100, H200: SXM). Memory is sold in GB, and ECC takes some.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 39.4, 400),
        Gpu("A100-80GB", 79.2, 400),
        Gpu("H100-80GB", 79.1, 700),
        Gpu("H200", 139.8, 700),
        Gpu("L40S", 44.4, 350),
        Gpu("A10G", 22.1, 300),
        Gpu("RTX-4090", 23.5, 450),
    )
}


@dataclass
class EstimateConfig:
    """What to estimate, beside the keys of a training run."""

    gpus: str = "all"
    """Kinds of GPUs, separated by commas: A100-40GB, A100-80GB, H100-80GB, H200, L40S, A10G, RTX-4090."""
    counts: str = "1,2,4,8"
    """Numbers of GPUs, separated by commas."""
    mfu: float = 0.4
    """Share of a GPU's bf16 peak that training reaches, as metrics.jsonl reports it; lower across machines."""
    price_per_gpu: str | None = None
    """Dollars a GPU and hour: one number, or KIND=NUMBER separated by commas."""
    tokens: int | None = None
    """Tokens of an epoch where there is no data yet: taken as full windows, every token trained."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: {self.mfu} is not above 0 and at most 1")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens: {self.tokens} is not 1 or more")

    @property
    def kinds(self) -> list[Gpu]:
        names = list(GPUS) if self.gpus.strip() == "all" else _items(self.gpus)
        for name in names:
            _known_gpu("gpus", name)
        if not names:
            raise ValueError("gpus: names no GPU; leave it out, or say H100-80GB")
        return [GPUS[name] for name in names]

    @property
    def numbers(self) -> list[int]:
        """Of GPUs."""
        items = _items(self.counts)
        if not items or not all(item.isdecimal() and int(item) >= 1 for item in items):
            raise ValueError(f"counts: {self.counts!r} is not a list of numbers from 1 on, such as 1,2,4,8")
        return [int(item) for item in items]

    @property
    def prices(self) -> dict[str, float]:
        """Dollars an hour by the kind of GPU; not every kind need have one."""
        found = {}
        for item in _items(self.price_per_gpu or ""):
            name, equals, price = item.rpartition("=")
            try:
                dollars = float(price)
            except ValueError:
                dollars = -1.0
            if not 0 <= dollars < float("inf"):
                raise ValueError(f"price_per_gpu: {item!r} is neither a price nor KIND=PRICE, such as H100-80GB=2.50")
            if equals:
                _known_gpu("price_per_gpu", name)
            found.update({name: dollars} if equals else dict.fromkeys(GPUS, dollars))
        return found


@dataclass(frozen=True)
class Work:
    """What a run has to compute."""

    steps: int
    tokens: int
    trained: int
    """Tokens that the loss counts."""
    squared_lengths: float
    """Of the conversations, as attention sees them (fastft.metrics.seen_squares)."""


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
            seconds = flops / (count * mfu * peak_flops(gpu.name))
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


def checkpoint_bytes(shape: Shape, config: TrainConfig) -> float:
    """Of a checkpoint: the trained weights in fp32 and the optimiser's moments."""
    setup = setup_of(config, gpus=1)
    return trained_parameters(shape, setup) * (FP32 + setup.moments)


def choose(found: Sequence[Estimate]) -> Estimate | None:
    """The cheapest that fits, by dollars where all have a price, else by energy; then the fewest GPUs."""
    fitting = [e for e in found if e.fits == "yes"] or [e for e in found if e.fits == "tight"]
    priced = all(e.dollars is not None for e in fitting)
    return min(fitting, key=lambda e: (round(e.dollars if priced else e.kwh, 6), e.count), default=None)


# The work ------------------------------------------------------------------------------------------------------------------


def planned_work(config: TrainConfig, say, windows: Sequence[int | None] = (None,)) -> tuple[Work, int]:
    """(the work of the run's own packing plan, tokens that the tokenizer knows). Fills the token cache. `windows` are those of
    the model's attention.

    Raises ValueError as training would, for the data, the tokenizer or the template.
    """
    import torch.distributed as dist

    from fastft.config import stages_of
    from fastft.data import Course
    from fastft.ranks import join_ranks
    from fastft.template import load_template
    from fastft.train import plan_stage

    alone = not dist.is_initialized()
    join_ranks()
    try:
        template = load_template(config.model, config.template)
        course = Course([plan_stage(stage, template, say) for stage in stages_of(config)])
    finally:
        if alone:
            dist.destroy_process_group()
    tokens, trained, squared = 0, 0, 0.0
    counts = [stage.data.trained_counts for stage in course.stages]
    for number in range(1, course.total + 1):
        step = course.step(number)
        conversations = np.concatenate(step.rows)
        lengths = course.stages[step.stage].lengths[conversations]
        tokens += int(lengths.sum())
        trained += int(counts[step.stage][conversations].sum())
        squared += seen_squares(lengths, windows)
    return Work(course.total, tokens, trained, squared), len(template.tokenizer)


def assumed_work(config: TrainConfig, tokens: int, windows: Sequence[int | None] = (None,)) -> Work:
    """Work of `tokens` an epoch in full windows, each one conversation, all trained: the most that they can be."""
    steps = config.epochs * -(-tokens // (config.window * config.global_batch_size))
    total = config.epochs * tokens
    if config.max_steps and config.max_steps < steps:
        steps = config.max_steps
        total = min(total, steps * config.window * config.global_batch_size)
    return Work(steps, total, total, seen_squares(np.array([config.window]), windows) * total / config.window)


# The command ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    try:
        _estimate(*_parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str]) -> list:
    """[EstimateConfig, SpotConfig, TrainConfig]; no output_dir is asked for, and with --tokens no data. What the user says
    comes later and wins.
    """
    argv = ["--output_dir", "none", *_say_true(argv, "--spot")]
    if any(argument.split("=")[0] == "--tokens" for argument in argv):
        argv = ["--data", "none", *argv, "--stages", "[]"]
    description = "What a run would cost, before it is launched."
    try:
        return parse_classes(argv, "fastft estimate", description, EstimateConfig, SpotConfig, TrainConfig)
    except ValueError as error:
        if str(error).startswith("data: name the conversations"):
            raise ValueError(f"{error}; without any yet, say --tokens 10000000") from None
        raise


def _say_true(argv: list[str], flag: str) -> list[str]:
    """A flag that stands alone gets its value."""
    alone = {i for i, word in enumerate(argv) if word == flag and argv[i + 1 : i + 2] not in (["true"], ["false"])}
    return [part for i, word in enumerate(argv) for part in ((word, "true") if i in alone else (word,))]


def _estimate(options: EstimateConfig, spot: SpotConfig, config: TrainConfig) -> None:
    """Estimate and print."""
    from rich.console import Console

    from fastft.model import fit_config, load_config

    gpus, counts, prices = options.kinds, options.numbers, options.prices  # before the work that may take minutes
    offers = read_prices(spot.prices) if spot.spot else []
    trace = spot.preemptions(config.seed) if spot.spot else None
    model_config = load_config(config.model)
    windows = attention_windows(model_config)
    if options.tokens:
        work, words = assumed_work(config, options.tokens, windows), 0
    else:
        work, words = planned_work(config, lambda line: print(line, file=sys.stderr, flush=True), windows)
    shape = load_shape(fit_config(model_config, config, words), config.model)
    found = estimates(config, shape, work, gpus, counts, options.mfu, prices)
    _require_one(config, found)

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{config.model}: {shape.parameters:,} parameters; {work.tokens:,} tokens, {work.trained:,} trained, in {work.steps:,} "
        f"steps; {found[0].flops / 1e18:,.3g} exaFLOPs at {options.mfu:.0%} of the peak"
    )
    if spot.spot:
        show(compare(found, offers, trace, checkpoint_bytes(shape, config), spot, config.seed), console, config.model)
        return
    console.print(_table(found))
    if chosen := choose(found):
        console.print(f"{chosen.count} x {chosen.gpu.name}, at the peak of its memory ({chosen.memory.moment}):")
        console.print(_breakdown(chosen.memory))
    else:
        _print_relief(console, config, shape, found)
    console.print(
        "Energy: the GPUs' design power x hours, nothing for hosts and cooling. Hours: steps alone, at the stated efficiency. "
        f"Fits: with {RESERVED / GIB:.1f} GiB for CUDA and NCCL; tight: within the estimate's 10 %."
    )


def _require_one(config: TrainConfig, found: list[Estimate]) -> None:
    if all(e.memory is None for e in found):
        raise ValueError(
            f"counts: none of these numbers of processes divides into replicas {config.replicas} and global_batch_size "
            f"{config.global_batch_size} at micro_batch_size {config.micro_batch_size}"
        )


def _table(found: list[Estimate]):
    from rich.table import Table

    priced = any(e.dollars is not None for e in found)
    table = Table()
    table.add_column("GPU", no_wrap=True)
    for heading in ("x", "GiB each", "of", "fits", "tokens/s", "hours", "kWh", *(["$"] if priced else [])):
        table.add_column(heading, justify="left" if heading == "fits" else "right", no_wrap=True)
    for number, e in enumerate(found):
        last = number + 1 == len(found) or found[number + 1].gpu != e.gpu
        table.add_row(
            e.gpu.name,
            str(e.count),
            f"{e.memory.total / GIB:.1f}" if e.memory else "-",
            f"{e.gpu.gib:.0f}",
            e.fits,
            f"{e.tokens_per_s:,.0f}",
            _short(e.hours),
            _short(e.kwh),
            *([_short(e.dollars)] if priced else []),
            end_section=last,
        )
    return table


def _breakdown(memory: Memory):
    from rich.table import Table

    table = Table("part", show_header=False)
    table.add_column("GiB", justify="right")
    for part, size in memory.parts.items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{memory.total / GIB:.2f}")
    return table


def _print_relief(console, config: TrainConfig, shape: Shape, found: list[Estimate]) -> None:
    """What helps where nothing fits, for the combination that lacks least."""
    nearest = min((e for e in found if e.memory), key=lambda e: e.memory.total - e.gpu.gib * GIB)
    console.print(f"Nothing fits. {nearest.count} x {nearest.gpu.name} lacks least; each of these alone would make it:")
    for r in relief(shape, setup_of(config, nearest.count)):
        console.print(f"  {r.setting}: {r.peak.total / GIB:.1f} GiB")


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _known_gpu(key: str, name: str) -> None:
    if name not in GPUS:
        raise ValueError(f"{key}: no GPU {name!r} is known; known are {', '.join(GPUS)}")
