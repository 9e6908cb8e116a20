"""The modes that answer with a label: `yes_no`, one candidate at a time, and `letters`, all in one prompt."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import ConfigError, ModelError
from llmrec.protocols import Codes, Floats, Query
from llmrec.score.packed import NOTHING, PackedReader, in_turn
from llmrec.score.trie import Ints, Tree
from llmrec.score.words import Vocabulary, WordsModel

YES_NO = ((" Yes", " No"), ("Yes", "No"), (" yes", " no"), ("yes", "no"), ("1", "0"))
"""Label words, the first pair of which both are single tokens is used."""


def yes_no_labels(vocabulary: Vocabulary) -> tuple[int, int]:
    """Tokens of yes and no.

    Raises
    ------
    ModelError
        If the tokenizer has no pair of them as single tokens.
    """
    for pair in YES_NO:
        yes, no = (vocabulary.label(word) for word in pair)
        if yes is not None and no is not None and yes != no:
            return yes, no
    raise ModelError(f"the tokenizer has none of {YES_NO} as single tokens; use another mode")


def letter_labels(vocabulary: Vocabulary) -> list[int]:
    """Tokens of the letters A to Z.

    Raises
    ------
    ModelError
        If they are not single tokens, all different.
    """
    found = [vocabulary.label(f" {letter}", letter) for letter in string.ascii_uppercase]
    labels = [token for token in found if token is not None]
    if len(set(labels)) < len(string.ascii_uppercase):
        raise ModelError("the tokenizer has no single tokens for the letters; use another mode")
    return labels


class YesNoScorer:
    """Logit of yes less that of no after each candidate's line. Scores whatever has a text.

    All candidates of a request are branches behind one history.
    """

    name = "lm"

    def __init__(self, words: WordsModel, reader: PackedReader) -> None:
        self.words, self.reader = words, reader
        self._labels = torch.tensor(yes_no_labels(words.vocabulary))
        self.last = words.last

    def forget(self) -> None:
        """Drop what was read of histories."""
        self.reader.forget()

    def asks(self, query: Query, items: Codes) -> tuple[Tree, Ints]:
        """The tree behind a history, and the places that are answered: 0 is the end of the history."""
        return self._tree(query, [self.words.lines[code] for code in items])

    def answers(self, states: Tensor, candidates: int) -> Tensor:
        """Scores from the states of the places that are answered: (candidates, hidden) -> (candidates,)."""
        logits = self.words.logits(states, self._labels.to(states.device))
        return logits[:, 0] - logits[:, 1]

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Log-odds of yes for each candidate of each query."""
        return in_turn(self._score, queries, candidates)

    def _score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        return self._read(
            queries, [self.asks(q, items) for q, items in zip(queries, candidates, strict=True)]
        )

    def score_texts(self, query: Query, texts: Sequence[str], limit: int) -> Floats:
        """The same for texts that need not be items, of which the first `limit` tokens are read."""
        return self._read([query], [self._tree(query, self.words.vocabulary.lines(texts, limit))])[0]

    def _tree(self, query: Query, lines: Sequence[Sequence[int]]) -> tuple[Tree, Ints]:
        stem = self.words.stem(query)
        tree, ends = Tree.of([[*line, self.words.vocabulary.end, *self.last] for line in lines])
        return tree.after(stem), 1 + len(stem) + ends

    def _read(self, queries: Sequence[Query], asked: Sequence[tuple[Tree, Ints]]) -> list[Floats]:
        beginnings = [self.words.beginning(query.history) for query in queries]
        states = self.reader.read(beginnings, [tree for tree, _ in asked])
        with torch.inference_mode():
            return [
                self.answers(state[torch.from_numpy(places)], len(places)).cpu().numpy()
                for state, (_, places) in zip(states, asked, strict=True)
            ]


class LettersScorer:
    """All candidates in one prompt, a letter each; the logits of the letters are the scores.

    After LlamaRec (arXiv 2311.02089). More candidates than `window` are read in windows that overlap by half,
    from the last to the first, and what wins in one goes on to the next. The order of the candidates
    matters; several orders can be averaged.

    Parameters
    ----------
    window
        Candidates in one prompt, 2 to 26.
    orders
        How many: the order given, turned on each time, so that with as many orders as candidates each has
        had every letter once.
    """

    name = "lm"

    def __init__(self, words: WordsModel, reader: PackedReader, *, window: int = 20, orders: int = 1) -> None:
        if not 2 <= window <= len(string.ascii_uppercase):
            raise ConfigError(f"window must be 2 to 26 candidates, got {window}")
        self.words, self.reader, self.window, self.orders = words, reader, window, orders
        self._labels = torch.tensor(letter_labels(words.vocabulary))
        self.last = words.last

    def forget(self) -> None:
        """Drop what was read of histories."""
        self.reader.forget()

    def asks(self, query: Query, items: Codes) -> tuple[Tree, Ints]:
        """The chain behind a history for at most 26 candidates in this order, and the place of its end."""
        if len(items) > len(string.ascii_uppercase):
            raise ConfigError(f"there are letters for 26 candidates, got {len(items)}")
        tokens = self.words.stem(query)
        for letter, code in zip(string.ascii_uppercase, items, strict=False):
            tokens += [*self.words.vocabulary.tokens(f"{letter}: "), *self.words.chain([code])]
        tokens += self.last
        return NOTHING.after(tokens), np.array([len(tokens)])

    def answers(self, states: Tensor, candidates: int) -> Tensor:
        """Scores from the state of the place that is answered: (1, hidden) -> (candidates,)."""
        return self.words.logits(states, self._labels[:candidates].to(states.device))[0]

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Mean log-probability of each candidate's letter; beyond one window, minus its final rank."""
        return [self._score(query, items) for query, items in zip(queries, candidates, strict=True)]

    def _score(self, query: Query, items: Codes) -> Floats:
        if len(items) == 0:
            return np.zeros(0, np.float32)
        if len(items) <= self.window:
            return self._answer(query, items)
        order = np.arange(len(items))
        low = len(items) - self.window
        while True:
            part = order[low : low + self.window]
            values = self._answer(query, items[part])
            order[low : low + self.window] = part[np.argsort(-values, kind="stable")]
            if low == 0:
                break
            low = max(0, low - self.window // 2)
        scores = np.empty(len(items), np.float32)
        scores[order] = -np.arange(1, len(items) + 1, dtype=np.float32)
        return scores

    def _answer(self, query: Query, items: Codes) -> Floats:
        """Mean log-probability of the letter of each of at most 26 candidates over the orders."""
        turns = np.arange(min(self.orders, len(items))) * len(items) // min(self.orders, len(items))
        orders = [np.roll(np.arange(len(items)), -turn) for turn in turns]
        trees = [self.asks(query, items[order])[0] for order in orders]
        states = self.reader.read([self.words.beginning(query.history)] * len(trees), trees)
        total = np.zeros(len(items))
        with torch.inference_mode():
            for order, state in zip(orders, states, strict=True):
                values = torch.log_softmax(self.answers(state[-1:], len(items)), dim=-1)
                total[order] += values.cpu().numpy()
        return (total / len(orders)).astype(np.float32)
