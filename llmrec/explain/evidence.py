"""What speaks for an item: history items that moved its score, shared attributes, matched words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmrec.catalog import Catalog
from llmrec.protocols import Codes, Floats, Query
from llmrec.rules import values_of
from llmrec.types import Influence, Shared
from llmrec.words import sought_words, stem, telling_words

LATEST = 20
"""Distinct history items, from the latest on, that are left out one at a time."""

NAMED = 5
"""Most history items, and most attribute values, that are given as evidence."""

LEAST = 0.1
LEAST_OF_SCORE = 0.02
"""Shares of the largest change, and of the item's score, below which a history item is no evidence."""


def leave_one_out(query: Query) -> tuple[Codes, list[Query]]:
    """Return the latest distinct history items, newest first, and the query without each of them.

    An item that was chosen several times is left out everywhere.
    """
    latest = list(dict.fromkeys(query.history[::-1].tolist()))[:LATEST]
    queries = [replace(query, history=query.history[query.history != code]) for code in latest]
    return np.array(latest, dtype=np.int32), queries


def influences(left_out: Codes, changes: Floats, score: float, catalog: Catalog) -> tuple[Influence, ...]:
    """Return the history items that raised the score of one item, most first.

    Parameters
    ----------
    left_out
        History items, shape (m,).
    changes
        Score with all of the history less the score without each item, in units of the answer's scores,
        shape (m,). What lowered the score is no reason and stays out.
    score
        Of the item.
    """
    order = np.argsort(-changes, kind="stable")[:NAMED]
    least = max(LEAST * float(changes.max(initial=0.0)), LEAST_OF_SCORE * abs(score), 1e-4)
    rows = [row for row in order.tolist() if changes[row] > least]
    names, titles = catalog.ids, catalog.titles
    return tuple(Influence(names[left_out[row]], titles[left_out[row]], float(changes[row])) for row in rows)


def shared_values(item: int, others: Sequence[int], catalog: Catalog) -> tuple[Shared, ...]:
    """Return the attribute values that an item shares with any of the others, rarer ones first.

    Texts, lists of texts and years count. A value that more than half of all items have says nothing.
    """
    codes = np.array([item, *others], dtype=np.int32)
    found: list[tuple[int, Shared]] = []
    for name, kind in catalog.attributes.items():
        if kind == "boolean":
            continue
        own, *theirs = values_of(name, catalog, codes)
        for value in dict.fromkeys(own):
            with_it = tuple(
                catalog.ids[code] for code, values in zip(others, theirs, strict=True) if value in values
            )
            if not with_it or (kind == "number" and not _is_year(value)):
                continue
            count = catalog.counts(name).get(value, 0)
            if 2 * count <= len(catalog):
                found.append((count, Shared(name, value, with_it)))
    found.sort(key=lambda pair: pair[0])
    return tuple(shared for _, shared in found[:NAMED])


def matched_words(text: str, line: str) -> tuple[str, ...]:
    """Return the words of a typed query that an item's line has, in the order of the query."""
    own = set(sought_words(line))
    return tuple(word for word in dict.fromkeys(telling_words(text)) if stem(word) in own)


def _is_year(value: object) -> bool:
    """Whether a number is one that the catalogue's lines hold as well."""
    return isinstance(value, int | float) and 1800 <= value <= 2100 and value == round(value)
