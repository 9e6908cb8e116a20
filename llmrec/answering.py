"""One request from its rules to its answer: in codes, through the pipeline, arranged, explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from llmrec.arrange import Cap, arrange, pinned
from llmrec.candidates import Candidates
from llmrec.catalog import Catalog
from llmrec.explain.evidence import LATEST, leave_one_out
from llmrec.explain.reasons import explain
from llmrec.pipeline import Pipeline
from llmrec.protocols import Codes, Mask, Query
from llmrec.rules import allowed_items, check_caps, pinned_items, values_of
from llmrec.state import State
from llmrec.text import query_text
from llmrec.types import Recommendation, Request, Source

DEEPER = 4
"""By how much more hits are taken where the rules leave fewer than k of those at hand."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in codes: what the pipeline is asked, under the mask of the rules, and the pins."""

    request: Request
    query: Query
    pins: Codes


def ask(request: Request, history: Codes, state: State) -> Asked:
    """Turn a request into codes.

    Raises
    ------
    RequestError
        If a rule names what is not there, or a pin breaks another rule.
    """
    allowed = allowed_items(request, state.catalog)
    pins = pinned_items(request, state.catalog, allowed)
    check_caps(request.caps, state.catalog)
    if request.seen == "exclude" or (request.seen == "auto" and not state.repeats):
        allowed[history] = False
    return Asked(request, Query(history, query_text(request.query), allowed), pins)


def answer(
    asked: Sequence[Asked], state: State, pipeline: Pipeline, *, fill: bool = True
) -> list[list[Recommendation]]:
    """Answer requests; they go through each component as one batch.

    Parameters
    ----------
    fill
        Whether popular items follow where too few were found for a history.

    Raises
    ------
    RequestError
        If the pins of a request are over one of its caps.
    """
    found = pipeline.recommend([one.query for one in asked], len(state.catalog))
    return [_answer(one, state, pipeline, these, fill) for one, these in zip(asked, found, strict=True)]


def _answer(
    asked: Asked, state: State, pipeline: Pipeline, found: Candidates, fill: bool
) -> list[Recommendation]:
    shown, allowed = _arranged(asked, state, found), asked.query.mask
    assert allowed is not None
    # Pins may be what is allowed to nobody else.
    reachable = int(allowed.sum() + np.count_nonzero(~allowed[asked.pins]))
    wanted = asked.request.k
    if len(shown.items) < wanted:
        wanted = min(
            [wanted, reachable, *(_room(*cap, state.catalog) for cap in (asked.request.caps or {}).items())]
        )
    # Only a component that gave all the hits it was asked for may have more.
    while (
        len(shown.items) < wanted
        and pipeline.depth < reachable
        and found.ranks.max(initial=0) >= pipeline.depth
    ):
        pipeline = replace(pipeline, depth=DEEPER * pipeline.depth)
        found = pipeline.recommend([asked.query], len(state.catalog))[0]
        shown = _arranged(asked, state, found)
    if fill and not asked.query.text and len(shown.items) < wanted:
        # Who typed what it should be about would not want these.
        # Caps may keep any number of these out.
        enough = reachable if asked.request.caps else asked.request.k + len(shown.items)
        more = pipeline.filled(asked.query, shown, enough)
        caps = _caps(asked, state, more)
        shown = arrange(more, asked.request.k, asked.query.mask, len(shown.items), caps)
    answered = recommendations(shown, state.catalog)
    if not asked.request.explain:
        return answered
    return _explained(answered, shown.items, found, asked, state, pipeline)


def _explained(
    answered: Sequence[Recommendation],
    shown: Codes,
    found: Candidates,
    asked: Asked,
    state: State,
    pipeline: Pipeline,
) -> list[Recommendation]:
    """Add reasons to what is shown: how its scores change when one history item is left out."""
    left_out, queries = leave_one_out(asked.query)
    changes = np.zeros((len(left_out), len(state.catalog)), np.float32)
    candidates = found.items
    if len(left_out) and len(candidates):
        mask = only(candidates, len(state.catalog))
        masked = [replace(query, mask=mask) for query in (asked.query, *queries)]
        scores = pipeline.scores(masked, candidates, pipeline.weights_of(asked.query, found))
        changes[:, candidates] = scores[0] - scores[1:]
    reasons = explain(answered, asked.query, left_out, changes[:, shown], state.catalog, state.chosen)
    return [replace(one, reason=reason) for one, reason in zip(answered, reasons, strict=True)]


def _arranged(asked: Asked, state: State, found: Candidates) -> Candidates:
    request = asked.request
    found = pinned(found, asked.pins)
    caps = _caps(asked, state, found)
    vectors = state.texts.vectors[found.items] if request.diversity > 0 else None
    return arrange(
        found, request.k, asked.query.mask, len(asked.pins), caps, float(request.diversity), vectors
    )


def _room(name: str, limit: int, catalog: Catalog) -> int:
    """How many items a cap leaves room for, at most."""
    column = catalog.column(name)
    kinds = column.drop_nulls()
    if len(kinds) < len(column) or (kinds.dtype == pl.String and bool((kinds == "").any())):
        return len(column)  # an item without a value is not capped
    return limit * (kinds.explode() if kinds.dtype == pl.List else kinds).n_unique()


def _caps(asked: Asked, state: State, found: Candidates) -> list[Cap]:
    caps = (asked.request.caps or {}).items()
    return [Cap(name, limit, values_of(name, state.catalog, found.items)) for name, limit in caps]


def recommendations(found: Candidates, catalog: Catalog) -> list[Recommendation]:
    """Candidates as recommendations, each with the components that proposed it or moved its score."""
    answer = []
    items, scores = catalog.items(found.items), found.scores.tolist()
    provenance = zip(found.ranks.tolist(), found.parts.tolist(), strict=True)
    for row, (item, (ranks, parts)) in enumerate(zip(items, provenance, strict=True)):
        sources = [
            Source(name, rank, part)
            for name, rank, part in zip(found.names, ranks, parts, strict=True)
            if rank > 0 or part > 0
        ]
        sources.sort(key=lambda source: -source.score)
        answer.append(Recommendation(item, row + 1, scores[row], tuple(sources)))
    return answer


def only(items: Codes, n_items: int) -> Mask:
    """Mask over the catalogue that allows these items alone, shape (n_items,)."""
    mask: Mask = np.zeros(n_items, dtype=np.bool_)
    mask[items] = True
    return mask


def units_of(request: Request) -> int:
    """How many plain requests a request costs as much as: reasons ask once more for each item left out."""
    if not request.explain or (request.user is None and request.history is None):
        return 1
    # How much is stored for a user is not known before it is asked for.
    left_out = LATEST if request.history is None else min(len(request.history), LATEST)
    return 2 + left_out if left_out else 1
