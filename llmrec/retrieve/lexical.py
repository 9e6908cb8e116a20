"""BM25 over item texts, for typed queries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrec.protocols import Floats, Hits, Query
from llmrec.ranking import NO_HITS, top


class BM25Retriever:
    """Items that share words with the typed query (Robertson and Zaragoza 2009), built on bm25s.

    Parameters
    ----------
    lines
        The text of each item, by code.
    """

    name = "bm25"

    def __init__(self, lines: Sequence[str]) -> None:
        import bm25s

        # The library sets its logger to DEBUG, over the application's own level.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._bm25s: Any = bm25s
        self.n_items = len(lines)
        tokens = self._tokens(list(lines))
        # An index over texts without a single word would fail inside the library.
        self._index: Any = None
        if any(len(t) for t in tokens):
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        tokens: list[list[str]] = self._bm25s.tokenize(
            texts, stopwords="en", return_ids=False, show_progress=False
        )
        return tokens

    def score(self, text: str) -> Floats:
        """BM25 of every item, shape (items,)."""
        words = self._tokens([text])[0]
        known = [w for w in words if self._index is not None and w in self._index.vocab_dict]
        if not known:
            return np.zeros(self.n_items, dtype=np.float32)
        return np.asarray(self._index.get_scores(known), dtype=np.float32)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items that share a word with the query."""
        return [top(self.score(q.text), k, q.mask, floor=0.0) if q.text else NO_HITS for q in queries]
