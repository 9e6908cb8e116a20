"""Hard candidates for events of the log, from retrievers that have not seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.evaluation.split import Part
from llmrec.families import TrainingLog
from llmrec.protocols import Codes, Query
from llmrec.recipe import fit_retrievers
from llmrec.score.tasks import Choice
from llmrec.state import State

LATER = 1 / 3
"""Share of each history, its end, that retrievers are not fitted on."""

CHUNK = 128
"""Queries at once, so that masks stay small."""


def first_parts(log: TrainingLog, ends: Sequence[int] | None = None) -> TrainingLog:
    """The log with so many events of each history.

    Without `ends` that is all but the last third; at least one event stays and one is left out.
    """
    if ends is None:
        ends = [cut(len(history)) for history in log.histories]

    def short(columns: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]] | None:
        if columns is None:
            return None
        return [column[:end] for column, end in zip(columns, ends, strict=True)]

    histories = [history[:end] for history, end in zip(log.histories, ends, strict=True)]
    return TrainingLog(histories, short(log.weights), short(log.stamps))


def cut(n: int) -> int:
    """Events of a history of n that the first part keeps."""
    return n if n < 2 else n - max(1, round(LATER * n))


def mined_choices(
    state: State,
    log: TrainingLog,
    listed: int,
    limit: int,
    seed: int,
    ends: Sequence[int] | None = None,
) -> list[Choice]:
    """What came next among what the retrievers proposed instead.

    Retrievers are fitted on the first part of each history and asked for events of the rest: shortening the
    input alone would not hide an event from them. An event that they did not propose takes a random place.

    Parameters
    ----------
    listed
        Candidates of a choice; fewer where fewer were found.
    limit
        Choices, a seeded sample of the events.
    ends
        Events of each history in its first part; by default all but the last third.
    """
    first = first_parts(log, ends)
    retrievers = fit_retrievers(first, state.texts, state.recipe)
    pipeline = replace(state, retrievers=retrievers, lm=None).pipeline()
    later = [
        (user, place)
        for user, (history, known) in enumerate(zip(log.histories, first.histories, strict=True))
        for place in range(len(known), len(history))
        if log.weights is None or log.weights[user][place] > 0
    ]
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(later), min(limit, len(later)), replace=False))
    asked = np.array(later, dtype=np.int64).reshape(-1, 2)[drawn]
    part = Part(
        asked[:, 0],
        [log.histories[user][:place] for user, place in asked.tolist()],
        np.array([log.histories[user][place] for user, place in asked.tolist()], dtype=np.int32),
        np.full(len(asked), -1),
    )
    weights = [
        1.0 if log.weights is None else float(log.weights[user][place]) for user, place in asked.tolist()
    ]
    choices: list[Choice] = []
    for start in range(0, len(part), CHUNK):
        held_out = part.take(np.arange(start, min(start + CHUNK, len(part)))).held_out(
            state.catalog.active, not state.repeats
        )
        found = pipeline.recommend(held_out.queries, listed)
        counted = weights[start : start + CHUNK]
        for query, target, candidates, weight in zip(
            held_out.queries, held_out.targets, found, counted, strict=True
        ):
            items = _with_target(candidates.items, target, rng)
            if len(items) > 1:
                truth = int(np.flatnonzero(items == target)[0])
                choices.append(Choice(Query(query.history), items, truth, weight))
    return choices


def _with_target(items: Codes, target: int, rng: np.random.Generator) -> Codes:
    if target in items:
        return items
    if not len(items):
        return np.array([target], dtype=np.int32)
    items = items.copy()
    items[rng.integers(len(items))] = target
    return items
