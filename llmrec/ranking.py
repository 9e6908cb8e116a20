"""What components with dense scores share: masking and taking the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats, Hits, Mask, Query

NO_HITS = Hits(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))

BLOCKS = 4
"""Blocks of items, for each item that is wanted, in which the best are looked for first."""


def top(scores: Floats, k: int, mask: Mask | None = None, floor: float = -np.inf) -> Hits:
    """The k best allowed items above `floor`; equal scores in the order of their codes.

    Parameters
    ----------
    scores
        Shape (items,).
    mask
        Shape (items,), True where an item may be returned.
    """
    ruled_out = 0 if mask is None else len(mask) - int(np.count_nonzero(mask))
    if len(scores) >= 2 * BLOCKS * (k + ruled_out) > 0:
        codes = _ahead(scores, k + ruled_out, floor)
        codes = codes if mask is None else codes[mask[codes]]
    else:
        codes = np.flatnonzero(scores > floor if mask is None else (scores > floor) & mask)
    if len(codes) > k:
        values = scores[codes]
        # All items at the value of the k-th best stay in, so that ties are broken by code, not by chance.
        codes = codes[values >= np.partition(values, len(values) - k)[len(values) - k]]
    order = np.argsort(-scores[codes], kind="stable")[:k]
    best = codes[order]
    return Hits(best.astype(np.int32), scores[best].astype(np.float32))


def _ahead(scores: Floats, k: int, floor: float) -> NDArray[np.int64]:
    """Codes above `floor` among which are the k best; most of the others are ruled out without a sort.

    k blocks have a best score that is at least the k-th largest of these, so k items do.
    """
    blocks = BLOCKS * k
    best = np.fmax.reduce(scores[: len(scores) // blocks * blocks].reshape(-1, blocks), axis=0)
    # What is no number is never returned.
    best = np.where(np.isnan(best), -np.inf, best)
    bound = np.partition(best, blocks - k)[blocks - k]
    return np.flatnonzero(scores >= bound if bound > floor else scores > floor)


SPARSE = 64
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
    entries = np.repeat(weights, np.diff(rows.indptr)) * rows.data
    if SPARSE * rows.nnz < rows.shape[1]:
        columns, place = np.unique(rows.indices, return_inverse=True)
        scores = np.bincount(place, entries, minlength=len(columns)).astype(np.float32)
    else:
        total = np.bincount(rows.indices, entries, minlength=rows.shape[1])
        columns = np.flatnonzero(total > 0)
        scores = total[columns].astype(np.float32)
    if codes is not None:
        columns = codes[columns]
    found = top(scores, k, None if query.mask is None else query.mask[columns], floor=0.0)
    return Hits(columns[found.items].astype(np.int32), found.scores)


def largest_of_rows(matrix: scipy.sparse.csr_matrix, keep: int) -> scipy.sparse.csr_matrix:
    """The `keep` largest entries by size of each row; so many bound what a request has to sum."""
    counts = np.diff(matrix.indptr)
    kept = np.ones(matrix.nnz, np.bool_)
    for row in np.flatnonzero(counts > keep):
        start, end = matrix.indptr[row], matrix.indptr[row + 1]
        kept[start + np.argpartition(-np.abs(matrix.data[start:end]), keep)[keep:]] = False
    starts = np.append(0, np.cumsum(np.minimum(counts, keep)))
    return scipy.sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], starts), shape=matrix.shape)


def age_weights(length: int, decay: float) -> Floats:
    """Weights of a history, oldest first: decay ** age, the latest item has age 0 and weight 1."""
    return (decay ** np.arange(length - 1, -1, -1)).astype(np.float32)


def tops(scores: Floats, queries: Sequence[Query], k: int, floor: float = -np.inf) -> list[Hits]:
    """Apply `top` to each row of a (queries, items) matrix."""
    return [top(row, k, query.mask, floor) for row, query in zip(scores, queries, strict=True)]
