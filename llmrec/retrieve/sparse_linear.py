"""EASE for large catalogues: each item's weights are solved among its neighbours alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats

BLOCK = 512
"""Rows of the Gram matrix that are computed at once."""

WHOLE = 150_000_000
"""Most entries that the Gram matrix may have to be kept whole; see `is_whole`."""

PAIRS = 500
"""Largest entries that are kept of each of its rows otherwise, at least."""


def is_whole(matrix: scipy.sparse.csr_matrix) -> bool:
    """Whether the Gram matrix of users by items is kept whole, so that weights are exact."""
    return int((np.diff(matrix.indptr).astype(np.int64) ** 2).sum()) <= WHOLE


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """The neighbours of each item, and what they have in common.

    Parameters
    ----------
    gram
        X'X, or where it is too large its diagonal and the largest entries of each row, symmetric, shape
        (items, items).
    near
        Codes of the neighbours of each item, ascending.
    """

    gram: scipy.sparse.csr_matrix
    near: Sequence[Codes]

    @classmethod
    def of(cls, matrix: scipy.sparse.csr_matrix, neighbours: int) -> Neighbourhood:
        """Take the items of largest cosine of a matrix of users by items, shape (users, items)."""
        n = matrix.shape[1]
        by_item = scipy.sparse.csr_matrix(matrix.T)
        length = np.sqrt(np.asarray(matrix.power(2).sum(axis=0)).ravel())
        near: list[Codes] = []
        pairs = n if is_whole(matrix) else max(PAIRS, neighbours)
        columns, values = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for start in range(0, n, BLOCK):
            block = scipy.sparse.csr_matrix(by_item[start : start + BLOCK] @ matrix)
            for row in range(block.shape[0]):
                a, b = block.indptr[row], block.indptr[row + 1]
                codes, together = block.indices[a:b], block.data[a:b]
                near.append(_nearest(start + row, codes, together, length, neighbours))
                kept = _largest(np.where(codes == start + row, np.inf, together), pairs)
                columns.append(codes[kept].astype(np.int32))
                values.append(together[kept].astype(np.float32))
        starts = np.cumsum([len(part) for part in columns])
        parts = np.concatenate(values), np.concatenate(columns), starts
        gram = scipy.sparse.csr_matrix(parts, shape=(n, n))
        # A pair that is small for one of its items may be large for the other.
        return cls(scipy.sparse.csr_matrix(gram.maximum(gram.T)), near)

    def solve(self, l2: float, text: float, texts: Floats) -> scipy.sparse.csr_matrix:
        """Weights of EASE, each column restricted to the neighbours of its item, shape (items, items).

        The column of item j minimises |X_N b - x_j|^2 + text |V_N' b - v_j|^2 + l2 |b|^2 over the weights b
        of its neighbours N (as SLIM with a neighbourhood; Ning and Karypis 2011). With all items as
        neighbours that is EASE itself (Steck 2019): a zero diagonal and this ridge regression. Where the Gram
        matrix is not whole, small entries count as 0.

        Parameters
        ----------
        texts
            Unit text vectors V, shape (items, dim).
        """
        values = [np.empty(0, np.float32)]
        for item, near in enumerate(self.near):
            among = np.append(near, item)
            block = self.gram[among][:, among].toarray().astype(np.float64)
            if text:
                own = texts[among]
                block += text * (own @ own.T)
            block[np.diag_indices_from(block)] += l2
            values.append(np.linalg.solve(block[:-1, :-1], block[:-1, -1]).astype(np.float32))
        shape = self.gram.shape
        rows = np.concatenate([np.empty(0, np.int32), *self.near])
        starts = np.cumsum([0, *map(len, self.near)])
        weights = scipy.sparse.csc_matrix((np.concatenate(values), rows, starts), shape=shape)
        return scipy.sparse.csr_matrix(weights)


def _nearest(item: int, codes: Codes, values: Floats, length: NDArray[np.float64], neighbours: int) -> Codes:
    """The items of largest cosine with one, from its row of the Gram matrix; ascending."""
    other = (codes != item) & (values > 0)
    codes = codes[other]
    nearest: Codes = np.sort(codes[_largest(values[other] / length[codes], neighbours)]).astype(np.int32)
    return nearest


def _largest(values: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Places of the k largest values, in no order."""
    if len(values) <= k:
        return np.arange(len(values))
    return np.argpartition(-values, k)[:k]
