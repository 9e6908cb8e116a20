"""Items by their inner product with a state, in an index of unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.protocols import Codes, Floats, Hits, Mask, VectorIndex

WIDE = 5
"""An index that is not exact is asked for so many times as many: states lie farther off than texts."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Items by the inner product of a state with their vectors, plus their bias, in an index of unit vectors.

    The bias is one more component. Another one makes all vectors as long as the longest, so that the order
    by inner product is that by angle, which graphs can search (Bachrach et al. 2014, RecSys).

    Parameters
    ----------
    index
        Over the unit vectors.
    length
        Of the longest vector, when all were indexed.
    middle
        Mean bias, which was taken off before.
    """

    index: VectorIndex
    length: float
    middle: float

    @classmethod
    def of(cls, vectors: Floats, bias: Floats, make: Callable[[Floats], VectorIndex]) -> Nearest:
        """Index item vectors, shape (items, dim), with a bias each, shape (items,)."""
        middle = float(bias.mean())
        squares = np.square(vectors).sum(axis=1) + np.square(bias - middle)
        length = float(np.sqrt(squares.max(initial=1e-12)))
        return cls(make(_lengthened(vectors, bias - middle, length)), length, middle)

    def grown(self, vectors: Floats, bias: Floats, changed: Codes) -> Nearest:
        """The same over these vectors: those at `changed` and what is new are indexed, the others are there.

        What is longer than the longest was stays longer; only a new index would mend that.
        """
        full = _lengthened(vectors, bias - self.middle, self.length)
        return Nearest(self.index.grown(full, changed), self.length, self.middle)

    def search(self, states: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Up to k allowed items for each state, shape (n, dim), with inner product and bias as score."""
        ends = np.tile(np.array([1.0, 0.0], np.float32), (len(states), 1))
        wide = k if self.index.exact else WIDE * k
        found = self.index.search(np.concatenate([states, ends], axis=1), wide, masks)
        return [Hits(hits.items[:k], hits.scores[:k] * self.length + self.middle) for hits in found]


def _lengthened(vectors: Floats, bias: Floats, length: float) -> Floats:
    """Vectors, their bias, and what they lack to be of this length, over that length: (n, dim + 2)."""
    lacks = np.sqrt(np.maximum(length**2 - np.square(vectors).sum(axis=1) - np.square(bias), 0.0))
    full: Floats = np.concatenate([vectors, bias[:, None], lacks[:, None]], axis=1).astype(np.float32)
    return full / np.float32(length)
