"""Hours and dollars of a job on every machine that the catalog offers, spot and on demand: `fastft estimate --spot`.

    config = SpotConfig(spot=True)
    found = compare(estimates, read_prices(config.prices), config.preemptions(seed=0), checkpoint_bytes, config).candidates
    print(found[0].name, found[0].dollars)      # the cheapest: (median, 90th percentile) of the runs

Hours of work come from fastft.cost.estimate; prices from fastft.cost.spot.prices; what preemptions do to them from
fastft.cost.spot.simulate, which runs each candidate some hundred times from random moments of a trace.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastft.config import HOURS_BETWEEN_PREEMPTIONS
from fastft.cost.spot.prices import Offer, cheapest
from fastft.cost.spot.simulate import Job, Runs, mean_between_preemptions, simulate, undisturbed
from fastft.cost.spot.traces import Trace, read_trace, synthetic
from fastft.cost.spot.young import young_interval
from fastft.errors import UserError

if TYPE_CHECKING:
    from fastft.cost.estimate import Estimate


STAGED = 5e9
"""Bytes a second from a GPU to the memory of its host, while steps stand still; PCIe 4 does 25e9, shared by two GPUs on some."""
PUBLISHED = 0.4e9
"""Bytes a second from a machine to the bucket: the slower of its disk (437 MB/s for SkyPilot's disk_tier high on AWS) and its
network."""
NOTICE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""Seconds between the warning and the end of a spot machine, as the clouds document them (best effort); none elsewhere."""
SMALL_S = 1.0
"""No interval is shorter: saving more often than at every step means nothing."""


@dataclass
class SpotConfig:
    """The same on spot machines and on demand, with prices and preemptions: add --spot."""

    spot: bool = False
    """Compare machines of the catalog, spot and on demand, in dollars and hours."""
    prices: str = "v8"
    """Catalogs, separated by commas: v8 or 2023, which come with fastft, SkyPilot's …/aws/vms.csv, or a CSV with the columns
    cloud, gpu, count, region, on_demand, spot."""
    trace: str | None = None
    """A recorded trace to replay: availability or preemption (JSON), bamboo (text)."""
    preemption_rate: float | None = None
    """Without a trace: preemptions a node and hour; by default one in 3 hours."""
    burst: float = 1.0
    """Nodes of a fleet of 64 that go at once, on average; for several nodes it is kinder the larger it is."""
    provision_minutes: float = 4.0
    """From capacity to a machine that runs commands."""
    setup_minutes: float = 2.0
    """From there to the first step: environment, weights, checkpoint."""
    checkpoint_every: str = "auto"
    """Minutes of work between two saves; auto: Young's interval."""
    blocking_seconds: float | None = None
    """A save holds the steps for so long; by default the time to copy it into the host's memory."""
    upload_seconds: float | None = None
    """From there until it is safe in the bucket; by default at 0.4 GB/s a machine."""
    page: str | None = None
    """Write table and plots to this HTML file."""

    def __post_init__(self) -> None:
        if not self.spot and (
            said := [name for name, value in vars(self).items() if value != getattr(SpotConfig, name)]
        ):
            raise UserError(f"{said[0]}: only with --spot")
        if self.trace and self.preemption_rate is not None:
            raise UserError("preemption_rate: the trace has its own; give one of the two")
        times = ("provision_minutes", "setup_minutes", "blocking_seconds", "upload_seconds", "preemption_rate")
        for name in times:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name}: {value} is not 0 or more and finite")
        if self.page:
            path = Path(self.page).expanduser()
            if path.is_dir() or not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
                raise UserError(f"page: {self.page}: cannot be written")
        _ = self.interval_s

    @property
    def recovery_s(self) -> float:
        return 60 * (self.provision_minutes + self.setup_minutes)

    @property
    def interval_s(self) -> float | None:
        """Between two saves; None for auto."""
        if self.checkpoint_every == "auto":
            return None
        try:
            seconds = 60 * float(self.checkpoint_every)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < math.inf:
            raise UserError(f"checkpoint_every: {self.checkpoint_every!r} is neither auto nor minutes above 0")
        return seconds

    def preemptions(self, seed: int) -> Trace:
        """The trace, or one made for the rate."""
        if self.trace:
            return read_trace(self.trace)
        rate = 1 / HOURS_BETWEEN_PREEMPTIONS if self.preemption_rate is None else self.preemption_rate
        return synthetic(rate, self.burst, seed=seed)


@dataclass(frozen=True)
class Candidate:
    """Machines of one kind, at one price, and what the job does on them."""

    estimate: "Estimate"
    offer: Offer
    nodes: int
    spot: bool
    job: Job
    runs: Runs
    warned: Runs
    """The same preemptions with the cloud's notice, where a save fits into it."""

    @property
    def machines(self) -> str:
        return f"{self.nodes} x {self.offer.count} {self.offer.gpu}"

    @property
    def name(self) -> str:
        return f"{self.machines}, {self.offer.cloud}, {self.kind}"

    @property
    def kind(self) -> str:
        return "spot" if self.spot else "on demand"

    @property
    def price(self) -> float:
        """Dollars an hour of all machines together."""
        return self.nodes * self.offer.price(self.spot)

    @cached_property
    def hours(self) -> tuple[float, float]:
        """Median and 90th percentile, without notice; inf: it does not end."""
        return _middle_and_tail(self.runs.hours)

    @cached_property
    def dollars(self) -> tuple[float, float]:
        return _middle_and_tail(self.price * self.runs.paid_hours)

    @property
    def useful(self) -> float:
        """Share of the time that is paid for in which the work is done that counts; median."""
        paid = float(np.median(self.runs.paid_hours))
        return self.estimate.hours / paid if paid < math.inf else 0.0


