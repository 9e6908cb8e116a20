"""FAISS index: exact up to a size, HNSW above, and IVF-PQ where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrec.index.aside import altered, beside
from llmrec.protocols import Codes, Floats, Hits, Mask, VectorIndex
from llmrec.ranking import NO_HITS, top

SEEN = 128
"""Vectors that a walk through the graph keeps in sight, at least."""

EXACT_UP_TO = 200_000
"""Vectors up to which exact search is used. Measured by `eval/index_size.py`, see eval/README.md."""

FEW_ALLOWED = 0.1
"""Share of items below which the graph is not walked if so few are allowed, and above which if so many are
asked for: all are compared instead, since most edges lead to forbidden ones, or most items are met anyway."""

FEW_RULED_OUT = 1000
"""Forbidden items up to which exact search takes so many more instead of filtering each query by itself."""

MANY, PRODUCT = 16, 64
"""Queries from which on exact search is a matrix product, and rows of one."""

ASIDE, ASIDE_SHARE = 1024, 0.05
"""Vectors, and share of all, that may be new or changed before the index is built again."""

CHUNK = 65_536
"""Vectors that are read and added at once: those of a large catalogue are mapped from a file."""

CELLS, TRAINED_ON, PROBED = 4, 64, 32
"""IVF-PQ (Jegou et al. 2011): cells for each root of n, training vectors a cell, cells a search reads."""

FLOATS_A_BYTE = 4
"""Numbers of a vector that IVF-PQ keeps as one byte: 16 times smaller than float32."""


class FaissIndex:
    """Inner-product search with FAISS; filters are pushed down into the search.

    Parameters
    ----------
    dim
        Length of the vectors.
    exact_up_to
        Number of vectors above which a graph (HNSW, Malkov and Yashunin 2016) replaces exact search.
    compressed_above
        Number of vectors above which they are kept as short codes in cells (IVF-PQ); None for never.
    """

    name = None

    def __init__(self, dim: int, exact_up_to: int = EXACT_UP_TO, compressed_above: int | None = None) -> None:
        import faiss

        self._faiss: Any = faiss
        self.dim, self.exact_up_to, self.compressed_above = dim, exact_up_to, compressed_above
        self._index: Any = faiss.IndexFlatIP(dim)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        return isinstance(self._index, self._faiss.IndexFlatIP)

    @property
    def compressed(self) -> bool:
        """Whether the vectors are kept as short codes."""
        return isinstance(self._index, self._faiss.IndexIVFPQ)

    def add(self, vectors: Floats) -> None:
        """Append vectors, shape (n, dim); their codes go on from the last one."""
        n = len(self) + len(vectors)
        old = self._index
        if self.compressed_above is not None and n > self.compressed_above and not self.compressed:
            self._index = self._cells(n, _sample(_stored(old), vectors, n))
        elif self.exact and n > self.exact_up_to:
            self._index = self._faiss.IndexHNSWFlat(self.dim, 32, self._faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = 80
        if self._index is not old:
            self._append(_stored(old))
        self._append(vectors)

    def _append(self, vectors: Floats) -> None:
        for start in range(0, len(vectors), CHUNK):
            self._index.add(np.ascontiguousarray(vectors[start : start + CHUNK], dtype=np.float32))

    def _cells(self, n: int, sample: Floats) -> Any:
        """An empty IVF-PQ index, trained on a sample."""
        cells = max(1, min(round(CELLS * n**0.5), len(sample) // 39))
        parts = next(m for m in range(max(1, self.dim // FLOATS_A_BYTE), 0, -1) if self.dim % m == 0)
        metric = self._faiss.METRIC_INNER_PRODUCT
        made = self._faiss.IndexIVFPQ(self._faiss.IndexFlatIP(self.dim), self.dim, cells, parts, 8, metric)
        made.cp.max_points_per_centroid = TRAINED_ON
        made.train(sample)
        made.nprobe = PROBED
        return made

    def grown(self, vectors: Floats, changed: Codes) -> VectorIndex:
        """An index over `vectors`, shape (n, dim), which this one has save those at `changed` and new rows.

        It shares what this one has, which may be searched meanwhile and stays as it is: new and changed
        vectors stand aside and are compared one by one, until they are so many that all are indexed anew.
        """
        if len(altered(len(self), vectors, changed)) <= max(ASIDE, ASIDE_SHARE * len(vectors)):
            return beside(self, vectors, changed)
        made = FaissIndex(self.dim, self.exact_up_to, self.compressed_above)
        made.add(vectors)
        return made

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`, best first."""
        n = len(self)
        k = min(k, n)
        if k == 0 or len(vectors) == 0:
            return [NO_HITS] * len(vectors)
        if self.exact and len(vectors) >= MANY:
            return self._search_many(vectors, k, masks)
        ruled_out = [0 if mask is None else len(mask) - int(np.count_nonzero(mask)) for mask in masks]
        if all(mask is None for mask in masks) or (self.exact and max(ruled_out) <= FEW_RULED_OUT):
            # All at once, with so many more that enough are left.
            wide = min(k + max(ruled_out), n)
            graph = not self.exact and not self.compressed
            index, parameters = self._index, None
            if graph and k > FEW_ALLOWED * n:
                index = index.storage
            elif graph:
                parameters = self._walking(wide)
            scores, codes = index.search(np.ascontiguousarray(vectors), wide, params=parameters)
            return [
                self._hits(c if mask is None else np.where(mask[c], c, -1), s, k)
                for c, s, mask in zip(codes, scores, masks, strict=True)
            ]
        return [self._search_one(v, k, m) for v, m in zip(vectors, masks, strict=True)]

    def _search_many(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Exact search as one matrix product; FAISS takes twice as long to keep the best of so many."""
        size = len(self) * self.dim
        stored = self._faiss.rev_swig_ptr(self._index.get_xb(), size).reshape(len(self), self.dim)
        hits: list[Hits] = []
        for start in range(0, len(vectors), PRODUCT):
            scores: Floats = np.asarray(vectors[start : start + PRODUCT], np.float32) @ stored.T
            rows = zip(scores, masks[start : start + PRODUCT], strict=True)
            hits += [top(row, k, mask) for row, mask in rows]
        return hits

    def _search_one(self, vector: Floats, k: int, mask: Mask | None) -> Hits:
        index, parameters = self._index, None
        if mask is not None:
            # A bitmap of the allowed codes; it must stay alive during the search.
            bits = np.packbits(mask, bitorder="little")
            chosen = self._faiss.IDSelectorBitmap(bits)
            few = np.count_nonzero(mask) < max(FEW_ALLOWED * len(self), k)
            if self.compressed:
                parameters = self._faiss.SearchParametersIVF(sel=chosen)
                parameters.nprobe = index.nlist if few else PROBED
            elif self.exact or few:
                index = index if self.exact else index.storage
                parameters = self._faiss.SearchParameters(sel=chosen)
            else:
                parameters = self._walking(k, sel=chosen)
        scores, codes = index.search(np.ascontiguousarray(vector[None]), k, params=parameters)
        return self._hits(codes[0], scores[0], k)

    def _walking(self, k: int, **more: Any) -> Any:
        """How the graph is walked for k items: what is kept on the way does not follow from k by itself."""
        parameters = self._faiss.SearchParametersHNSW(**more)
        parameters.efSearch = max(SEEN, 2 * k)
        return parameters

    @staticmethod
    def _hits(codes: Any, scores: Any, k: int) -> Hits:
        found = np.flatnonzero(codes >= 0)
        # FAISS has equal scores in any order.
        found = found[np.lexsort((codes[found], -scores[found]))][:k]
        return Hits(codes[found].astype(np.int32), scores[found].astype(np.float32))


def _stored(index: Any) -> Floats:
    """The vectors of an index that keeps them as they are."""
    made: Floats = (
        index.reconstruct_n(0, index.ntotal) if index.ntotal else np.empty((0, index.d), np.float32)
    )
    return made


def _sample(old: Floats, new: Floats, n: int) -> Floats:
    """Vectors to train cells on, shape (at most n, dim): a seeded sample of both."""
    most = round(CELLS * n**0.5) * TRAINED_ON
    drawn = np.sort(np.random.default_rng(0).choice(n, min(most, n), replace=False))
    border = np.searchsorted(drawn, len(old))
    return np.concatenate([old[drawn[:border]], new[drawn[border:] - len(old)]]).astype(
        np.float32, copy=False
    )
