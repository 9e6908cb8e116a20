"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llmrec.serve.batching import Load
from llmrec.serve.service import Service

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"})
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SUFFIX = ".prom"


SHARED_SECONDS = 1.0
"""How often a process leaves what it counts for the others."""


class Metrics:
    """Counters of one app, in a registry of their own. Labels are routes, never ids.

    Parameters
    ----------
    folder
        Where the processes of one server leave their values, so that each tells the sums; None for one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
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
        """All values: those of all processes, where there are several."""
        if self._folder is None:
            return generate_latest(self._registry)
        self._put()
        return generate_latest(_Sums(self._folder))

    async def share(self) -> None:
        """Leave the values for other processes every second, and once more when this is cancelled."""
        if self._folder is None:
            return
        try:
            while True:
                self._put()
                await asyncio.sleep(SHARED_SECONDS)
        finally:
            self._put()

    def _put(self) -> None:
        assert self._folder is not None
        draft = self._folder / f".{os.getpid()}"
        draft.write_bytes(generate_latest(self._registry))
        draft.replace(self._folder / f"{os.getpid()}{_SUFFIX}")


class _Sums(Collector):
    """What several processes left. One that has ended still counts, but nothing is under way in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        sums: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            alive = _alive(int(path.stem))
            for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    if sample.name.endswith("_created") or (family.type == "gauge" and not alive):
                        continue
                    key = (family.name, sample.name, tuple(sample.labels.items()))
                    old = sums.get(key, 0.0)
                    # How long a request would take is no sum.
                    longest = family.name == "llmrec_expected_seconds"
                    sums[key] = max(old, sample.value) if longest else old + sample.value
        for (family_name, name, labels), value in sums.items():
            families[family_name].add_sample(name, dict(labels), value)
        yield from families.values()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _pending(load: Load) -> float:
    return load.pending


def _seconds(load: Load) -> float:
    return load.expected()
