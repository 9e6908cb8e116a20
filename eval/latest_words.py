"""The latest items of a history in words beside their vectors: a trial of the ablations.

The words stand where a typed wish would: after the vectors of the history, before the item that is predicted.
In training that is the last item of each window; the others are predicted from vectors alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.score.item_tokens import Wish
from llmrec.score.tasks import ItemTokensTask
from llmrec.sequences import Window


@dataclass(frozen=True)
class Latest:
    """Writes the titles of the last `count` items of a history, the latest first; long lines are cut."""

    wish: Wish
    titles: Sequence[str]
    count: int

    def text(self, history: Codes) -> str:
        """Empty for an empty history."""
        return "; ".join(self.titles[code] for code in history[::-1][: self.count].tolist())

    def tokens(self, history: Codes) -> list[int]:
        """The line of the prompt with them; none for an empty history."""
        text = self.text(history)
        return self.wish.tokens(text) if text else []


class LatestTask(ItemTokensTask):
    """Windows whose last item is predicted after words too; `learned` is what such a task takes."""

    def __init__(self, latest: Latest, *learned: Any) -> None:
        super().__init__(*learned)
        self.latest = latest

    def epoch(self, rng: np.random.Generator, parts: int = 1) -> Iterator[list[Window]]:
        """The same batches, which the words make several times as long where windows are short."""
        for group in super().epoch(rng, parts):
            yield [replace(window, typed=self.latest.tokens(window.items[:-1])) for window in group]


class InWords:
    """A scorer that is given the words with every history."""

    def __init__(self, scorer: Any, latest: Latest) -> None:
        self.scorer, self.latest = scorer, latest

    def _worded(self, queries: Sequence[Query]) -> list[Query]:
        return [replace(query, text=self.latest.text(query.history)) for query in queries]

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Scores of candidates."""
        scores: list[Floats] = self.scorer.score(self._worded(queries), candidates)
        return scores

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Up to k items for each query."""
        hits: list[Hits] = self.scorer.retrieve(self._worded(queries), k)
        return hits

    def forget(self) -> None:
        """Drop what was kept."""
        self.scorer.forget()
