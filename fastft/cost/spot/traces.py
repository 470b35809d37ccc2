"""The capacity of spot machines over time: readers of recorded traces, and a generator of traces like them.

    trace = read_trace("a100x1-east1b.txt")
    rate, burst = fit(trace)                        # preemptions per node and hour, and how many nodes are lost at once
    trace = synthetic(rate, burst, hours=27, seed=0)

A trace says how many instances there were between each of its times and the next. When the number falls by k, k instances
were preempted in one burst. The format of a file is recognised by its content:

- availability and preemption (skypilot-org/spot-traces, NSDI'24): a JSON object {"metadata": {"gap_seconds": 600}, "data":
  [1, 1, 0, …]}, with the number of instances every `gap_seconds`;
- bamboo (uclasystem/bamboo): lines `2021-12-11, 11:11:30, 55`, each a time and the number of instances at that time, of a
  fleet that is always refilled.
"""

import heapq
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from fastft.errors import UserError

FLEET = 64
"""Nodes of a synthetic trace; bamboo's fleet has as many."""
MOST_AN_HOUR = 60.0
"""Most preemptions of a node in an hour that are accepted. A machine cannot even be provisioned in less than a minute."""
REFILL_S = 600.0
"""Mean seconds until a synthetic fleet has replaced a lost node."""


@dataclass(frozen=True)
class Trace:
    """Numbers of instances over time, with an entry for each change."""

    name: str
    times: np.ndarray
    """When each entry begins, in seconds, rising from 0."""
    counts: np.ndarray
    """The number of instances during each entry."""
    end_s: float
    """When the last entry ends, in seconds."""

    @property
    def most(self) -> int:
        """The largest number of instances."""
        return int(self.counts.max())


def read_trace(path: str | Path) -> Trace:
    """Read a recorded trace. Raises UserError with one line for a file that is missing, broken or of another format."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"trace: {path}: no such file") from None
    except OSError as error:
        raise UserError(f"trace: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(_unknown(path)) from None
    if text.lstrip().startswith("{"):
        times, counts, end_s = _read_json(text, path)
    else:
        times, counts, end_s = _read_lines(text, path)
    if not counts.any():
        raise UserError(f"trace: {path}: has no instance at any time")
    return _without_repeats(path.stem, times, counts, end_s)


def _read_json(text: str, path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(times, counts, end) of a trace with a number of instances every `gap_seconds`."""
    try:
        values = json.loads(text)
        gap, counts = values["metadata"]["gap_seconds"], np.array(values["data"])
    except (ValueError, KeyError, TypeError):
        raise UserError(_unknown(path)) from None
    if not isinstance(gap, (int, float)) or not 0 < gap < math.inf:
        raise UserError(f"trace: {path}: gap_seconds {gap!r} is not a time")
    if counts.ndim != 1 or len(counts) < 2 or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise UserError(f"trace: {path}: data is not a list of two or more numbers of instances")
    return gap * np.arange(len(counts), dtype=float), counts, float(gap * len(counts))


def _read_lines(text: str, path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """(times, counts, end) of a trace with a line for each change."""
    timestamps, counts = [], []
    for line in filter(str.strip, text.splitlines()):
        try:
            day, clock, count = (part.strip() for part in line.split(","))
            timestamps.append(datetime.fromisoformat(f"{day}T{clock}").timestamp())
            counts.append(int(count))
        except ValueError:
            raise UserError(_unknown(path)) from None
    times = np.array(timestamps)
    if len(times) < 2 or np.diff(times).min() < 0 or times[-1] == times[0] or min(counts) < 0:
        raise UserError(f"trace: {path}: expected at least two lines, in order of time, with numbers of instances")
    return times - times[0], np.array(counts), float(times[-1] - times[0])


def _unknown(path: Path) -> str:
    """The error for a file of another format."""
    return f"trace: {path} has no known format: JSON with metadata.gap_seconds and data, or lines `2021-12-11, 11:11:30, 55`"


def _without_repeats(name: str, times: np.ndarray, counts: np.ndarray, end_s: float) -> Trace:
    """Make a trace, leaving out entries whose number of instances is that of the entry before."""
    keep = np.append(True, np.diff(counts) != 0) & (times < end_s)
    return Trace(name, times[keep], counts[keep], end_s)


def fit(trace: Trace) -> tuple[float, float]:
    """(preemptions per node and hour, mean size of a burst) of a trace; (0, 1) if it has no preemption.

    Preemptions at most 60 s apart count as one burst, because recorders poll and see the nodes of a burst one after the other.
    """
    falls = -np.minimum(np.diff(trace.counts), 0)
    at = trace.times[1:][falls > 0]
    lost = int(falls.sum())
    if not lost:
        return 0.0, 1.0
    bursts = 1 + int((np.diff(at) > 60).sum())
    node_hours = float((trace.counts * np.diff(trace.times, append=trace.end_s)).sum()) / 3600
    return lost / node_hours, lost / bursts


def synthetic(rate: float, burst: float = 1.0, hours: float = 24 * 7, seed: int = 0) -> Trace:
    """Make up the trace of a fleet whose nodes are each preempted `rate` times an hour on average, and then replaced.

    Bursts are a Poisson process, and their sizes are geometric with mean `burst`. Raises UserError for a rate that is
    negative or too large, and for a burst below 1 or above the fleet.
    """
    if not 0 <= rate <= MOST_AN_HOUR:
        raise UserError(
            f"preemption_rate: {rate} is not between 0 and {MOST_AN_HOUR:g} a node and hour; no machine is set up faster"
        )
    if not 1 <= burst <= FLEET:
        raise UserError(f"burst: {burst} is not between 1 and {FLEET} nodes")
    random = np.random.default_rng(seed)
    end_s = 3600 * hours
    number = random.poisson(rate * FLEET / burst * hours)
    falls = np.sort(random.uniform(0, end_s, number))
    sizes = np.minimum(random.geometric(1 / burst, number), FLEET)
    times, counts, up = [0.0], [FLEET], FLEET
    events = [(float(at), -int(size)) for at, size in zip(falls, sizes)]
    heapq.heapify(events)
    while events and events[0][0] < end_s:
        at, change = heapq.heappop(events)
        if change < 0 and random.random() * FLEET >= up:  # with fewer nodes up, bursts are rarer in proportion
            continue
        change = max(change, -up)
        for _ in range(-change):
            heapq.heappush(events, (at + random.exponential(REFILL_S), 1))
        up += change
        times.append(at)
        counts.append(up)
    return _without_repeats(
        f"synthetic, {rate:.3g} a node and hour, {burst:.3g} at once", np.array(times), np.array(counts), end_s
    )
