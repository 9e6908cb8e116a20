"""Evaluation of typed queries, made from item texts and attributes by stated rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import READS_WORDS
from llmrec.catalog import Catalog
from llmrec.evaluation.beyond import attribute_values
from llmrec.evaluation.split import Part
from llmrec.metrics import Values, compare_values, holm, per_user, relevance, summary
from llmrec.pipeline import Pipeline
from llmrec.protocols import Codes, Query
from llmrec.recipe import ranks_in
from llmrec.search import known_item_queries, nameless

K = 10
MEASURE = f"ndcg@{K}"
KNOWN_ITEM = "two or three words drawn from the line of the held-out item; that item is relevant"
ANYBODY = "the same words, of somebody without a history"
ATTRIBUTE = "an attribute value that 5 items to half of the catalogue have; all of these are relevant"


def evaluate_search(
    part: Part, pipeline: Pipeline, catalog: Catalog, users: int, queries: int, seed: int
) -> dict[str, Any]:
    """Measure `search` by known items and by attribute values; seen items may come back.

    Parameters
    ----------
    users
        Most held-out users whose target is sought.
    queries
        Most attribute values that are typed.
    """
    plain = replace(pipeline, query=pipeline.query.with_lm(0.0))
    # Another seed than that of the queries which chose the weights.
    known = known_item_queries(
        part.sample(users, seed).held_out(catalog.active, False), catalog.lines(), seed + 1
    )
    kinds: dict[str, dict[str, Any]] = {}
    gains: dict[str, Values] = {}
    for kind, rule, asked in (("known_item", KNOWN_ITEM, known), ("anybody", ANYBODY, nameless(known))):
        found = _systems(asked.queries, plain, pipeline)
        ranks = {name: ranks_in(lists, asked.targets) for name, lists in found.items()}
        systems = {name: summary(r) for name, r in ranks.items()}
        kinds[kind] = {"rule": rule, "queries": len(asked.queries), "systems": systems}
        gains[kind] = per_user(ranks["default"], MEASURE) - per_user(ranks["merge"], MEASURE)
    values = attribute_queries(catalog, queries, seed)
    typed = [Query(text=text, mask=catalog.active) for text, _ in values]
    lists = _systems(typed, plain, pipeline) if typed else {}
    scores = {
        name: [relevance(items, r, K) for items, (_, r) in zip(own, values, strict=True)]
        for name, own in lists.items()
    }
    systems = {name: _mean(rows) for name, rows in scores.items()}
    kinds["attribute"] = {"rule": ATTRIBUTE, "queries": len(values), "systems": systems}
    if values:
        pairs = zip(scores["default"], scores["merge"], strict=True)
        gains["attribute"] = np.array([a[MEASURE] - b[MEASURE] for a, b in pairs])
    # Equal lists are no comparison.
    gains = {kind: gain for kind, gain in gains.items() if np.any(gain)}
    tests = holm([compare_values(gain, "default", "merge", MEASURE) for gain in gains.values()])
    compared = {kind: [test.as_dict()] for kind, test in zip(gains, tests, strict=True)}
    return {kind: {**told, "comparisons": compared.get(kind, [])} for kind, told in kinds.items()}


def attribute_queries(catalog: Catalog, n: int, seed: int) -> list[tuple[str, Codes]]:
    """Up to n values of the catalogue's text attributes, drawn, with the active items that have them."""
    having: dict[str, list[int]] = {}
    for of_items in attribute_values(catalog).values():
        for code, texts in enumerate(of_items):
            for text in texts if catalog.active[code] else ():
                having.setdefault(text, []).append(code)
    most = catalog.active.sum() / 2
    values = sorted(text for text, codes in having.items() if 5 <= len(set(codes)) <= most)
    rng = np.random.default_rng(seed)
    rows: NDArray[np.int64] = np.sort(rng.choice(len(values), min(n, len(values)), replace=False))
    return [(values[i], np.unique(np.array(having[values[i]], dtype=np.int32))) for i in rows]


def _systems(queries: Sequence[Query], plain: Pipeline, pipeline: Pipeline) -> dict[str, list[Codes]]:
    lists = {
        name: [hits.items for hits in plain.retrievers[name].retrieve(queries, 100)]
        for name in READS_WORDS
        if name in plain.retrievers
    }
    lists["merge"] = [c.items for c in plain.recommend(queries, 100)]
    lists["default"] = lists["merge"]
    if pipeline.query.most_lm > 0:
        lists["default"] = [c.items for c in pipeline.recommend(queries, 100)]
    return lists


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}
