"""What the gateway's /metrics shows: requests, tries that failed, times, and what runs now."""

from collections.abc import Callable

from fastft.serve.gateway.events import ServedTurn

NO_FAILURES = ("answered", "refused", "error", "cancelled")
"""Outcomes of a try that do not mean that the worker failed to answer."""


class GatewayFigures:
    """What /metrics shows. What runs now is asked when somebody looks."""

    def __init__(self, in_flight: Callable[[], int], workers: Callable[[], int], record_lost: Callable[[], int]):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()
        prefix = "fastft_gateway_"
        labels = ["model", "outcome"]
        self.requests = Counter(prefix + "requests", "Requests by how they ended.", labels, registry=registry)
        self.refused = Counter(prefix + "refused", "Requests that reached no worker.", ["code"], registry=registry)
        self.tries = Counter(prefix + "failed_tries", "Tries of workers that failed.", ["outcome"], registry=registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.seconds = Histogram(
            prefix + "seconds", "From the request to the end of its answer.", buckets=buckets, registry=registry
        )
        buckets = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
        self.decisions = Histogram(
            prefix + "decision_seconds",
            "Time that a policy took to choose a model.",
            ["policy"],
            buckets=buckets,
            registry=registry,
        )
        for name, text, value in (
            ("in_flight", "Requests being answered.", in_flight),
            ("workers", "Workers that can answer.", workers),
            ("record_lost", "Events that could not be written.", record_lost),
        ):
            Gauge(prefix + name, text, registry=registry).set_function(value)

    def ended(self, turn: ServedTurn) -> None:
        self.requests.labels(turn.chosen, turn.outcome).inc()
        self.seconds.observe(turn.total_s)
        if turn.decision_s is not None:
            self.decisions.labels(turn.policy).observe(turn.decision_s)
        for each in turn.tries:
            if each["outcome"] not in NO_FAILURES:
                self.tries.labels(each["outcome"]).inc()
