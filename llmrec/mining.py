"""Hard candidates for events of the log, from retrievers that have not seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.evaluation.split import Part
from llmrec.families import TrainingLog
from llmrec.protocols import Query
from llmrec.recipe import fit_retrievers
from llmrec.score.tasks import Choice
from llmrec.state import State
from llmrec.text import typed_words

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
    wishes: float = 0.0,
) -> list[Choice]:
    """What came next among what the retrievers proposed instead.

    Retrievers are fitted on the first part of each history and asked for events of the rest: shortening the
    input alone would not hide an event from them. Events that they did not propose are left out, as they are
    in serving, where the model orders what was proposed.

    Parameters
    ----------
    listed
        Candidates of a choice; fewer where fewer were found.
    limit
        Choices at most, of events in a seeded order.
    ends
        Events of each history in its first part; by default all but the last third.
    wishes
        Share of events whose item is asked for in words drawn from its line: then what the retrievers
        propose for history and words are the candidates.
    """
    first = first_parts(log, ends)
    rng = np.random.default_rng(seed + 1)
    retrievers = fit_retrievers(first, state.texts, state.recipe)
    pipeline = replace(state, retrievers=retrievers, lm=None).pipeline()
    later = [
        (user, place)
        for user, (history, known) in enumerate(zip(log.histories, first.histories, strict=True))
        for place in range(len(known), len(history))
        if log.weights is None or log.weights[user][place] > 0
    ]
    choices: list[Choice] = []
    drawn = np.random.default_rng(seed).permutation(len(later))
    for start in range(0, len(drawn), CHUNK):
        asked = [later[row] for row in drawn[start : start + CHUNK]]
        part = Part(
            np.array([user for user, _ in asked], dtype=np.int64),
            [log.histories[user][:place] for user, place in asked],
            np.array([log.histories[user][place] for user, place in asked], dtype=np.int32),
            np.full(len(asked), -1),
        )
        held_out = part.held_out(state.catalog.active, not state.repeats)
        queries = list(held_out.queries)
        if wishes > 0:
            queries = [
                replace(query, text=typed_words(state.texts.lines[target], rng))
                if rng.random() < wishes
                else query
                for query, target in zip(queries, held_out.targets, strict=True)
            ]
        found = pipeline.recommend(queries, listed)
        for (user, place), query, target, candidates in zip(
            asked, queries, held_out.targets, found, strict=True
        ):
            # An item put in among what was proposed would be known by not being like the others.
            truth = np.flatnonzero(candidates.items == target)
            if len(truth) and len(candidates.items) > 1:
                weight = 1.0 if log.weights is None else float(log.weights[user][place])
                choices.append(
                    Choice(Query(query.history, query.text), candidates.items, int(truth[0]), weight)
                )
        if len(choices) >= limit:
            break
    return choices[:limit]
