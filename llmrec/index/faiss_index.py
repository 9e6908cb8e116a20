"""FAISS index: exact up to a size, HNSW above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrec.protocols import Codes, Floats, Hits, Mask

EXACT_UP_TO = 200_000
"""Vectors up to which exact search is used. Measured by `eval/index_size.py`, see eval/README.md."""

FEW_ALLOWED = 0.1
"""Share of allowed items below which the graph is not walked: most of its edges lead to forbidden ones."""


FEW_RULED_OUT = 1000
"""Forbidden items up to which exact search takes so many more instead of filtering each query by itself."""


ASIDE, ASIDE_SHARE = 1024, 0.05
"""Vectors, and share of all, that may be new or changed before the index is built again."""


class FaissIndex:
    """Inner-product search with FAISS; filters are pushed down into the search.

    Parameters
    ----------
    dim
        Length of the vectors.
    exact_up_to
        Number of vectors above which a graph (HNSW, Malkov and Yashunin 2016) replaces exact search.
    """

    def __init__(self, dim: int, exact_up_to: int = EXACT_UP_TO) -> None:
        import faiss

        self._faiss: Any = faiss
        self.dim, self.exact_up_to = dim, exact_up_to
        self._index: Any = faiss.IndexFlatIP(dim)
        # Vectors that the index does not have, or has no longer as they are, and their codes, ascending.
        self._aside: Codes = np.empty(0, np.int32)
        self._own: Floats = np.empty((0, dim), np.float32)

    def __len__(self) -> int:
        return max(int(self._index.ntotal), int(self._aside[-1]) + 1 if len(self._aside) else 0)

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        return isinstance(self._index, self._faiss.IndexFlatIP)

    def add(self, vectors: Floats) -> None:
        """Append vectors, shape (n, dim); their codes go on from the last one."""
        if len(self._aside):
            new = np.arange(len(self), len(self) + len(vectors), dtype=np.int32)
            self._aside, self._own = np.append(self._aside, new), np.concatenate([self._own, vectors])
            return
        if self.exact and len(self) + len(vectors) > self.exact_up_to:
            graph = self._faiss.IndexHNSWFlat(self.dim, 32, self._faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 80
            graph.hnsw.efSearch = 128
            if len(self):
                graph.add(self._index.reconstruct_n(0, len(self)))
            self._index = graph
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def grown(self, vectors: Floats, changed: Codes) -> FaissIndex:
        """An index over `vectors`, shape (n, dim), which this one has save those at `changed` and new rows.

        It shares what this one has, which may be searched meanwhile and stays as it is: new and changed
        vectors stand aside and are compared one by one, until they are so many that all are indexed anew.
        """
        new = np.arange(len(self), len(vectors), dtype=np.int32)
        aside = np.union1d(self._aside, np.concatenate([changed.astype(np.int32), new])).astype(np.int32)
        made = FaissIndex(self.dim, self.exact_up_to)
        if len(aside) > max(ASIDE, ASIDE_SHARE * len(vectors)):
            made.add(vectors)
        else:
            made._index, made._aside, made._own = self._index, aside, vectors[aside]
        return made

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`, best first."""
        if not len(self._aside) or not len(vectors):
            return self._search_indexed(vectors, k, masks)
        indexed = int(self._index.ntotal)
        replaced = self._aside[self._aside < indexed]
        found = self._search_indexed(vectors, k, [_without(mask, replaced, indexed) for mask in masks])
        scores: Floats = np.asarray(vectors, np.float32) @ self._own.T
        merged = []
        for hits, mask, row in zip(found, masks, scores, strict=True):
            allowed = np.ones(len(row), np.bool_) if mask is None else mask[self._aside]
            items = np.concatenate([hits.items, self._aside[allowed]])
            values = np.concatenate([hits.scores, row[allowed]])
            order = np.argsort(-values, kind="stable")[:k]
            merged.append(Hits(items[order], values[order]))
        return merged

    def _search_indexed(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        n = int(self._index.ntotal)
        k = min(k, n)
        if k == 0 or len(vectors) == 0:
            return [Hits(np.empty(0, np.int32), np.empty(0, np.float32)) for _ in range(len(vectors))]
        ruled_out = [0 if mask is None else len(mask) - int(np.count_nonzero(mask)) for mask in masks]
        if all(mask is None for mask in masks) or (self.exact and max(ruled_out) <= FEW_RULED_OUT):
            # All at once, with so many more that enough are left.
            wide = min(k + max(ruled_out), n)
            scores, codes = self._index.search(np.ascontiguousarray(vectors), wide)
            return [
                self._hits(c if mask is None else np.where(mask[c], c, -1), s, k)
                for c, s, mask in zip(codes, scores, masks, strict=True)
            ]
        return [self._search_one(v, k, m) for v, m in zip(vectors, masks, strict=True)]

    def _search_one(self, vector: Floats, k: int, mask: Mask | None) -> Hits:
        index, parameters = self._index, None
        if mask is not None:
            # A bitmap of the allowed codes; it must stay alive during the search.
            bits = np.packbits(mask, bitorder="little")
            chosen = self._faiss.IDSelectorBitmap(bits)
            if not self.exact and np.count_nonzero(mask) < FEW_ALLOWED * index.ntotal:
                index = self._index.storage
            exact = self.exact or index is not self._index
            make = self._faiss.SearchParameters if exact else self._faiss.SearchParametersHNSW
            parameters = make(sel=chosen)
            if not exact:
                parameters.efSearch = max(128, 2 * k)
        scores, codes = index.search(np.ascontiguousarray(vector[None]), k, params=parameters)
        return self._hits(codes[0], scores[0], k)

    @staticmethod
    def _hits(codes: Any, scores: Any, k: int) -> Hits:
        found = np.flatnonzero(codes >= 0)[:k]
        return Hits(codes[found].astype(np.int32), scores[found].astype(np.float32))


def _without(mask: Mask | None, codes: Codes, n: int) -> Mask | None:
    """A mask over the first n items that forbids some more; None if it forbids none."""
    if mask is None and not len(codes):
        return None
    made: Mask = np.ones(n, np.bool_) if mask is None else mask[:n].copy()
    made[codes] = False
    return made
