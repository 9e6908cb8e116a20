"""EASE for large catalogues: each item's weights are solved among its neighbours alone."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats

BLOCK = 512
"""Rows of the Gram matrix that are computed at once."""


def sparse_weights(matrix: scipy.sparse.csr_matrix, l2: float, neighbours: int) -> scipy.sparse.csr_matrix:
    """Weights of EASE, each column restricted to the items that stand most with its item.

    The column of item j minimises |X_N b - x_j|^2 + l2 |b|^2 over the weights b of its `neighbours` items of
    largest cosine, N (as SLIM with a neighbourhood; Ning and Karypis 2011): b = (G_NN + l2 I)^-1 G_Nj. With
    all items as neighbours that is EASE itself (Steck 2019): a zero diagonal and this ridge regression.

    Parameters
    ----------
    matrix
        Users by items, shape (users, items).

    Returns
    -------
    scipy.sparse.csr_matrix
        Weights, shape (items, items).
    """
    by_item = scipy.sparse.csr_matrix(matrix.T)
    length = np.sqrt(np.asarray(matrix.power(2).sum(axis=0)).ravel())
    rows: list[Codes] = []
    values: list[Floats] = []
    for start in range(0, by_item.shape[0], BLOCK):
        together = scipy.sparse.csr_matrix(by_item[start : start + BLOCK] @ matrix)
        for row in range(together.shape[0]):
            a, b = together.indptr[row], together.indptr[row + 1]
            near = _nearest(start + row, together.indices[a:b], together.data[a:b], length, neighbours)
            rows.append(near)
            values.append(_solve(by_item, start + row, near, l2))
    where = np.concatenate([np.empty(0, np.int32), *rows]), np.cumsum([0, *map(len, rows)])
    data = np.concatenate([np.empty(0, np.float32), *values])
    shape = (by_item.shape[0], by_item.shape[0])
    return scipy.sparse.csr_matrix(scipy.sparse.csc_matrix((data, *where), shape=shape))


def _nearest(item: int, codes: Codes, values: Floats, length: NDArray[np.float64], neighbours: int) -> Codes:
    """The items of largest cosine with one, from its row of the Gram matrix; ascending."""
    other = (codes != item) & (values > 0)
    codes, values = codes[other], values[other]
    if len(codes) > neighbours:
        codes = codes[np.argpartition(-values / length[codes], neighbours)[:neighbours]]
    nearest: Codes = np.sort(codes).astype(np.int32)
    return nearest


def _solve(by_item: scipy.sparse.csr_matrix, item: int, near: Codes, l2: float) -> Floats:
    """Ridge regression of one item on its neighbours, shape (len(near),)."""
    if not len(near):
        return np.empty(0, np.float32)
    rows = by_item[near]
    block = (rows @ rows.T).toarray().astype(np.float64)
    block[np.diag_indices_from(block)] += l2
    target = np.asarray((rows @ by_item[item].T).toarray()).ravel()
    solved: Floats = np.linalg.solve(block, target).astype(np.float32)
    return solved
