"""An index with some vectors changed or added, which leaves the index itself as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmrec.protocols import Codes, Floats, Hits, Mask, VectorIndex


class Aside:
    """New and changed vectors beside an index, which others may search meanwhile.

    They are compared one by one, and those of the index in their place are not returned.

    Parameters
    ----------
    codes
        Ascending; shape (m,).
    vectors
        Those of the codes; shape (m, dim).
    """

    name = None

    def __init__(self, index: VectorIndex, codes: Codes, vectors: Floats) -> None:
        self.index, self._codes, self._vectors = index, codes, vectors

    def __len__(self) -> int:
        return max(len(self.index), int(self._codes[-1]) + 1)

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        return self.index.exact

    def grown(self, vectors: Floats, changed: Codes) -> VectorIndex:
        """Return an index over `vectors`, which this one has save those at `changed` and new rows."""
        return self.index.grown(vectors, np.union1d(self._codes, changed).astype(np.int32))

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`, best first."""
        if not len(vectors):
            return []
        indexed = len(self.index)
        replaced = self._codes[self._codes < indexed]
        found = self.index.search(vectors, k, [_without(mask, replaced, indexed) for mask in masks])
        scores: Floats = np.asarray(vectors, np.float32) @ self._vectors.T
        merged = []
        for hits, mask, row in zip(found, masks, scores, strict=True):
            allowed = np.ones(len(row), np.bool_) if mask is None else mask[self._codes]
            items = np.concatenate([hits.items, self._codes[allowed]])
            values = np.concatenate([hits.scores, row[allowed]])
            order = np.lexsort((items, -values))[:k]
            merged.append(Hits(items[order], values[order]))
        return merged


def altered(old: int, vectors: Floats, changed: Codes) -> Codes:
    """Codes, ascending, of vectors that an index of `old` rows lacks: those at `changed`, and new rows."""
    new = np.arange(old, len(vectors), dtype=np.int32)
    return np.union1d(changed.astype(np.int32), new).astype(np.int32)


def beside(index: VectorIndex, vectors: Floats, changed: Codes) -> VectorIndex:
    """An index over `vectors` for a while: what is new or changed is not written anywhere."""
    codes = altered(len(index), vectors, changed)
    if isinstance(index, Aside):
        codes, index = np.union1d(codes, index._codes).astype(np.int32), index.index
    return Aside(index, codes, vectors[codes]) if len(codes) else index


def _without(mask: Mask | None, codes: Codes, n: int) -> Mask | None:
    """A mask over the first n items that forbids some more; None if it forbids none."""
    if mask is None and not len(codes):
        return None
    made: Mask = np.ones(n, np.bool_) if mask is None else mask[:n].copy()
    made[codes] = False
    return made
