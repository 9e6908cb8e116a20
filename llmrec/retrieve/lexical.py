"""BM25 over item texts, for typed queries."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmrec.protocols import Floats, Hits, Query
from llmrec.ranking import NO_HITS, top
from llmrec.text import changed_lines
from llmrec.words import sought_words

K1, B = 1.5, 0.75

ASIDE, ASIDE_SHARE = 256, 0.05
"""Items, and share of the catalogue, that may be new or changed before the index is built again."""


class _Index:
    """bm25s over lines, built when it is first asked. Thread-safe."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines
        self.average = 0.0
        self._index: Any = None
        self.built = False
        self._lock = threading.Lock()

    def scores(self, words: Sequence[str]) -> Floats:
        """BM25 of every line, shape (lines,)."""
        known = [word for word in words if self.count(word)]
        if not known:
            return np.zeros(len(self.lines), dtype=np.float32)
        return np.asarray(self._index.get_scores(known), dtype=np.float32)

    def count(self, word: str) -> int:
        """Return how many lines have a word."""
        self.build()
        if self._index is None or word not in self._index.vocab_dict:
            return 0
        place = self._index.vocab_dict[word]
        starts = self._index.scores["indptr"]
        return int(starts[place + 1] - starts[place])

    def build(self) -> None:
        """Build the index unless it is built."""
        with self._lock:
            if not self.built:
                self._build()
                self.built = True

    def _build(self) -> None:
        import bm25s

        # The library sets its logger to DEBUG, over the application's own level.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        words = [sought_words(line) for line in self.lines]
        # An index over texts without a single word would fail inside the library.
        if any(words):
            self.average = float(np.mean([len(line) for line in words]))
            self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
            self._index.index(words, show_progress=False)


class BM25Retriever:
    """Items that share words with the typed query (Robertson and Zaragoza 2009), built on bm25s.

    The index is built when it is first asked. Items that are added or changed later stand aside: they are
    scored one by one with the document counts and the average length of the index, until they are so many
    that it is worth building it again.

    Parameters
    ----------
    lines
        The text of each item, by code.
    """

    name = "bm25"

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines
        self._index = _Index(lines)
        self._aside: Mapping[int, list[str]] = {}

    def grown(self, lines: Sequence[str]) -> BM25Retriever:
        """The same for a catalogue whose lines changed or grew; this one stays as it is."""
        changed = changed_lines(self.lines, lines)
        if len(self._aside) + len(changed) > max(ASIDE, ASIDE_SHARE * len(lines)):
            return BM25Retriever(lines)
        made = BM25Retriever(lines)
        made._index = self._index
        made._aside = {**self._aside, **{code: sought_words(lines[code]) for code in changed}}
        return made

    @property
    def is_ready(self) -> bool:
        """Whether the index is built."""
        return self._index.built

    def make_ready_like(self, other: BM25Retriever) -> None:
        """Build the index now if the other's is built, so that no request waits for it."""
        if other.is_ready:
            self._index.build()

    def score(self, text: str) -> Floats:
        """BM25 of every item, shape (items,)."""
        words, index = sought_words(text), self._index
        scores = np.zeros(len(self.lines), dtype=np.float32)
        scores[: len(index.lines)] = index.scores(words)
        if not self._aside:
            return scores
        weights = {word: self._idf(word) for word in set(words)}
        for code, line in self._aside.items():
            length = 1.0 - B + B * len(line) / (index.average or len(line) or 1)
            counts = ((weights[word], line.count(word)) for word in words)
            scores[code] = sum(idf * n / (n + K1 * length) for idf, n in counts)
        return scores

    def _idf(self, word: str) -> float:
        lines = len(self._index.lines)
        # A word that the index has never seen is as rare as it is among what stands aside.
        count = self._index.count(word) or sum(word in line for line in self._aside.values())
        return math.log(1.0 + (max(lines, count) - count + 0.5) / (count + 0.5))

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items that share a word with the query."""
        return [
            replace(top(self.score(q.text), k, q.mask, floor=0.0), least=0.0) if q.text else NO_HITS
            for q in queries
        ]
