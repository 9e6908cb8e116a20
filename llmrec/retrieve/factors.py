"""Matrix factorisation: alternating least squares for implicit feedback, built on `implicit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import NO_HITS, age_weights, tops
from llmrec.retrieve.linear import user_item_matrix

CHUNK = 512
"""Queries that are scored at once."""


class ALSConfig(BaseModel):
    """Settings of ALS."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(128, ge=1, description="length of the factors")
    l2: float = Field(5.0, gt=0, description="ridge penalty")
    alpha: float = Field(10.0, gt=0, description="confidence of an event of weight 1")
    iterations: int = Field(15, ge=1)
    fit_decay: float = Field(1.0, gt=0, le=1, description="weight of an event in fitting, per step of age")
    decay: float = Field(0.9, gt=0, le=1, description="weight of a history item, per step of age")
    seed: int = 0


class ALSRetriever:
    """Implicit-feedback matrix factorisation (Hu, Koren and Volinsky 2008).

    A user's vector is solved from the history at request time, so unseen users are served like known ones:
    x = (Y'Y + l2 I + sum of (c - 1) y y')^-1 sum of c y over the history, c = alpha times the item's weight.

    Parameters
    ----------
    factors
        Item factors Y, shape (items, dim); zero for items without an event.
    """

    name = "als"

    def __init__(self, factors: Floats, config: ALSConfig) -> None:
        self.factors, self.config = factors, config
        self._gram = factors.T @ factors + config.l2 * np.eye(factors.shape[1], dtype=np.float32)

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        config: ALSConfig,
        weights: Sequence[Floats] | None = None,
    ) -> ALSRetriever:
        """Factorise the user-item matrix of the histories.

        Raises
        ------
        ImportError
            If `implicit` is not installed.
        """
        try:
            from implicit.als import AlternatingLeastSquares
            from threadpoolctl import threadpool_limits
        except ImportError as missing:
            raise ImportError('ALS needs: pip install "llmrec[families]"') from missing

        matrix = user_item_matrix(histories, n_items, config.fit_decay, weights)
        if matrix.nnz == 0:
            return cls(np.zeros((n_items, config.dim), np.float32), config)
        # The library has threads of its own, which those of BLAS would slow down.
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors=config.dim,
                regularization=config.l2,
                alpha=config.alpha,
                iterations=config.iterations,
                random_state=config.seed,
                use_gpu=False,
            )
            model.fit(matrix.astype(np.float32), show_progress=False)
        factors = np.array(model.item_factors, dtype=np.float32)
        factors[np.asarray((matrix > 0).sum(axis=0)).ravel() == 0] = 0.0
        return cls(factors, config)

    def user(self, history: Codes) -> Floats:
        """Factors of the user with this history, shape (dim,)."""
        confidence: dict[int, float] = {}
        for code, weight in zip(history.tolist(), age_weights(len(history), self.config.decay), strict=True):
            confidence[code] = max(confidence.get(code, 0.0), self.config.alpha * float(weight))
        rows = self.factors[list(confidence)]
        c = np.array(list(confidence.values()), dtype=np.float32)
        solved: Floats = np.linalg.solve(self._gram + (rows.T * (c - 1)) @ rows, c @ rows)
        return solved

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query whose history has a known item."""
        users = [self.user(q.history) if len(q.history) else np.zeros(0, np.float32) for q in queries]
        return by_inner_product(self.factors, users, queries, k)

    def grown(self, n_items: int) -> ALSRetriever:
        """The same for a catalogue that has grown; new items have no factors and are not proposed."""
        return ALSRetriever(np.pad(self.factors, ((0, n_items - len(self.factors)), (0, 0))), self.config)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {"factors": self.factors}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], config: ALSConfig) -> ALSRetriever:
        """Make the retriever from `arrays()`."""
        return cls(arrays["factors"], config)


def by_inner_product(items: Floats, users: Sequence[Floats], queries: Sequence[Query], k: int) -> list[Hits]:
    """The k allowed items of largest inner product for each user vector; none for an empty or zero one.

    Items whose vector is zero are not proposed.
    """
    found: list[Hits] = [NO_HITS] * len(queries)
    known = items.any(axis=1)
    able = [row for row, user in enumerate(users) if user.any()]
    for start in range(0, len(able), CHUNK):
        rows = able[start : start + CHUNK]
        scores = np.stack([users[row] for row in rows]) @ items.T
        scores[:, ~known] = -np.inf
        for row, hits in zip(rows, tops(scores, [queries[row] for row in rows], k), strict=True):
            found[row] = hits
    return found
