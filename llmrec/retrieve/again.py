"""What a person chose before, for logs in which things are bought or played again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Hits, Query
from llmrec.ranking import NO_HITS, age_weights, top


class AgainConfig(BaseModel):
    """Settings of the repeat retriever."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decay: float = Field(0.95, gt=0, le=1, description="weight of an event, per step of age")


class AgainRetriever:
    """The person's own items, by how often and how lately: score = sum over its events of decay ** age."""

    name = "again"

    def __init__(self, n_items: int, config: AgainConfig) -> None:
        self.n_items, self.config = n_items, config

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items of each query's history."""
        found = []
        for query in queries:
            if not len(query.history):
                found.append(NO_HITS)
                continue
            weights = age_weights(len(query.history), self.config.decay)
            scores = np.bincount(query.history, weights, minlength=self.n_items).astype(np.float32)
            found.append(top(scores, k, query.mask, floor=0.0))
        return found
