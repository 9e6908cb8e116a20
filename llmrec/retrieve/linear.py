"""EASE: a linear item-item model in closed form, with recency weighting."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import NO_HITS, age_weights, largest_of_rows, top_of_rows
from llmrec.retrieve.sparse_linear import Neighbourhood

logger = logging.getLogger(__name__)

BLOCK = 1024
"""Rows of the item-item matrix that are worked on at once."""


class EASEConfig(BaseModel):
    """Settings of EASE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    l2: float = Field(200.0, gt=0, description="ridge penalty")
    fit_decay: float = Field(1.0, gt=0, le=1, description="weight of an event in fitting, per step of age")
    decay: float = Field(0.8, gt=0, le=1, description="weight of a history item, per step of age")
    text: float = Field(50.0, ge=0, description="how many users one text dimension counts like")
    max_items: int = Field(20_000, ge=1, description="most items solved together; cost is cubic in it")
    neighbours: int = Field(200, ge=1, description="of each item, where there are more: solved among these")
    keep: int = Field(1000, ge=1, description="largest weights kept for each item")


def user_item_matrix(
    histories: Sequence[Codes], n_items: int, decay: float, weights: Sequence[Floats] | None = None
) -> scipy.sparse.csr_matrix:
    """Rows are users; an event of age a counts decay ** a times its weight, 1 where none are given.

    Of several events of a user with an item the largest counts.
    """
    rows = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    columns = np.concatenate([np.empty(0, np.int32), *histories])
    values = np.concatenate([np.empty(0, np.float32), *(age_weights(len(h), decay) for h in histories)])
    if weights is not None:
        values = values * np.concatenate([np.empty(0, np.float32), *weights])
    matrix = scipy.sparse.coo_matrix((values, (rows, columns)), shape=(len(histories), n_items))
    # Converting would sum duplicates.
    keys = rows.astype(np.int64) * n_items + columns
    order = np.lexsort((-matrix.data, keys))
    first = np.ones(len(order), dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    kept = order[first]
    return scipy.sparse.csr_matrix((matrix.data[kept], (rows[kept], columns[kept])), shape=matrix.shape)


@dataclass(frozen=True, slots=True)
class CoOccurrence:
    """All that EASE is solved from, whatever the penalty: events and texts of the items.

    Parameters
    ----------
    n_items
        Size of the catalogue.
    items
        Catalogue codes of the items in the model, ascending, shape (m,).
    events
        Users by those items, shape (users, m).
    texts
        Unit text vectors of those items, shape (m, dim); dim may be 0.
    near
        Neighbours of each item, where the items are too many to be solved together.
    """

    n_items: int
    items: Codes
    events: scipy.sparse.csr_matrix
    texts: Floats
    near: Neighbourhood | None

    @classmethod
    def of(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        config: EASEConfig,
        weights: Sequence[Floats] | None = None,
        vectors: Floats | None = None,
    ) -> CoOccurrence:
        """Collect it from a log and from text vectors, shape (n_items, dim).

        An item without events takes part by its text, unless the catalogue has more than `max_items` items.
        """
        matrix = user_item_matrix(histories, n_items, config.fit_decay, weights)
        texts = np.zeros((n_items, 0), np.float32) if vectors is None else vectors
        taking = np.asarray((matrix > 0).sum(axis=0)).ravel() > 0
        if n_items <= config.max_items and config.text > 0:
            taking |= texts.any(axis=1)
        items: Codes = np.flatnonzero(taking).astype(np.int32)
        events, near = matrix[:, items], None
        if len(items) > config.max_items:
            logger.info("EASE over %d items is solved among neighbours", len(items))
            near = Neighbourhood.of(events, config.neighbours)
        return cls(n_items, items, events, texts[items], near)

    def solve(self, config: EASEConfig) -> EASERetriever:
        """Item-item weights under the penalty and the text weight of `config`."""
        if self.near is not None:
            weights = largest_of_rows(self.near.solve(config.l2, config.text, self.texts), config.keep)
        else:
            gram = np.asarray((self.events.T @ self.events).toarray(), dtype=np.float32)
            for start in range(0, len(gram) if config.text else 0, BLOCK):
                rows = slice(start, start + BLOCK)
                gram[rows] += config.text * (self.texts[rows] @ self.texts.T)
            gram[np.diag_indices_from(gram)] += config.l2
            weights = _prune(_solve(gram), config.keep)
        return EASERetriever(self.items, weights, self.n_items, config)


class EASERetriever:
    """Embarrassingly shallow autoencoder (Steck 2019, arXiv 1905.03375) over events and texts.

    With P = (X'X + text * VV' + l2 I)^-1 the item-item weights are B = -P / diag(P) by column, with zero
    diagonal; the score of item j is the sum over the history of decay ** age times B[i, j]. The rows of V
    are the items' unit text vectors: a text dimension is one more user, who has every item to some degree
    (side information as in CEASE; Jeunen, Van Balen and Goethals 2020).

    Parameters
    ----------
    items
        Catalogue codes of the items in the model, ascending, shape (m,).
    weights
        B among those items, sparse, shape (m, m).
    n_items
        Size of the catalogue.
    """

    name = "ease"

    def __init__(
        self, items: Codes, weights: scipy.sparse.csr_matrix, n_items: int, config: EASEConfig
    ) -> None:
        self.items, self.weights, self.n_items, self.config = items, weights, n_items, config
        self._row = np.full(n_items, -1, dtype=np.int64)
        self._row[items] = np.arange(len(items))

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        config: EASEConfig,
        weights: Sequence[Floats] | None = None,
        vectors: Floats | None = None,
    ) -> EASERetriever:
        """Solve for B; where there are more than `max_items` items, column by column among neighbours.

        `weights` are those of the events, one array a history. Without text vectors, shape (n_items, dim),
        `text` has no effect.
        """
        return CoOccurrence.of(histories, n_items, config, weights, vectors).solve(config)

    def with_decay(self, decay: float) -> EASERetriever:
        """The same weights with another decay of the history; costs nothing."""
        return EASERetriever(
            self.items, self.weights, self.n_items, self.config.model_copy(update={"decay": decay})
        )

    def score(self, history: Codes) -> Floats:
        """Scores of the whole catalogue, shape (n_items,); 0 for items outside the model."""
        scores = np.zeros(self.n_items, dtype=np.float32)
        rows, weights = self._rows_of(history)
        scores[self.items] = np.asarray(rows.T @ weights).ravel()
        return scores

    def _rows_of(self, history: Codes) -> tuple[scipy.sparse.csr_matrix, Floats]:
        """Rows of the items of a history that are in the model, and the weight of the latest of each."""
        rows, ages = np.unique(self._row[history[::-1]], return_index=True)
        inside = rows >= 0
        weights: Floats = self.config.decay ** ages[inside]
        return self.weights[rows[inside]], weights.astype(np.float32)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items with a positive score for each query with a history."""
        return [
            top_of_rows(*self._rows_of(q.history), self.items, k, q) if len(q.history) else NO_HITS
            for q in queries
        ]

    def grown(self, n_items: int) -> EASERetriever:
        """The same for a catalogue that has grown to `n_items`."""
        return EASERetriever(self.items, self.weights, n_items, self.config)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {
            "items": self.items,
            "data": self.weights.data,
            "indices": self.weights.indices,
            "indptr": self.weights.indptr,
            "n_items": np.array(self.n_items),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], config: EASEConfig) -> EASERetriever:
        """Make the retriever from `arrays()`."""
        m = len(arrays["items"])
        weights = scipy.sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(m, m))
        return cls(arrays["items"], weights, int(arrays["n_items"]), config)


def _solve(gram: Floats) -> Floats:
    """B from the regularised Gram matrix, whose memory is reused."""
    if len(gram) == 0:
        return gram
    factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights: Floats = inverse / -np.diag(inverse)
    weights[np.diag_indices_from(weights)] = 0.0
    return weights


def _prune(weights: Floats, keep: int) -> scipy.sparse.csr_matrix:
    """Keep the `keep` largest weights by size in each row."""
    m = len(weights)
    if keep < m:
        for start in range(0, m, BLOCK):
            block = weights[start : start + BLOCK]
            cut = np.partition(np.abs(block), m - keep, axis=1)[:, m - keep, None]
            block[np.abs(block) < cut] = 0.0
    return scipy.sparse.csr_matrix(weights)
