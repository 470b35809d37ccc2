"""Hours and dollars of a job on every machine that the catalog offers, spot and on demand: `fastft estimate --spot`.

    config = SpotConfig(spot=True)
    found = compare(estimates, read_prices(config.prices), config.preemptions(seed=0), checkpoint_bytes, config).candidates
    print(found[0].name, found[0].dollars)      # the cheapest: (median, 90th percentile) of the runs

The hours of work come from fastft.cost.estimate and the prices from fastft.cost.spot.prices. What preemptions add comes from
fastft.cost.spot.simulate, which runs each candidate some hundred times, beginning at random times of a trace.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastft.config import HOURS_BETWEEN_PREEMPTIONS
from fastft.cost.estimate import Estimate
from fastft.cost.spot.prices import Offer, cheapest
from fastft.cost.spot.simulate import Job, Runs, mean_between_preemptions, simulate, undisturbed
from fastft.cost.spot.traces import Trace, read_trace, synthetic
from fastft.cost.spot.young import young_interval
from fastft.errors import UserError

STAGED = 5e9
"""Bytes a second from a GPU to its host's memory, for which the steps wait. (PCIe 4 does 25e9, but two GPUs may share it.)"""
PUBLISHED = 0.4e9
"""Bytes a second from a machine to the bucket: the slower of its network and its disk (437 MB/s for SkyPilot's disk_tier high
on AWS)."""
NOTICE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""Seconds between the warning and the preemption, as these clouds document them (best effort). Other clouds do not warn."""
SHORTEST_INTERVAL_S = 1.0
"""The least seconds between two saves, because an interval shorter than a step makes no sense."""


@dataclass
class SpotConfig:
    """Options of `fastft estimate --spot`: machines with their prices, preemptions and saves."""

    spot: bool = False
    """Compare the machines of a price catalog, spot and on demand, in dollars and hours."""
    prices: str = "v8"
    """Catalogs, separated by commas: v8 or 2023, which come with fastft, SkyPilot's …/aws/vms.csv, or a CSV with the columns
    cloud, gpu, count, region, on_demand, spot."""
    opt_in_zones: bool = False
    """Also choose AWS's Local Zones, Wavelength Zones and regions that an account has to turn on first."""
    trace: str | None = None
    """A recorded trace to replay: availability or preemption (JSON), bamboo (text)."""
    preemption_rate: float | None = None
    """Preemptions per node and hour, where there is no trace; by default one in 3 hours."""
    burst: float = 1.0
    """How many nodes of a fleet of 64 are preempted at once, on average. The larger it is, the fewer stops a run on several
    nodes has."""
    provision_minutes: float = 4.0
    """Minutes from free capacity to a machine that runs commands."""
    setup_minutes: float = 2.0
    """Minutes from running commands to the first step: environment, weights, checkpoint."""
    checkpoint_every: str = "auto"
    """Minutes of work between two saves; auto: Young's interval."""
    blocking_seconds: float | None = None
    """How long a save holds up the steps; by default the time to copy it into the host's memory."""
    upload_seconds: float | None = None
    """How long a save then takes until it is safe in the bucket; by default the time for 0.4 GB/s per machine."""
    page: str | None = None
    """Write the table and its plots to this HTML file."""

    def __post_init__(self) -> None:
        changed = [name for name, value in vars(self).items() if value != getattr(SpotConfig, name)]
        if changed and not self.spot:
            raise UserError(f"{changed[0]}: only with --spot")
        if self.trace and self.preemption_rate is not None:
            raise UserError("preemption_rate: the trace has a rate of its own; give one of the two")
        times = ("provision_minutes", "setup_minutes", "blocking_seconds", "upload_seconds", "preemption_rate")
        for name in times:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name}: {value} is not 0 or more and finite")
        if self.page:
            path = Path(self.page).expanduser()
            if path.is_dir() or not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
                raise UserError(f"page: {self.page}: cannot be written; name a file in a directory that exists")
        _ = self.interval_s  # raises UserError for a wrong `checkpoint_every`

    @property
    def recovery_s(self) -> float:
        """Seconds from free capacity to the first step."""
        return 60 * (self.provision_minutes + self.setup_minutes)

    @property
    def interval_s(self) -> float | None:
        """Seconds between two saves; None for auto."""
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
        """The recorded trace, or one made up for the rate of preemptions."""
        if self.trace:
            return read_trace(self.trace)
        rate = 1 / HOURS_BETWEEN_PREEMPTIONS if self.preemption_rate is None else self.preemption_rate
        return synthetic(rate, self.burst, seed=seed)


@dataclass(frozen=True)
class MachineCandidate:
    """Machines of one kind, at one price, and what the job does on them."""

    estimate: Estimate
    offer: Offer
    nodes: int
    spot: bool
    job: Job
    runs: Runs
    warned: Runs
    """Runs with the same preemptions in which the cloud's notice is used to save, if a save fits into it."""

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
        """Dollars per hour for all machines together."""
        return self.nodes * self.offer.price(self.spot)

    @cached_property
    def hours(self) -> tuple[float, float]:
        """Median and 90th percentile of the hours without notice; inf for a run that does not end."""
        return _median_and_90th(self.runs.hours)

    @cached_property
    def dollars(self) -> tuple[float, float]:
        """Median and 90th percentile of the dollars without notice."""
        return _median_and_90th(self.price * self.runs.paid_hours)

    @property
    def useful(self) -> float:
        """Share of the paid time, in the median run, that is spent on steps which need not be done again."""
        paid = float(np.median(self.runs.paid_hours))
        return self.estimate.hours / paid if paid < math.inf else 0.0