@dataclass(frozen=True)
class Comparison:
    """All candidates, and what they were made of."""

    candidates: list[Candidate]
    """Cheapest median first."""
    left_out: dict[str, list[str]]
    """Kinds and numbers of GPUs without a candidate, by the reason."""
    doubted: list[Offer]
    """Offers of the same GPUs with a price that is not believed."""
    trace: Trace
    config: SpotConfig


def compare(
    found: Sequence["Estimate"],
    offers: Sequence[Offer],
    trace: Trace,
    checkpoint_bytes: float,
    config: SpotConfig,
    seed: int = 0,
) -> Comparison:
    """Run each of `found` (of fastft.cost.estimate.estimates: a kind and a number of GPUs) on every cloud that has it.

    Of a cloud's machines the largest is taken that divides the number of GPUs, at its cheapest believed place. Raises
    ValueError where no candidate is left.
    """
    rows, left_out = [], {}
    for e in found:
        machines = _machines(e, offers)
        if e.fits not in ("yes", "tight"):
            reason = "the model does not fit" if e.fits == "no" else e.fits.removeprefix("no: ") + " does not divide"
        else:
            reason = "" if machines else "no such machine, or no believed price"
        if reason:
            left_out.setdefault(reason, []).append(f"{e.count} x {e.gpu.name}")
            continue
        measured: dict[tuple, tuple[Job, Runs, Runs]] = {}  # a price changes nothing but the dollars
        for offer, spot in machines:
            nodes = e.count // offer.count
            key = nodes, spot, NOTICE_S.get(offer.cloud, 0.0)
            if key not in measured:
                job = _job(e, nodes, trace if spot else None, checkpoint_bytes, config)
                measured[key] = _measure(job, key[-1], trace if spot else None, seed)
            rows.append(Candidate(e, offer, nodes, spot, *measured[key]))
    if not rows:
        raise UserError(
            "spot: nothing to compare; " + "; ".join(f"{why}: {', '.join(w)}" for why, w in left_out.items())
        )
    shown = {row.offer.gpu for row in rows}
    doubted = [o for o in offers if o.gpu in shown and (o.on_demand_doubt or o.spot_doubt)]
    return Comparison(sorted(rows, key=lambda c: (c.dollars, c.name)), left_out, doubted, trace, config)


def _machines(e: "Estimate", offers: Sequence[Offer]) -> list[tuple[Offer, bool]]:
    """(offer, spot) by cloud: its largest machine that divides the GPUs."""
    found = []
    for cloud in dict.fromkeys(offer.cloud for offer in offers):
        for spot in (True, False):
            sizes = {o.count for o in offers if o.cloud == cloud and o.gpu == e.gpu.name and e.count % o.count == 0}
            priced = (cheapest(offers, e.gpu.name, size, cloud, spot) for size in sorted(sizes, reverse=True))
            if offer := next(filter(None, priced), None):
                found.append((offer, spot))
    return found


def _job(e: "Estimate", nodes: int, trace: Trace | None, checkpoint_bytes: float, config: SpotConfig) -> Job:
    """The work of the estimate with the costs of saves and recoveries."""
    blocking_s, upload_s = config.blocking_seconds, config.upload_seconds
    blocking_s = checkpoint_bytes / e.count / STAGED if blocking_s is None else blocking_s
    upload_s = checkpoint_bytes / nodes / PUBLISHED if upload_s is None else upload_s
    interval_s = config.interval_s
    if interval_s is None:
        between_s = mean_between_preemptions(trace, nodes) if trace else 3600 * HOURS_BETWEEN_PREEMPTIONS / nodes
        interval_s = max(young_interval(blocking_s, between_s, upload_s), SMALL_S)
    return Job(3600 * e.hours, nodes, config.recovery_s, blocking_s, upload_s, interval_s)


def _measure(job: Job, notice_s: float, trace: Trace | None, seed: int) -> tuple[Job, Runs, Runs]:
    """(the job, its runs without notice, with it) on spot machines; without a trace, on machines that stay."""
    if trace is None:
        return job, undisturbed(job), undisturbed(job)
    runs, warned = simulate(job, trace, seed=seed), replace(job, notice_s=notice_s)
    return job, runs, simulate(warned, trace, seed=seed) if warned.saves_on_notice else runs


def _middle_and_tail(values: np.ndarray) -> tuple[float, float]:
    """Median and 90th percentile; neither between two runs, of which one may be inf."""
    middle, tail = np.quantile(values, [0.5, 0.9], method="higher")
    return float(middle), float(tail)
