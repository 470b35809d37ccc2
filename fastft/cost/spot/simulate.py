"""A job on spot machines, again and again from other moments of a trace: its hours, what is paid, what is lost.

    runs = simulate(Job(work_s=86400, nodes=1, recovery_s=360, blocking_s=2, upload_s=160, interval_s=600), trace)
    runs.hours, runs.paid_hours, runs.lost_s, runs.preemptions              # arrays, one entry a run

A gang: all nodes or none. The job waits until the trace has room for all its nodes; losing one of them loses the gang, the
whole is provisioned and set up again, and goes on from the newest checkpoint that was safe in the bucket. Which of the
trace's nodes are ours is drawn anew: of c nodes k go, so all of our n stay with probability C(c - n, k) / C(c, k). A trace of
fewer nodes than the gang has stands for several, each read from a moment of its own. A job longer than the trace goes on at
its beginning; that seam is no preemption.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from fastft.config import HOURS_BETWEEN_PREEMPTIONS
from fastft.cost.spot.traces import Trace

RUNS = 400
GIVE_UP = 20
"""A run that has taken so many times its work will never end: inf."""


@dataclass(frozen=True)
class Job:
    """What has to be done, and what interruptions cost. All times in seconds."""

    work_s: float
    """Of steps alone."""
    nodes: int
    recovery_s: float
    """From the moment that there is capacity until steps are made: provisioning and set-up. Paid for."""
    blocking_s: float
    """A save holds the steps for so long."""
    upload_s: float
    """Then, in the background, until it is safe from the loss of the node."""
    interval_s: float
    """Work between two saves."""
    notice_s: float = 0.0
    """Warning before a node goes. A save and its upload that fit into it lose nothing; else it is worth nothing."""

    def __post_init__(self) -> None:
        assert self.work_s > 0 and self.nodes >= 1 and self.interval_s > 0
        assert min(self.recovery_s, self.blocking_s, self.upload_s, self.notice_s) >= 0

    @property
    def saves_on_notice(self) -> bool:
        return 0 < self.notice_s >= self.blocking_s + self.upload_s

    def finish_s(self, done_s: float) -> float:
        """From a start with `done_s` of the work behind it to the end, the last save and its upload included."""
        left = self.work_s - done_s
        return left + math.ceil(left / self.interval_s) * self.blocking_s + self.upload_s

    def reached_s(self, done_s: float, lasted_s: float) -> tuple[float, float]:
        """(work that is safe, work that is lost) after a start from `done_s` that was cut off after `lasted_s`."""
        cycle = self.interval_s + self.blocking_s
        made = self._worked(lasted_s)
        if self.saves_on_notice:
            return min(done_s + self._worked(lasted_s - self.notice_s), self.work_s), 0.0
        saved = self._safe_saves(lasted_s, cycle) * self.interval_s
        made, saved = (min(seconds, self.work_s - done_s) for seconds in (made, saved))
        return done_s + saved, made - saved

    def _safe_saves(self, lasted_s: float, cycle: float) -> int:
        """The newest save that is safe. Uploads come one at a time, each of the newest save that there is then."""
        if self.upload_s <= cycle:
            return max(math.floor((lasted_s - self.upload_s) / cycle), 0)
        uploads = math.floor((lasted_s - cycle) / self.upload_s)
        return math.floor((cycle + (uploads - 1) * self.upload_s) / cycle) if uploads > 0 else 0

    def _worked(self, lasted_s: float) -> float:
        """Work after so many seconds of steps and saves."""
        whole, rest = divmod(max(lasted_s, 0.0), self.interval_s + self.blocking_s)
        return whole * self.interval_s + min(rest, self.interval_s)


@dataclass(frozen=True)
class Runs:
    """One entry a run in each array; `hours` is inf for a run that does not end."""

    hours: np.ndarray
    """From the launch, waiting for capacity included."""
    paid_hours: np.ndarray
    """Of each of the nodes."""
    lost_s: np.ndarray
    """Work that was done more than once."""
    preemptions: np.ndarray


def undisturbed(job: Job) -> Runs:
    """The job on machines that stay, as a single run."""
    hours = np.array([(job.recovery_s + job.finish_s(0.0)) / 3600])
    return Runs(hours, hours, np.zeros(1), np.zeros(1))


def simulate(job: Job, trace: Trace, runs: int = RUNS, seed: int = 0) -> Runs:
    """`runs` of the job, each from a random moment of the trace."""
    random = Random(seed)
    readings = _readings(trace, job.nodes, random)
    results = [_run(job, next(readings), random) for _ in range(runs)]
    return Runs(*(np.array(column) for column in zip(*results)))


def mean_between_preemptions(trace: Trace, nodes: int = 1) -> float:
    """Seconds between two losses of a gang, while it is there; where the trace has none, its length, the least it can be."""
    reading = next(_readings(trace, nodes, Random(0)))
    lengths = np.diff(reading.times, append=trace.end_s)
    there_s = float(lengths[np.array(reading.counts) >= nodes].sum())
    losses = sum(1 - kept for before, kept in zip(reading.counts, reading.kept[1:]) if before >= nodes)
    return there_s / losses if losses else max(trace.end_s, 3600 * HOURS_BETWEEN_PREEMPTIONS)


def survival(before: int, after: int, nodes: int) -> float:
    """Chance that a gang loses no node when a fleet falls from `before` nodes to `after`."""
    if after >= before:
        return 1.0
    return math.prod(max(after - i, 0) / (before - i) for i in range(nodes))


@dataclass(frozen=True)
class _Reading:
    """A trace from a moment on, without end: entry i, for i from `first` on, lasts from at(i) to at(i + 1)."""

    times: list[float]
    counts: list[int]
    kept: list[float]
    """Of a gang, at the beginning of each entry; the first follows the last, a seam that is no preemption."""
    end_s: float
    start_s: float

    @property
    def first(self) -> int:
        return bisect.bisect_right(self.times, self.start_s) - 1

    def at(self, i: int) -> float:
        laps, entry = divmod(i, len(self.times))
        return self.times[entry] + laps * self.end_s - self.start_s

    def count(self, i: int) -> int:
        return self.counts[i % len(self.counts)]


def _readings(trace: Trace, nodes: int, random: Random) -> Iterator[_Reading]:
    """From one random moment after the other. Where the trace has fewer nodes than the gang, several lie upon each other."""
    if trace.most >= nodes:
        times, counts = trace.times.tolist(), trace.counts.tolist()
        kept = _kept(counts, nodes)
        while True:
            yield _Reading(times, counts, kept, trace.end_s, random.uniform(0, trace.end_s))
    while True:
        shifts = [random.uniform(0, trace.end_s) for _ in range(-(-nodes // trace.most))]
        times = np.unique(np.concatenate([[0.0], *((trace.times + shift) % trace.end_s for shift in shifts)]))
        entries = (
            np.searchsorted(trace.times, (times - shift + 1e-6) % trace.end_s, side="right") - 1 for shift in shifts
        )
        counts = sum(trace.counts[entry] for entry in entries).tolist()
        yield _Reading(times.tolist(), counts, _kept(counts, nodes), trace.end_s, random.uniform(0, trace.end_s))


def _kept(counts: list[int], nodes: int) -> list[float]:
    changes = zip(counts, counts[1:])
    return [
        float(counts[0] >= nodes),
        *(survival(before, after, nodes) if before >= nodes else 0.0 for before, after in changes),
    ]


def _run(job: Job, trace: _Reading, random: Random) -> tuple[float, float, float, int]:
    """(hours, paid hours, seconds of lost work, preemptions) of one run."""
    i, clock, paid, done, lost, preemptions = trace.first, 0.0, 0.0, 0.0, 0.0, 0
    give_up = GIVE_UP * (job.work_s + job.recovery_s) + 2 * trace.end_s
    while clock < give_up:
        if trace.count(i) < job.nodes:
            i += 1
            clock = max(clock, trace.at(i))
            continue
        end = clock + job.recovery_s + job.finish_s(done)
        while trace.at(i + 1) < end and random.random() < trace.kept[(i + 1) % len(trace.kept)]:
            i += 1
        if trace.at(i + 1) >= end:
            return end / 3600, (paid + end - clock) / 3600, lost, preemptions
        i += 1
        preemptions += 1
        paid += trace.at(i) - clock
        lasted = trace.at(i) - clock - job.recovery_s
        if lasted > 0:
            done, more = job.reached_s(done, lasted)
            lost += more
        clock = trace.at(i)
    return math.inf, math.inf, lost, preemptions
