"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from llmrec.serve.batching import Load
from llmrec.serve.service import Service

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"})
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one app, in a registry of their own. Labels are routes, never ids."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "llmrec_requests", "Answers by route and status.", ["method", "route", "status"], **kept
        )
        self._seconds = Histogram("llmrec_request_seconds", "Time to answer.", ["route"], **kept)
        self._batches = Histogram("llmrec_batch_size", "Requests in a batch.", buckets=SIZES, **kept)
        self._degraded = Counter(
            "llmrec_degraded", "Answers without the language model to keep a budget.", **kept
        )

    def watch(self, service: Service) -> None:
        """Show how much is under way, and how long one more request would take."""
        pending = Gauge("llmrec_pending", "Requests under way.", ["lane"], registry=self._registry)
        share = Gauge(
            "llmrec_expected_seconds",
            "Time until a request that comes now is answered.",
            ["lane"],
            registry=self._registry,
        )
        lanes = {"lm": service.with_lm.load, "plain": service.without_lm.load, "pool": service.pool.load}
        for lane, load in lanes.items():
            pending.labels(lane).set_function(partial(_pending, load))
            share.labels(lane).set_function(partial(_seconds, load))

    def on_batch(self, size: int, degraded: int) -> None:
        """Count a batch."""
        self._batches.observe(size)
        self._degraded.inc(degraded)

    def on_done(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count an answer. Other paths than routes and unknown methods are one label: anybody makes them."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All values."""
        return generate_latest(self._registry)


def _pending(load: Load) -> float:
    return load.pending


def _seconds(load: Load) -> float:
    return load.expected()
