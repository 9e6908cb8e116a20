"""Windowed item-to-item transitions: what is chosen soon after what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import NO_HITS, age_weights, largest_of_rows, top_of_rows


class TransitionsConfig(BaseModel):
    """Settings of the transition model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(10, ge=1, description="furthest step between two events that counts")
    step_decay: float = Field(0.7, gt=0, le=1, description="weight of a pair, per step between its events")
    backward: float = Field(0.3, ge=0, description="weight of a pair read in the other direction")
    smoothing: float = Field(5.0, ge=0, description="pseudo-events of an item that lead nowhere")
    decay: float = Field(0.7, gt=0, le=1, description="weight of a history item, per step of age")
    keep: int = Field(2000, ge=1, description="largest transitions kept of each item")


class TransitionsRetriever:
    """First-order transitions within a window.

    C[i, j] = sum over pairs (i before j, d steps apart, d <= window) of step_decay ** (d - 1), plus
    `backward` times the same read backwards. T[i, j] = C[i, j] / (sum of C[i, :] + smoothing). The score
    of item j is the sum over the history of decay ** age times T[i, j].
    """

    name = "transitions"

    def __init__(self, matrix: scipy.sparse.csr_matrix, config: TransitionsConfig) -> None:
        self.matrix, self.config = matrix, config

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        config: TransitionsConfig,
        weights: Sequence[Floats] | None = None,
    ) -> TransitionsRetriever:
        """Count the pairs of all histories; with `weights` a pair counts the product of its events'."""
        lengths = np.array([len(h) for h in histories], dtype=np.int64)
        events = np.concatenate([np.empty(0, np.int32), *histories])
        user = np.repeat(np.arange(len(histories)), lengths)
        value = np.concatenate([np.empty(0, np.float32), *weights]) if weights is not None else None
        counts = scipy.sparse.csr_matrix((n_items, n_items), dtype=np.float32)
        for step in range(1, config.window + 1):
            pair = user[step:] == user[:-step]
            first, second = events[:-step][pair], events[step:][pair]
            other = first != second
            weight = np.full(np.count_nonzero(other), config.step_decay ** (step - 1), dtype=np.float32)
            if value is not None:
                weight *= (value[step:] * value[:-step])[pair][other]
            counts = counts + scipy.sparse.csr_matrix(
                (weight, (first[other], second[other])), shape=counts.shape
            )
        if config.backward:
            counts = counts + config.backward * counts.T
        out = np.asarray(counts.sum(axis=1)).ravel() + config.smoothing
        scale = scipy.sparse.diags_array((1.0 / np.where(out > 0, out, 1.0)).astype(np.float32))
        return cls(largest_of_rows(scipy.sparse.csr_matrix(scale @ counts), config.keep), config)

    def with_decay(self, decay: float) -> TransitionsRetriever:
        """The same transitions with another decay of the history; costs nothing."""
        return TransitionsRetriever(self.matrix, self.config.model_copy(update={"decay": decay}))

    def score(self, history: Codes) -> Floats:
        """Scores of the whole catalogue, shape (n_items,)."""
        rows, weights = self._rows_of(history)
        return np.asarray(rows.T @ weights, dtype=np.float32).ravel()

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items with a positive score for each query with a history."""
        return [
            top_of_rows(*self._rows_of(q.history), None, k, q) if len(q.history) else NO_HITS for q in queries
        ]

    def _rows_of(self, history: Codes) -> tuple[scipy.sparse.csr_matrix, Floats]:
        """Rows of the items that count, and the weight of each."""
        # Below a weight of 1e-4 an item cannot move the order any more.
        history = history[-_reach(self.config.decay) :]
        return self.matrix[history], age_weights(len(history), self.config.decay)

    def grown(self, n_items: int) -> TransitionsRetriever:
        """The same for a catalogue that has grown to `n_items`."""
        old = self.matrix
        # The entries are shared: nothing changes them.
        rows = np.pad(old.indptr, (0, n_items - old.shape[0]), mode="edge")
        matrix = scipy.sparse.csr_matrix((old.data, old.indices, rows), shape=(n_items, n_items))
        return TransitionsRetriever(matrix, self.config)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {
            "data": self.matrix.data,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
            "n_items": np.array(self.matrix.shape[0]),
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], config: TransitionsConfig
    ) -> TransitionsRetriever:
        """Make the retriever from `arrays()`."""
        n = int(arrays["n_items"])
        matrix = scipy.sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(n, n))
        return cls(matrix, config)


def _reach(decay: float) -> int:
    return 10_000 if decay > 0.999 else int(np.ceil(np.log(1e-4) / np.log(decay)))