@dataclass(frozen=True)
class MachineComparison:
    """All candidates, and what they were computed from."""

    candidates: list[MachineCandidate]
    """Ordered by their median dollars, the cheapest first."""
    left_out: dict[str, list[str]]
    """Maps a reason to the kinds and numbers of GPUs for which it left no candidate."""
    doubted: list[Offer]
    """Offers of the candidates' GPUs whose price is doubted."""
    opt_in: list[Offer]
    """Offers of the candidates' GPUs that need an opt-in of the account; they are not chosen without `opt_in_zones`."""
    trace: Trace
    config: SpotConfig


def compare(
    found: Sequence[Estimate],
    offers: Sequence[Offer],
    trace: Trace,
    checkpoint_bytes: float,
    config: SpotConfig,
    seed: int = 0,
) -> MachineComparison:
    """Simulate each estimate (a kind and a number of GPUs) on every cloud that has such machines.

    Of a cloud's machines it takes the largest whose GPUs divide the number, in the region with the cheapest believed price.
    Regions and zones that need an opt-in count only with `config.opt_in_zones`. Raises UserError if no candidate is left.
    """
    rows, left_out = [], {}
    usable = [offer for offer in offers if config.opt_in_zones or not offer.opt_in]
    for e in found:
        machines = _machines(e, usable)
        if reason := _reason_against(e, machines):
            left_out.setdefault(reason, []).append(f"{e.count} x {e.gpu.name}")
            continue
        measured: dict[tuple, tuple[Job, Runs, Runs]] = {}  # offers that differ in their price alone share a simulation
        for offer, spot in machines:
            nodes = e.count // offer.count
            key = nodes, spot, NOTICE_S.get(offer.cloud, 0.0)
            if key not in measured:
                job = _job(e, nodes, trace if spot else None, checkpoint_bytes, config)
                measured[key] = _measure(job, key[-1], trace if spot else None, seed)
            rows.append(MachineCandidate(e, offer, nodes, spot, *measured[key]))
    if not rows:
        raise UserError(
            "spot: nothing to compare; " + "; ".join(f"{why}: {', '.join(w)}" for why, w in left_out.items())
        )
    shown = {row.offer.gpu for row in rows}
    doubted = [o for o in offers if o.gpu in shown and (o.on_demand_doubt or o.spot_doubt)]
    opt_in = [o for o in offers if o.gpu in shown and o.opt_in and o not in doubted]
    rows.sort(key=lambda c: (c.dollars, c.name))
    return MachineComparison(rows, left_out, doubted, opt_in, trace, config)


def _reason_against(e: Estimate, machines: list[tuple[Offer, bool]]) -> str:
    """Why there is no candidate for an estimate; empty if there is one."""
    if e.fits == "no":
        return "the model does not fit"
    if e.fits.startswith("no: "):
        return f"{e.fits.removeprefix('no: ')} does not divide"
    return "" if machines else "no such machine, or no price that may be chosen"


def _machines(e: Estimate, offers: Sequence[Offer]) -> list[tuple[Offer, bool]]:
    """(offer, whether it is spot) of each cloud's largest machine whose number of GPUs divides the estimate's."""
    found = []
    for cloud in dict.fromkeys(offer.cloud for offer in offers):
        for spot in (True, False):
            sizes = {o.count for o in offers if o.cloud == cloud and o.gpu == e.gpu.name and e.count % o.count == 0}
            priced = (cheapest(offers, e.gpu.name, size, cloud, spot) for size in sorted(sizes, reverse=True))
            if offer := next(filter(None, priced), None):
                found.append((offer, spot))
    return found


def _job(e: Estimate, nodes: int, trace: Trace | None, checkpoint_bytes: float, config: SpotConfig) -> Job:
    """The estimated work, plus the time for saves and recoveries."""
    blocking_s, upload_s = config.blocking_seconds, config.upload_seconds
    blocking_s = checkpoint_bytes / e.count / STAGED if blocking_s is None else blocking_s
    upload_s = checkpoint_bytes / nodes / PUBLISHED if upload_s is None else upload_s
    interval_s = config.interval_s
    if interval_s is None:
        between_s = mean_between_preemptions(trace, nodes) if trace else 3600 * HOURS_BETWEEN_PREEMPTIONS / nodes
        interval_s = max(young_interval(blocking_s, between_s, upload_s), SHORTEST_INTERVAL_S)
    return Job(3600 * e.hours, nodes, config.recovery_s, blocking_s, upload_s, interval_s)


def _measure(job: Job, notice_s: float, trace: Trace | None, seed: int) -> tuple[Job, Runs, Runs]:
    """(the job, its runs without notice, its runs with notice). Without a trace the machines are never preempted."""
    if trace is None:
        return job, undisturbed(job), undisturbed(job)
    runs, warned = simulate(job, trace, seed=seed), replace(job, notice_s=notice_s)
    return job, runs, simulate(warned, trace, seed=seed) if warned.saves_on_notice else runs


def _median_and_90th(values: np.ndarray) -> tuple[float, float]:
    """Median and 90th percentile. Each is the value of one run, because the mean of two would be inf if one of them is."""
    median, percentile = np.quantile(values, [0.5, 0.9], method="higher")
    return float(median), float(percentile)
