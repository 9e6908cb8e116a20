"""A full-ranking evaluation: each retriever, the merge, and each stage with the language model."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmrec.evaluation.split import Part
from llmrec.metrics import Comparison, Ranks, compare, summary
from llmrec.pipeline import LM, Pipeline
from llmrec.protocols import Codes, Mask, Query
from llmrec.recipe import ranks_in

LISTED = 100
"""Length of the ranked lists; a target further down counts as not found."""

CHUNK = 128
"""Users at once, so that masks and scores stay small."""


@dataclass(frozen=True, slots=True)
class Systems:
    """Ranks of the target of each user, by system, over the same users."""

    ranks: dict[str, Ranks]
    comparisons: list[Comparison] = field(default_factory=list)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Mean measures by system."""
        return {name: summary(ranks) for name, ranks in self.ranks.items()}


def run_systems(
    part: Part,
    pipeline: Pipeline,
    active: Mask,
    exclude_seen: bool,
    *,
    with_lm: bool,
    on_users: Callable[[int], None] = lambda done: None,
) -> Systems:
    """Rank the catalogue for every user of a part with each system.

    Systems are each retriever that can answer from a history, ``merge`` (the pipeline without the
    language model) and ``default`` (what is served; not there if that needs the language model and
    `with_lm` is False); with the language model also ``lm`` (alone, over
    the whole catalogue) and ``lm_top100`` (its order of the merge's first hundred).
    """
    found: dict[str, list[Codes]] = {}
    for start in range(0, len(part), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(part)))
        queries = part.take(rows).held_out(active, exclude_seen).queries
        for name, lists in _lists(queries, pipeline, with_lm).items():
            found.setdefault(name, []).extend(lists)
        on_users(len(rows))
    systems = Systems({name: ranks_in(lists, part.targets) for name, lists in found.items()})
    pairs = [("default", "merge"), (LM, "merge"), ("lm_top100", "merge")] if with_lm else []
    best = max(
        (n for n in systems.ranks if n not in ("merge", "default", LM, "lm_top100")),
        key=lambda n: summary(systems.ranks[n])["ndcg@10"],
    )
    comparisons = [
        compare(systems.ranks, a, b, m)
        for a, b in [*pairs, ("merge", best)]
        for m in ("ndcg@10", "recall@10")
    ]
    return replace(systems, comparisons=comparisons)


def _lists(queries: Sequence[Query], pipeline: Pipeline, with_lm: bool) -> dict[str, list[Codes]]:
    alone = {
        n: r for n, r in pipeline.retrievers.items() if n not in ("bm25", "text") and (with_lm or n != LM)
    }
    lists = {n: [h.items for h in r.retrieve(queries, LISTED)] for n, r in alone.items()}
    plain = replace(pipeline, history=replace(pipeline.history, lm=0.0))
    merged = plain.recommend(queries, LISTED)
    lists["merge"] = [c.items for c in merged]
    if with_lm and pipeline.scorer is not None:
        scores = pipeline.scorer.score(queries, [c.items for c in merged])
        lists["lm_top100"] = [
            c.items[np.argsort(-s, kind="stable")] for c, s in zip(merged, scores, strict=True)
        ]
    if pipeline.history.lm == 0:
        lists["default"] = lists["merge"]
    elif with_lm:
        lists["default"] = [c.items for c in pipeline.recommend(queries, LISTED)]
    return lists


def latency(pipeline: Pipeline, queries: Sequence[Query], fresh: Callable[[], None]) -> dict[str, float]:
    """Median seconds a request: cold (nothing cached), repeated, and in a batch of 32 cold ones.

    `fresh` drops the caches.
    """
    if not queries:
        return {}
    single, repeated = [], []
    for query in queries[:20]:
        fresh()
        begun = time.perf_counter()
        pipeline.recommend([query], 10)
        single.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        pipeline.recommend([query], 10)
        repeated.append(time.perf_counter() - begun)
    batch = [queries[i % len(queries)] for i in range(32)]
    times = []
    for _ in range(3):
        fresh()
        begun = time.perf_counter()
        pipeline.recommend(batch, 10)
        times.append((time.perf_counter() - begun) / 32)
    return {
        "single_seconds": float(np.median(single)),
        "repeated_seconds": float(np.median(repeated)),
        "batch32_seconds_per_request": float(np.median(times)),
    }


def peak_memory_mb() -> float:
    """Most memory this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
