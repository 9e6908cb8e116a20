"""FAISS index: exact up to a size, HNSW above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrec.protocols import Floats, Hits, Mask

EXACT_UP_TO = 200_000
"""Vectors up to which exact search is used. Measured by `eval/index_size.py`, see eval/README.md."""

FEW_ALLOWED = 0.1
"""Share of allowed items below which the graph is not walked: most of its edges lead to forbidden ones."""


FEW_RULED_OUT = 1000
"""Forbidden items up to which exact search takes so many more instead of filtering each query by itself."""


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

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        return isinstance(self._index, self._faiss.IndexFlatIP)

    def add(self, vectors: Floats) -> None:
        """Append vectors, shape (n, dim); their codes go on from the last one."""
        if self.exact and len(self) + len(vectors) > self.exact_up_to:
            graph = self._faiss.IndexHNSWFlat(self.dim, 32, self._faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 80
            graph.hnsw.efSearch = 128
            if len(self):
                graph.add(self._index.reconstruct_n(0, len(self)))
            self._index = graph
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`, best first."""
        k = min(k, len(self))
        if k == 0 or len(vectors) == 0:
            return [Hits(np.empty(0, np.int32), np.empty(0, np.float32)) for _ in range(len(vectors))]
        ruled_out = [0 if mask is None else len(mask) - int(np.count_nonzero(mask)) for mask in masks]
        if all(mask is None for mask in masks) or (self.exact and max(ruled_out) <= FEW_RULED_OUT):
            # All at once, with so many more that enough are left.
            wide = min(k + max(ruled_out), len(self))
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
            if not self.exact and np.count_nonzero(mask) < FEW_ALLOWED * len(self):
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
