"""Decide when a request to an endpoint may start: its limits a minute, how many are on the way, and the pauses it asks for.

    line = Line([Pace(Limits(concurrency=16, rpm=300)), Pace(Limits(rpm=18))])     # one model at two endpoints
    place, started = await line.turn(order=0, tokens=1200)                         # waits; place is 0 or 1
    line.paces[place].answered()                                                   # or .overloaded(started, pause_s=2)
    line.end(place)

How many are on the way is controlled as TCP controls its packets (additive increase, multiplicative decrease; RFC 5681): an
endpoint that says it is overloaded gets half as many at a time. If it names a time to wait, nothing starts before that time is
over; then one request starts, and each answer makes room for one more, until half of the earlier number is reached. From there
on the number grows by one in each round.
"""

import asyncio
import heapq
import math
import time

from fastft.inference.endpoint import Limits

CATCH_UP_S = 0.05  # how late a start may be without delaying all after it: an event loop wakes up late under load


class Pace:
    """When the next request to one endpoint may start."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.window = float(limits.concurrency)  # how many may be on the way
        self.threshold = math.inf  # below it, each answer makes room for one more
        self.on_the_way, self.round = 0, 0
        self.next_at = self.paused_until = 0.0

    def wait_s(self) -> float:
        """Return 0 if a request may start now, the seconds until one may, or infinity if another must end before."""
        if self.on_the_way >= int(self.window):
            return math.inf
        return max(0.0, max(self.next_at, self.paused_until) - time.monotonic())

    def start(self, tokens: int) -> int:
        """Count a request of so many tokens as on the way. Returns the round in which it started, for `overloaded`."""
        rpm, tpm = self.limits.rpm, self.limits.tpm
        self.on_the_way += 1
        apart = max(60 / rpm if rpm else 0.0, 60 * tokens / tpm if tpm else 0.0)
        self.next_at = max(self.next_at, time.monotonic() - CATCH_UP_S) + apart
        return self.round

    def end(self) -> None:
        """Count a request as ended."""
        self.on_the_way -= 1

    def answered(self) -> None:
        """Make room for more requests, after one was answered."""
        grown = self.window + (1 if self.window < self.threshold else 1 / self.window)
        self.window = min(grown, float(self.limits.concurrency))

    def overloaded(self, started: int, pause_s: float) -> None:
        """Halve what is on the way, once for all requests that were on the way together, and pause for `pause_s` seconds.

        `started` is the round in which the request that was refused had started.
        """
        if started == self.round:
            self.threshold = max(1.0, min(self.window, self.on_the_way) / 2)
            self.window, self.round = self.threshold, self.round + 1
        if pause_s > 0:
            self.pause(pause_s)

    def pause(self, pause_s: float) -> None:
        """Start nothing for `pause_s` seconds, and then one request."""
        self.window, self.paused_until = 1.0, max(self.paused_until, time.monotonic() + pause_s)


class Line:
    """Requests that wait for their turn at any of several endpoints, the one with the lowest number first."""

    def __init__(self, paces: list[Pace]):
        self.paces = paces
        self.waiting: list[tuple[int, int, asyncio.Future]] = []
        self.timer: asyncio.TimerHandle | None = None

    async def turn(self, order: int, tokens: int) -> tuple[int, int]:
        """Wait until a request may start. Returns (the endpoint's index, the round); the request counts as on the way there.

        `order` must differ from that of every other request that waits. A request that is tried again keeps its number, and
        so comes before those that have not been tried yet.
        """
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self.waiting, (order, tokens, future))
        self.serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.end(future.result()[0])
            raise

    def end(self, place: int) -> None:
        """Count a request to this endpoint as ended, and let others start."""
        self.paces[place].end()
        self.serve()

    def serve(self) -> None:
        """Let all requests start that may start now, and come back when the next one may."""
        while self.waiting:
            _, tokens, future = self.waiting[0]
            if future.done():  # cancelled
                heapq.heappop(self.waiting)
                continue
            waits = [pace.wait_s() for pace in self.paces]
            free = [place for place, wait in enumerate(waits) if not wait]
            if not free:
                self._come_back(min(waits))
                return
            heapq.heappop(self.waiting)
            place = min(free, key=lambda each: self.paces[each].on_the_way / self.paces[each].window)
            future.set_result((place, self.paces[place].start(tokens)))

    def close(self, error: type[Exception]) -> None:
        """Let nobody start any more: who waits gets an `error`."""
        waiting, self.waiting = self.waiting, []
        for _, _, future in waiting:
            if not future.done():
                future.set_exception(error())

    def _come_back(self, wait_s: float) -> None:
        if self.timer:
            self.timer.cancel()
        # Where another request must end before, its end calls `serve`.
        self.timer = None if wait_s == math.inf else asyncio.get_running_loop().call_later(wait_s, self.serve)
