"""Ranking for held-out users: each retriever, the merge, and each stage with the language model."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmrec.candidates import LM
from llmrec.evaluation.pools import complete
from llmrec.evaluation.probability import Probabilities
from llmrec.evaluation.split import Part
from llmrec.families import FAMILIES
from llmrec.metrics import Comparison, Ranks, compare_all, summary
from llmrec.pipeline import Pipeline
from llmrec.protocols import Codes, Mask, Predictor, Query
from llmrec.recipe import ranks_in

LISTED = 100
"""Length of the ranked lists; a target further down counts as not found."""

SHOWN = 10
"""Items of each list that are kept, for what lists are like besides being right."""

CHUNK = 128
"""Users at once, so that masks and scores stay small."""


@dataclass(frozen=True, slots=True)
class Systems:
    """What each system answered, over the same users.

    Parameters
    ----------
    ranks
        Rank of the target of each user, 0 if it is not in the list, by system.
    shown
        The first `SHOWN` items of each list, by system.
    probabilities, reliability
        Log-loss, Brier score and calibration error of what gives probabilities, by system; and the mean
        confidence and share of hits of each bin.
    comparisons
        Paired differences, corrected for their number.
    """

    ranks: dict[str, Ranks]
    shown: dict[str, list[Codes]] = field(default_factory=dict)
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    reliability: dict[str, list[list[float]]] = field(default_factory=dict)
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
    pools: Sequence[Codes] | None = None,
    best: str | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> Systems:
    """Rank items for every user of a part with each system.

    Systems are each retriever that can answer from a history, ``merge`` (the pipeline without the
    language model) and ``default`` (what is served; not there if that needs the language model and
    `with_lm` is False); with the language model also ``lm`` (alone, over the whole catalogue, where it
    proposes items) and ``lm_top100`` (its order of the merge's first hundred, or of fewer where it scores
    fewer: the number is in the name).

    Parameters
    ----------
    pools
        Items to rank for each user, all of them; the whole catalogue if None, seen items excluded if
        `exclude_seen`. In a pool what a system did not find comes last, in the order given.
    best
        The retriever that the merge is compared with: the one that was best on validation.
    """
    ranks: dict[str, list[Ranks]] = {}
    shown: dict[str, list[Codes]] = {}
    model: object = pipeline.scorer if with_lm else None
    served = with_lm or pipeline.history.most_lm == 0
    predicted = {name: Probabilities() for name in ("popularity", LM, "default")}
    for start in range(0, len(part), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(part)))
        chunk = part.take(rows)
        queries = chunk.held_out(active, exclude_seen).queries
        pool = None if pools is None else pools[start : start + CHUNK]
        if pool is not None:
            queries = [replace(q, mask=_only(p, len(active))) for q, p in zip(queries, pool, strict=True)]
        for name, lists in _lists(queries, pipeline, with_lm).items():
            if pool is not None:
                lists = [complete(items, p) for items, p in zip(lists, pool, strict=True)]
            ranks.setdefault(name, []).append(ranks_in(lists, chunk.targets))
            shown.setdefault(name, []).extend(items[:SHOWN] for items in lists)
        if isinstance(model, Predictor):
            predicted[LM].add(model.log_probs(chunk.histories), chunk.targets)
        if pipeline.prior is not None and pools is None and served:
            p = pipeline.predict(queries)
            predicted["default"].add(np.log(np.maximum(p, 1e-30)).astype(np.float32), chunk.targets)
            prior = np.broadcast_to(np.log(pipeline.prior), p.shape)
            predicted["popularity"].add(prior, chunk.targets)
        on_users(len(rows))
    joined = {name: np.concatenate(values) for name, values in ranks.items()}
    probabilities = {name: values.summary() for name, values in predicted.items() if values.nats}
    reliability = {name: values.reliability() for name, values in predicted.items() if values.nats}
    return Systems(joined, shown, probabilities, reliability, compared(joined, best))


def _only(pool: Codes, n_items: int) -> Mask:
    mask = np.zeros(n_items, dtype=np.bool_)
    mask[pool] = True
    return mask


def compared(ranks: Mapping[str, Ranks], best: str | None) -> list[Comparison]:
    """Stages with the language model against the merge, and it and what is served against one retriever.

    Parameters
    ----------
    best
        The retriever that was best alone on validation: a merge may be worse on other users, and what beats
        the merge need not beat this one. Popularity if it is not known.
    """
    alone = best if best is not None and best in ranks else "popularity"
    of_lm = [name for name in ranks if name.startswith(LM)]
    stages = [*(["default"] if of_lm and "default" in ranks else []), *of_lm]
    pairs = [*((stage, "merge") for stage in stages), ("merge", alone)]
    # Where the model is left out, what is served is the merge.
    if "default" in stages and not np.array_equal(ranks["default"], ranks["merge"]):
        pairs.append(("default", alone))
    return compare_all(ranks, pairs)


def _lists(queries: Sequence[Query], pipeline: Pipeline, with_lm: bool) -> dict[str, list[Codes]]:
    alone = {
        n: r
        for n, r in pipeline.retrievers.items()
        if not (n in FAMILIES and FAMILIES[n].asks == "words") and (with_lm or n != LM)
    }
    lists = {n: [h.items for h in r.retrieve(queries, LISTED)] for n, r in alone.items()}
    plain = replace(pipeline, history=pipeline.history.with_lm(0.0))
    merged = plain.recommend(queries, LISTED)
    lists["merge"] = [c.items for c in merged]
    if with_lm and pipeline.scorer is not None:
        first = min(pipeline.scored or LISTED, LISTED)
        few = [c.items[:first] for c in merged]
        scores = pipeline.scorer.score(queries, few)
        lists[f"{LM}_top{first}"] = [
            items[np.argsort(-s, kind="stable")] for items, s in zip(few, scores, strict=True)
        ]
    if pipeline.history.most_lm == 0:
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
