"""Simulate a job on spot machines, beginning at random times of a trace: its hours, the hours that are paid, the lost work.

    runs = simulate(Job(work_s=86400, nodes=1, recovery_s=360, blocking_s=2, upload_s=160, interval_s=600), trace)
    runs.hours, runs.paid_hours, runs.lost_s, runs.preemptions              # arrays, one entry a run

The job's nodes are a gang: the job runs on all of them or not at all. It waits until the trace has room for all its nodes.
When one of them is preempted, the whole gang stops, is provisioned and set up again, and resumes from the newest checkpoint
that was safe in the bucket. Which of the trace's nodes are the gang's is drawn anew at each preemption: if k of c nodes are
lost, the gang keeps all its n nodes with probability C(c - n, k) / C(c, k). If the trace has fewer nodes than the gang,
several copies of it are added up, each shifted by a random time. If the job is longer than the trace, the trace is repeated;
passing from its end to its beginning is no preemption.
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
"""A run is given up, with inf hours, once it has taken this many times its work."""


@dataclass(frozen=True)
class Job:
    """The work of a run, and what preemptions cost it. All times are in seconds."""

    work_s: float
    """Time of the steps alone."""
    nodes: int
    recovery_s: float
    """Provisioning and set-up, which are paid for: from when there is capacity until the first step."""
    blocking_s: float
    """How long a save holds up the steps."""
    upload_s: float
    """How long the save then takes, in the background, until it survives the loss of the node."""
    interval_s: float
    """Work between two saves."""
    notice_s: float = 0.0
    """Time between the warning and the preemption. If a save and its upload fit into it, nothing is lost; else it is useless."""

    def __post_init__(self) -> None:
        assert self.work_s > 0 and self.nodes >= 1 and self.interval_s > 0
        assert min(self.recovery_s, self.blocking_s, self.upload_s, self.notice_s) >= 0

    @property
    def saves_on_notice(self) -> bool:
        """Whether a save and its upload fit into the notice."""
        return 0 < self.notice_s >= self.blocking_s + self.upload_s

    def finish_s(self, done_s: float) -> float:
        """Time from a start, at which `done_s` of the work are done, to the end, including the last save and its upload."""
        left = self.work_s - done_s
        return left + math.ceil(left / self.interval_s) * self.blocking_s + self.upload_s

    def reached_s(self, done_s: float, lasted_s: float) -> tuple[float, float]:
        """(work that is safe, work that is lost) if a start at which `done_s` were done is preempted after `lasted_s`."""
        if self.saves_on_notice:
            return min(done_s + self._worked(lasted_s - self.notice_s), self.work_s), 0.0
        left = self.work_s - done_s
        worked = min(self._worked(lasted_s), left)
        saved = min(self._safe_saves(lasted_s, self.interval_s + self.blocking_s) * self.interval_s, left)
        return done_s + saved, worked - saved

    def _safe_saves(self, lasted_s: float, cycle: float) -> int:
        """The number of the newest save that is safe. Uploads run one after the other, each of the save that is newest then."""
        if self.upload_s <= cycle:
            return max(math.floor((lasted_s - self.upload_s) / cycle), 0)
        uploads = math.floor((lasted_s - cycle) / self.upload_s)
        return math.floor((cycle + (uploads - 1) * self.upload_s) / cycle) if uploads > 0 else 0

    def _worked(self, lasted_s: float) -> float:
        """Work that is done in `lasted_s` of steps and saves."""
        whole, rest = divmod(max(lasted_s, 0.0), self.interval_s + self.blocking_s)
        return whole * self.interval_s + min(rest, self.interval_s)


@dataclass(frozen=True)
class Runs:
    """Results of simulated runs. Each array has one entry for each run."""

    hours: np.ndarray
    """Hours from the launch to the end, including the wait for capacity; inf for a run that does not end."""
    paid_hours: np.ndarray
    """Hours for which each of the nodes is paid; inf for a run that does not end."""
    lost_s: np.ndarray
    """Seconds of work that had to be done again."""
    preemptions: np.ndarray
    """Number of preemptions."""


def undisturbed(job: Job) -> Runs:
    """The job on machines that are never preempted, as a single run."""
    hours = np.array([(job.recovery_s + job.finish_s(0.0)) / 3600])
    return Runs(hours, hours, np.zeros(1), np.zeros(1))


def simulate(job: Job, trace: Trace, runs: int = RUNS, seed: int = 0) -> Runs:
    """Simulate the job `runs` times, each beginning at a random time of the trace. The same seed gives the same runs."""
    random = Random(seed)
    readings = _readings(trace, job.nodes, random)
    results = [_run(job, next(readings), random) for _ in range(runs)]
    return Runs(*(np.array(column) for column in zip(*results)))


def mean_between_preemptions(trace: Trace, nodes: int = 1) -> float:
    """Mean seconds until a gang of `nodes` loses one of them.

    If the trace has no loss, the mean is at least the trace's length, which is returned, or HOURS_BETWEEN_PREEMPTIONS if that
    is longer.
    """
    reading = next(_readings(trace, nodes, Random(0)))
    lengths = np.diff(reading.times, append=trace.end_s)
    there_s = float(lengths[np.array(reading.counts) >= nodes].sum())
    losses = sum(1 - kept for before, kept in zip(reading.counts, reading.kept[1:]) if before >= nodes)
    return there_s / losses if losses else max(trace.end_s, 3600 * HOURS_BETWEEN_PREEMPTIONS)


def survival(before: int, after: int, nodes: int) -> float:
    """The probability that a gang loses no node when a fleet shrinks from `before` nodes to `after`."""
    if after >= before:
        return 1.0
    return math.prod(max(after - i, 0) / (before - i) for i in range(nodes))


@dataclass(frozen=True)
class _Replay:
    """A trace, repeated without end, that is read from `start_s` on.

    Its entries are numbered; numbers beyond the last continue with the next repetition. Entry i lasts from at(i) to at(i +
    1).
    """

    times: list[float]
    counts: list[int]
    kept: list[float]
    """Probability that a gang is kept at the beginning of each entry. From the last entry to the first it loses no node."""
    end_s: float
    start_s: float

    @property
    def first(self) -> int:
        """The number of the entry that is under way at `start_s`."""
        return bisect.bisect_right(self.times, self.start_s) - 1

    def at(self, i: int) -> float:
        """Seconds from `start_s` until entry i begins."""
        repetitions, entry = divmod(i, len(self.times))
        return self.times[entry] + repetitions * self.end_s - self.start_s

    def count(self, i: int) -> int:
        """The number of instances during entry i."""
        return self.counts[i % len(self.counts)]


def _readings(trace: Trace, nodes: int, random: Random) -> Iterator[_Replay]:
    """Readings that begin at random times, without end. Copies of the trace are added up if it has fewer than `nodes`."""
    if trace.most >= nodes:
        times, counts = trace.times.tolist(), trace.counts.tolist()
        kept = _kept(counts, nodes)
        while True:
            yield _Replay(times, counts, kept, trace.end_s, random.uniform(0, trace.end_s))
    while True:
        shifts = [random.uniform(0, trace.end_s) for _ in range(-(-nodes // trace.most))]
        times = np.unique(np.concatenate([[0.0], *((trace.times + shift) % trace.end_s for shift in shifts)]))
        entries = (
            np.searchsorted(trace.times, (times - shift + 1e-6) % trace.end_s, side="right") - 1 for shift in shifts
        )
        counts = sum(trace.counts[entry] for entry in entries).tolist()
        yield _Replay(times.tolist(), counts, _kept(counts, nodes), trace.end_s, random.uniform(0, trace.end_s))


def _kept(counts: list[int], nodes: int) -> list[float]:
    """The probabilities `_Replay.kept` for these numbers of instances."""
    changes = zip(counts, counts[1:])
    return [
        float(counts[0] >= nodes),
        *(survival(before, after, nodes) if before >= nodes else 0.0 for before, after in changes),
    ]


def _run(job: Job, trace: _Replay, random: Random) -> tuple[float, float, float, int]:
    """Simulate one run; return its (hours, paid hours, seconds of lost work, preemptions)."""
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
