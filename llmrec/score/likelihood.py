"""The `likelihood` mode: an item's probability is that of its line, word by word, among the lines there are.

At a node of the trie with children C the model chooses between them alone:
log p(c | node, history) = log_softmax over C of (scale * logit[c] + log n(c)), where n(c) is the smoothed
number of training events under c. The sum along an item's path is its log-probability: exact over the
catalogue, without a length penalty, and a forced token costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.score.packed import PackedReader, Row, forward, in_turn
from llmrec.score.trie import ROOT, ItemTrie
from llmrec.score.words import WordsModel

SEARCHES = 16
"""Beam searches at once: each keeps what the layers made of its history and of its branches."""


class LikelihoodModel:
    """A words model and the trie of its catalogue."""

    def __init__(self, words: WordsModel, trie: ItemTrie) -> None:
        self.words, self.trie = words, trie

    def children(self, states: Tensor, node: int) -> Tensor:
        """Log-probability of each child of a node: states (n, hidden) -> (n, children)."""
        children = slice(int(self.trie.first[node]), int(self.trie.last[node]))
        tokens = torch.from_numpy(self.trie.tokens[children].astype(np.int64))
        prior = torch.from_numpy(np.log(self.trie.mass(children)).astype(np.float32))
        logits = self.words.logits(states, tokens.to(states.device))
        return torch.log_softmax(logits + prior.to(states.device), dim=-1)


class LikelihoodScorer:
    """Scores items by the log-probability of their lines, and proposes items by beam search on the trie.

    Parameters
    ----------
    beam
        Nodes that the search keeps at each step; as many as there are items make it exact.
    """

    name = "lm"

    def __init__(self, model: LikelihoodModel, reader: PackedReader, beam: int = 50) -> None:
        self.model, self.reader, self.beam = model, reader, beam

    def forget(self) -> None:
        """Drop what was read of histories."""
        self.reader.forget()

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Log-probability over the whole catalogue of each candidate of each query."""
        return in_turn(self._score, queries, candidates)

    def _score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        words, trie = self.model.words, self.model.trie
        nodes = [trie.to_score(items) for items in candidates]
        stems = [words.stem(query) for query in queries]
        beginnings = [words.beginning(query.history) for query in queries]
        trees = [trie.tree(own).after(stem) for own, stem in zip(nodes, stems, strict=True)]
        states = self.reader.read(beginnings, trees)
        return [
            self._along(items, own, state[len(stem) :])
            for items, own, stem, state in zip(candidates, nodes, stems, states, strict=True)
        ]

    def _along(self, items: Codes, nodes: NDArray[np.int64], states: Tensor) -> Floats:
        """Sum of the choices on the way to each item; `states` are those of the root and of `nodes`."""
        trie = self.model.trie
        with torch.inference_mode():
            rows = {ROOT: 0} | {node: row for row, node in enumerate(nodes.tolist(), start=1)}
            choices = {
                node: self.model.children(states[row : row + 1], node)[0].cpu().numpy()
                for node, row in rows.items()
                if trie.last[node] - trie.first[node] > 1
            }
        values = np.log(trie.share(items))
        for at, leaf in enumerate(trie.leaf[items].tolist()):
            node = leaf
            while node != ROOT:
                before = int(trie.parents[node])
                if before in choices:
                    values[at] += choices[before][node - trie.first[before]]
                node = before
        return values.astype(np.float32)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query, found by beam search; at most about `beam` of them."""
        found: list[Hits] = []
        with torch.inference_mode():
            for start in range(0, len(queries), SEARCHES):
                searches = [_Search(self.model, q, self.beam) for q in queries[start : start + SEARCHES]]
                self._run(searches)
                found += [search.hits(k) for search in searches]
        return found

    def _run(self, searches: Sequence[_Search]) -> None:
        """Take some searches to their ends, a step of all of them in one forward."""
        for search in searches:
            search.begin(self.reader)
        while running := [search for search in searches if search.unread]:
            hidden, layers = forward(self.model.words.body, [search.row() for search in running])
            read = max(search.past.shape[3] for search in running)
            for at, search in enumerate(running):
                n = len(search.unread)
                fresh = [
                    torch.stack([key[at, :, read : read + n], value[at, :, read : read + n]])
                    for key, value in layers
                ]
                search.go_on(hidden[at, :n].float(), torch.stack(fresh))


@dataclass(slots=True)
class _Open:
    """A node of the beam: its log-probability and the place of its state."""

    value: float
    node: int
    place: int


class _Search:
    """Beam search for one query. What branches from the history is read once and kept."""

    def __init__(self, model: LikelihoodModel, query: Query, beam: int) -> None:
        self.model, self.query, self.beam = model, query, beam
        self.allowed = model.trie.allowed(query.mask)
        self.done: list[tuple[float, int]] = []
        self.unread: list[tuple[int, int]] = []
        self._open: list[_Open] = []
        # Of the tokens behind the history: place of the one before, and how many tokens came before.
        self._before: list[int] = []
        self._depth: list[int] = []

    def begin(self, reader: PackedReader) -> None:
        """Read the history, and choose among the first tokens."""
        words = self.model.words
        past = reader.past(words.beginning(self.query.history))
        self.past, self._start = past.kept, past.length
        stem = words.stem(self.query)
        if stem:
            self.unread = [(token, place - 1) for place, token in enumerate(stem)]
            self._open = [_Open(0.0, ROOT, len(stem) - 1)]
        elif self.allowed(ROOT):
            self._open = [_Open(0.0, ROOT, -1)]
            self._choose({-1: past.end})

    def row(self) -> Row:
        """The tokens to read next; each sees the history and its own way."""
        old, new = len(self._before), len(self.unread)
        self._before += [before for _, before in self.unread]
        for _, before in self.unread:
            self._depth.append(self._depth[before] + 1 if before >= 0 else 0)
        sees = np.zeros((new, self._start + old + new), dtype=np.bool_)
        sees[:, : self._start] = True
        for at in range(new):
            place = old + at
            while place >= 0:
                sees[at, self._start + place] = True
                place = self._before[place]
        tokens = np.array([token for token, _ in self.unread], dtype=np.int64)
        return Row(self.past, tokens, self._start + np.array(self._depth[old:], dtype=np.int64), sees)

    def go_on(self, states: Tensor, kept: Tensor) -> None:
        """Take the states of what `row` gave, and choose again."""
        old = len(self._before) - len(self.unread)
        self.past = torch.cat([self.past, kept], dim=3)
        self._choose({old + at: state for at, state in enumerate(states)})

    def _choose(self, states: dict[int, Tensor]) -> None:
        """Follow every open node to its children, keep the best, and list what has to be read for them."""
        trie = self.model.trie
        pool = [(value, leaf, -2) for value, leaf in self.done]
        for opened in self._open:
            first, last = int(trie.first[opened.node]), int(trie.last[opened.node])
            values = np.array([opened.value])
            if last - first > 1:
                state = states[opened.place][None]
                values = opened.value + self.model.children(state, opened.node)[0].cpu().numpy()
            pool += [
                (float(value), child, opened.place)
                for child, value in zip(range(first, last), values, strict=True)
                if self.allowed(child)
            ]
        best = sorted(pool, key=lambda entry: (-entry[0], entry[1]))[: self.beam]
        self.done, self._open, self.unread = [], [], []
        for value, node, before in best:
            chain = [node]
            while (following := int(trie.last[chain[-1]] - trie.first[chain[-1]])) == 1:
                chain.append(int(trie.first[chain[-1]]))
            if following == 0:
                self.done.append((value, chain[-1]))
                continue
            for node in chain:
                self.unread.append((int(trie.tokens[node]), before))
                before = len(self._before) + len(self.unread) - 1
            self._open.append(_Open(value, chain[-1], before))

    def hits(self, k: int) -> Hits:
        """The items of the leaves that were reached, best first."""
        trie, mask = self.model.trie, self.query.mask
        items = np.concatenate(
            [np.empty(0, np.int32), *(trie.items[trie.low[leaf] : trie.high[leaf]] for _, leaf in self.done)]
        )
        counts = [int(trie.high[leaf] - trie.low[leaf]) for _, leaf in self.done]
        values = np.repeat([value for value, _ in self.done], counts) + np.log(trie.share(items))
        if mask is not None:
            items, values = items[mask[items]], values[mask[items]]
        order = np.lexsort((items, -values))[:k]
        return Hits(items[order], values[order].astype(np.float32))
