"""`fastft estimate`: what a run would cost on kinds and numbers of GPUs, printed as a table.

    fastft estimate --config run.yaml --counts 1,2,4,8 --mfu 0.4 --price_per_gpu A100-80GB=1.5,H100=2.5
    fastft estimate --model Qwen/Qwen2.5-7B --tokens 50000000 --gpus H100
    fastft estimate --config run.yaml --spot --trace trace.json --page spot.html

The options of `fastft train` describe the run, those of `EstimateConfig` and `SpotConfig` the machines. The arithmetic is
in fastft.cost.estimate, the comparison of spot machines with machines on demand (--spot) in fastft.cost.spot.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from fastft.common.command_line import option, parse, run_module
from fastft.config import RENAMED, SYNONYMS, TrainConfig
from fastft.cost.estimate import RESERVED, Estimate, assumed_work, choose, estimates, planned_work
from fastft.cost.flops import attention_windows
from fastft.cost.gpus import GPUS, Gpu, find_gpu
from fastft.cost.memory import GIB, Memory, checkpoint_bytes, relief
from fastft.cost.shape import Shape, load_shape, setup_of
from fastft.cost.spot.candidates import SpotConfig, compare
from fastft.cost.spot.prices import read_prices
from fastft.cost.spot.report import show
from fastft.errors import UserError


@dataclass
class EstimateConfig:
    """Options of `fastft estimate`, besides those of a training run."""

    gpus: str = option(
        "all",
        help=f"Kinds of GPUs, separated by commas: {', '.join(GPUS)}. Usual spellings are understood, such as H100 for "
        "H100-80GB.",
    )
    counts: str = "1,2,4,8"
    """Numbers of GPUs, separated by commas."""
    mfu: float = 0.4
    """Share of a GPU's bf16 peak that training reaches, as metrics.jsonl reports it; lower across machines."""
    price_per_gpu: str | None = None
    """Dollars per GPU and hour: one number for all kinds, or KIND=NUMBER for some, separated by commas."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu: {self.mfu} is not above 0 and at most 1")

    @property
    def kinds(self) -> list[Gpu]:
        if self.gpus.strip() == "all":
            return list(GPUS.values())
        found = [find_gpu("gpus", text) for text in _items(self.gpus)]
        if not found:
            raise UserError("gpus: names no GPU; leave it out, or say H100-80GB")
        return list(dict.fromkeys(found))

    @property
    def numbers(self) -> list[int]:
        """Numbers of GPUs."""
        items = _items(self.counts)
        if not items or not all(item.isdecimal() and int(item) >= 1 for item in items):
            raise UserError(f"counts: {self.counts!r} is not a list of numbers from 1 on, such as 1,2,4,8")
        return [int(item) for item in items]

    @property
    def prices(self) -> dict[str, float]:
        """Map the names of kinds to dollars per GPU and hour. A kind without a price is left out."""
        found = {}
        for item in _items(self.price_per_gpu or ""):
            kind, equals, price = item.rpartition("=")
            try:
                dollars = float(price)
            except ValueError:
                dollars = math.nan
            if not 0 <= dollars < math.inf:
                raise UserError(f"price_per_gpu: {item!r} is neither a price nor KIND=PRICE, such as H100-80GB=2.50")
            kinds = [find_gpu("price_per_gpu", kind).name] if equals else GPUS
            found.update(dict.fromkeys(kinds, dollars))
        return found


@dataclass
class EstimatedRun(TrainConfig):
    """A training run that writes nothing, and may have no data yet."""

    output_dir: str = "none"
    """Not used: an estimate writes nothing there."""
    tokens: int | None = None
    """Tokens of an epoch, where there is no data yet. Assumes full rows in which every token is trained."""

    def __post_init__(self) -> None:
        if self.tokens is not None:
            if self.tokens < 1:
                raise UserError(f"tokens: {self.tokens} is not 1 or more")
            self.data, self.stages = "none", []
        elif self.data is None and not self.stages:
            raise UserError(
                "data: name the conversations with --data or in stages; without any yet, say --tokens 10000000"
            )
        super().__post_init__()


# The command ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Estimate a run and print what it would cost. Returns the exit code."""
    description = "What a run would cost, before it is launched."
    classes = (EstimateConfig, SpotConfig, EstimatedRun)
    _estimate(*parse(argv, "fastft estimate", description, *classes, renamed=RENAMED, synonyms=SYNONYMS))
    return 0


