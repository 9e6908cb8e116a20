"""Items to begin with: what to ask somebody about of whom nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmrec.candidates import Candidates, normalise
from llmrec.errors import RequestError
from llmrec.pipeline import Pipeline
from llmrec.protocols import Floats, Query
from llmrec.state import State
from llmrec.types import Recommendation, Request

POOL = 200
"""Items among which seeds are chosen: the most popular ones, or the best for what was chosen so far."""


def spread(vectors: Floats, weights: Floats, k: int, near: Floats | None = None) -> tuple[list[int], Floats]:
    """Choose rows that stand for many others and for heavy ones: greedy weighted facility location.

    A set S covers row i by c(i) = the largest cosine with a row of S, at least 0; each step takes the row
    that adds most to sum(weights * c), the first of equal ones. Gains fall, and the sum is at least 1 - 1/e
    of the best possible (Nemhauser, Wolsey and Fisher 1978).

    Parameters
    ----------
    vectors
        Unit vectors, shape (n, dim).
    weights
        At least 0, shape (n,).
    k
        How many rows at most.
    near
        Vectors that cover rows before the first step, shape (m, dim).

    Returns
    -------
    tuple
        Rows in the order of choice, and what each added.
    """
    cosines = np.clip(vectors @ vectors.T, 0.0, 1.0)
    covered = np.zeros(len(vectors), np.float32)
    if near is not None and len(near):
        covered = np.clip(vectors @ near.T, 0.0, 1.0).max(axis=1)
    chosen: list[int] = []
    gains: list[float] = []
    free = np.ones(len(vectors), np.bool_)
    for _ in range(min(k, len(vectors))):
        added = weights @ np.maximum(cosines - covered[:, None], 0.0)
        best = int(np.argmax(np.where(free, added, -np.inf)))
        chosen.append(best)
        gains.append(float(added[best]))
        free[best] = False
        covered = np.maximum(covered, cosines[:, best])
    return chosen, np.array(gains, np.float32)


def seeds(
    request: Request, passed: Sequence[str], mask: NDArray[np.bool_], state: State, pipeline: Pipeline
) -> list[Recommendation]:
    """Choose up to k items to ask about next, see `Recommender.seeds`.

    Parameters
    ----------
    request
        Its history is what was chosen so far.
    mask
        Items that the rules allow, shape (items,).
    pipeline
        Without a language model.
    """
    catalog = state.catalog
    asked, turned_down = catalog.known([str(one) for one in request.history or ()]), catalog.known(passed)
    both = np.intersect1d(asked, turned_down)
    if len(both):
        raise RequestError(f"{catalog.ids[both[0]]!r} is both chosen and passed; an item is one of them")
    mask = mask.copy()
    mask[asked], mask[turned_down] = False, False
    pool, query = max(POOL, request.k), Query(asked, "", mask)
    found = replace(pipeline, depth=pool).recommend([query], pool)[0]
    if len(found.items) < request.k:
        found = pipeline.filled(query, found, request.k + len(found.items))
    if len(asked):
        # What fits best may be known to few; half of the pool leaves those that can be judged.
        found = _popular(found, pipeline, max(request.k, pool // 2))
    weights = _weights(found, pipeline, len(asked) > 0)
    rows, gains = spread(
        state.texts.vectors[found.items], weights, request.k, state.texts.vectors[turned_down]
    )
    items = catalog.items(found.items[rows])
    return [
        Recommendation(item, rank, gain)
        for rank, (item, gain) in enumerate(zip(items, gains.tolist(), strict=True), start=1)
    ]


def _popular(found: Candidates, pipeline: Pipeline, n: int) -> Candidates:
    """The n most popular candidates, in their order."""
    assert pipeline.prior is not None
    rows = np.argsort(-pipeline.prior[found.items], kind="stable")[:n]
    return found.take(np.sort(rows))


def _weights(found: Candidates, pipeline: Pipeline, narrowed: bool) -> Floats:
    """How much each candidate counts: its popularity, times its score where something was chosen already."""
    assert pipeline.prior is not None
    popular: Floats = pipeline.prior[found.items]
    return popular * normalise(found.scores) if narrowed else popular
