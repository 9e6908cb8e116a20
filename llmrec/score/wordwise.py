"""The `likelihood` mode normalised over the vocabulary: an item's score is the log-probability of its line.

Every word is one among all words, forced or not, so no tree of the catalogue is needed and an inference
server gives the same numbers. Longer lines are less probable: scores say which item, not how likely one is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmrec.protocols import Codes, Floats, Query
from llmrec.score.packed import PackedReader, in_turn
from llmrec.score.trie import Tree
from llmrec.score.words import WordsModel


class VocabularyScorer:
    """Scores items by the log-probability of their lines, word by word among all words."""

    name = "lm"

    def __init__(self, words: WordsModel, reader: PackedReader) -> None:
        self.words, self.reader = words, reader

    def forget(self) -> None:
        """Drop what was read of histories."""
        self.reader.forget()

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Log-probability of the line of each candidate of each query."""
        return in_turn(self._score, queries, candidates)

    def _score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        words = self.words
        beginnings = [words.beginning(query.history) + words.stem(query) for query in queries]
        joined = [Tree.of([words.chain([code]) for code in items]) for items in candidates]
        states = self.reader.read(beginnings, [tree for tree, _ in joined])
        scores = []
        with torch.inference_mode():
            for (tree, ends), state in zip(joined, states, strict=True):
                # The state before a word is that of its parent; row 0 is that of the beginning.
                before = state[torch.from_numpy(tree.parents + 1).to(state.device)]
                own = words.log_probs(before, torch.from_numpy(tree.tokens).to(state.device)).cpu().numpy()
                total = np.zeros(len(tree))
                for at, parent in enumerate(tree.parents):
                    total[at] = own[at] + (total[parent] if parent >= 0 else 0.0)
                scores.append(total[ends].astype(np.float32))
        return scores
