"""Vectors on a server: what the engines have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from llmrec.index.aside import altered
from llmrec.protocols import Codes, Floats, Hits, Mask
from llmrec.ranking import NO_HITS

CHUNK = 20_000
"""Vectors that are read and sent at once."""

FEW = 1000
"""Allowed items up to which they are named to the server, which then compares them one by one."""


class ServerIndex(ABC):
    """A collection on a server, by name: one row a code, shared by all processes that open it.

    A row that another process has put for an item that this one does not know yet is not returned. What is
    written is found by the next search.

    Parameters
    ----------
    name
        Of the collection: letters, digits and underscores.
    """

    exact = False

    def __init__(self, name: str, dim: int) -> None:
        self.collection = name
        self.dim = dim
        self.shown = ""
        self._rows = 0

    @property
    def name(self) -> str:
        """Name of the collection."""
        return self.collection

    def __len__(self) -> int:
        return self._rows

    def open(self, vectors: Floats) -> bool:
        """Take over a collection that is there and has these rows at least; return whether there was one."""
        if self.stored() < len(vectors):
            return False
        self._rows = len(vectors)
        return True

    def build(self, vectors: Floats) -> None:
        """Write all vectors, shape (n, dim), in place of what may be there; readers see all or none."""
        self._replace(vectors)
        self._rows = len(vectors)

    def grown(self, vectors: Floats, changed: Codes) -> Self:
        """Write what is new or changed; the index that is returned knows the new rows, this one does not."""
        codes = altered(self._rows, vectors, changed)
        if len(codes):
            self._write(codes, vectors[codes])
        made = copy.copy(self)
        made._rows = len(vectors)
        return made

    def search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]:
        """Return up to k allowed items for each row of `vectors`, best first."""
        k = min(k, self._rows)
        if not len(vectors) or not k:
            return [NO_HITS] * len(vectors)
        return self._search(np.asarray(vectors, np.float32), k, masks)

    @abstractmethod
    def stored(self) -> int:
        """Number of rows on the server; 0 if there is no such collection."""

    @abstractmethod
    def drop(self) -> None:
        """Remove the collection; one that is gone already is no error."""

    @abstractmethod
    def close(self) -> None:
        """Release the connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def _replace(self, vectors: Floats) -> None: ...

    @abstractmethod
    def _write(self, codes: Codes, vectors: Floats) -> None: ...

    @abstractmethod
    def _search(self, vectors: Floats, k: int, masks: Sequence[Mask | None]) -> list[Hits]: ...