def _estimate(options: EstimateConfig, spot: SpotConfig, config: EstimatedRun) -> None:
    """Estimate the run on all kinds and numbers of GPUs, and print the result, or the comparison with spot machines."""
    from rich.console import Console

    from fastft.model.pretrained import fit_config

    gpus, counts, prices = options.kinds, options.numbers, options.prices  # before the work that may take minutes
    offers = read_prices(spot.prices) if spot.spot else []
    trace = spot.preemptions(config.seed) if spot.spot else None
    model_config = _load_config(config.model)
    windows = attention_windows(model_config)
    if config.tokens:
        work, vocabulary = assumed_work(config, config.tokens, windows), 0
    else:
        work, vocabulary = planned_work(config, windows)
    shape = load_shape(fit_config(model_config, config, vocabulary), config.model)
    found = estimates(config, shape, work, gpus, counts, options.mfu, prices)
    _require_one(config, found)

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{config.model}: {shape.parameters:,} parameters; {work.tokens:,} tokens, {work.trained:,} trained, in {work.steps:,} "
        f"steps; {found[0].flops / 1e18:,.3g} exaFLOPs at {options.mfu:.0%} of the peak"
    )
    if spot.spot:
        show(compare(found, offers, trace, checkpoint_bytes(shape, config), spot, config.seed), console, config.model)
    else:
        _print_estimates(console, config, shape, found)


def _load_config(model: str):
    """The model's config, from a directory or the Hub. Raises UserError, at once if the Hub cannot be reached."""
    from fastft.model.pretrained import load_config

    try:
        return load_config(model)
    except UserError as error:
        if Path(model).exists():
            raise
        raise UserError(f"{error}; with --tokens, a directory that holds the model's config.json is enough") from None


def _print_estimates(console, config: TrainConfig, shape: Shape, found: list[Estimate]) -> None:
    """Print all estimates, and the memory of the chosen one, or what helps where nothing fits."""
    console.print(_table(found))
    if chosen := choose(found):
        console.print(f"{chosen.count} x {chosen.gpu.name}, at the peak of its memory ({chosen.memory.phase}):")
        console.print(_breakdown(chosen.memory))
    else:
        _print_relief(console, config, shape, found)
    console.print(
        "Energy: the GPUs' design power x hours, nothing for hosts and cooling. Hours: of the steps alone, at the stated MFU. "
        f"Fits: beside {RESERVED / GIB:.1f} GiB for CUDA and NCCL; tight: by less than the 10 % that the estimate may be off."
    )


def _require_one(config: TrainConfig, found: list[Estimate]) -> None:
    """Raise UserError if training would refuse every number of GPUs."""
    if all(e.memory is None for e in found):
        raise UserError(
            f"counts: none of these numbers of processes divides into replicas {config.replicas} and global_batch_size "
            f"{config.global_batch_size} at micro_batch_size {config.micro_batch_size}"
        )


def _table(found: list[Estimate]):
    """The table of all estimates, with a section for each kind of GPU."""
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
    """The table of the parts of the memory."""
    from rich.table import Table

    table = Table("part", show_header=False)
    table.add_column("GiB", justify="right")
    for part, size in memory.parts.items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{memory.total / GIB:.2f}")
    return table


def _print_relief(console, config: TrainConfig, shape: Shape, found: list[Estimate]) -> None:
    """Print what helps where nothing fits, for the kind and number of GPUs that lacks the least memory."""
    nearest = min((e for e in found if e.memory), key=lambda e: e.memory.total - e.gpu.gib * GIB)
    console.print(
        f"Nothing fits. {nearest.count} x {nearest.gpu.name} lacks least. Each of these settings alone would lower the peak to:"
    )
    for r in relief(shape, setup_of(config, nearest.count)):
        console.print(f"  {r.setting}: {r.peak.total / GIB:.1f} GiB")


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


if __name__ == "__main__":
    run_module(main)
