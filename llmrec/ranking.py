"""What components with dense scores share: masking and taking the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from llmrec.protocols import Codes, Floats, Hits, Mask, Query

NO_HITS = Hits(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))


def top(scores: Floats, k: int, mask: Mask | None = None, floor: float = -np.inf) -> Hits:
    """The k best allowed items above `floor`; equal scores in the order of their codes.

    Parameters
    ----------
    scores
        Shape (items,).
    mask
        Shape (items,), True where an item may be returned.
    """
    allowed = scores > floor
    if mask is not None:
        allowed = allowed & mask
    codes = np.flatnonzero(allowed)
    if len(codes) > k:
        values = scores[codes]
        # All items at the value of the k-th best stay in, so that ties are broken by code, not by chance.
        codes = codes[values >= np.partition(values, len(values) - k)[len(values) - k]]
    order = np.argsort(-scores[codes], kind="stable")[:k]
    best = codes[order]
    return Hits(best.astype(np.int32), scores[best].astype(np.float32))


SPARSE = 8
"""Entries of the rows that are summed, times this, below which their columns are gathered instead of all."""


def top_of_rows(
    rows: scipy.sparse.csr_matrix, weights: Floats, codes: Codes | None, k: int, query: Query
) -> Hits:
    """The k best allowed items by a weighted sum of sparse rows, above 0; as `top` of the dense sum.

    Parameters
    ----------
    rows
        Shape (n, m).
    weights
        Shape (n,).
    codes
        Those of the m columns, ascending; None if they are the codes themselves.
    """
    if SPARSE * rows.nnz < rows.shape[1]:
        columns, place = np.unique(rows.indices, return_inverse=True)
        entries = np.repeat(weights, np.diff(rows.indptr)) * rows.data
        scores = np.bincount(place, entries, minlength=len(columns)).astype(np.float32)
    else:
        columns = np.arange(rows.shape[1], dtype=np.int32)
        scores = np.asarray(rows.T @ weights, dtype=np.float32).ravel()
    if codes is not None:
        columns = codes[columns]
    found = top(scores, k, None if query.mask is None else query.mask[columns], floor=0.0)
    return Hits(columns[found.items].astype(np.int32), found.scores)


def age_weights(length: int, decay: float) -> Floats:
    """Weights of a history, oldest first: decay ** age, the latest item has age 0 and weight 1."""
    return (decay ** np.arange(length - 1, -1, -1)).astype(np.float32)


def tops(scores: Floats, queries: Sequence[Query], k: int, floor: float = -np.inf) -> list[Hits]:
    """Apply `top` to each row of a (queries, items) matrix."""
    return [top(row, k, query.mask, floor) for row, query in zip(scores, queries, strict=True)]
