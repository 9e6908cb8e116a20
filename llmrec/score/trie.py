"""All lines of the catalogue as one tree of tokens.

Each line ends in an end token that is itself a branch, so a title that begins another is well defined.
Nodes are numbered by depth, the children of a node one after another; identical lines share one leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, Mask

Ints = NDArray[np.int64]

ROOT = 0
"""The node before the first token."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens that branch after a shared beginning.

    Parameters
    ----------
    tokens
        Shape (n,); parents before children.
    parents
        Position of the token before each, -1 for the end of the beginning. Shape (n,).
    """

    tokens: Ints
    parents: Ints

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> tuple[Tree, Ints]:
        """Join sequences of at least one token by their common beginnings.

        Returns
        -------
        tuple
            The tree, and the position of the last token of each sequence, shape (sequences,).
        """
        places: dict[tuple[int, int], int] = {}
        ends = []
        for sequence in sequences:
            at = -1
            for token in sequence:
                at = places.setdefault((at, int(token)), len(places))
            ends.append(at)
        keys = np.array(list(places), dtype=np.int64).reshape(-1, 2)
        return cls(keys[:, 1], keys[:, 0]), np.array(ends, dtype=np.int64)

    @classmethod
    def beside(cls, chains: Sequence[Sequence[int]]) -> tuple[Tree, Ints]:
        """Lay chains of tokens side by side, equal beginnings not joined.

        Returns
        -------
        tuple
            The tree, and the position of the first token of each chain, shape (chains,).
        """
        starts = np.cumsum([0, *map(len, chains)])[:-1]
        tokens = np.concatenate([np.empty(0, np.int64), *(np.asarray(chain, np.int64) for chain in chains)])
        parents = np.arange(-1, len(tokens) - 1)
        parents[starts[starts < len(tokens)]] = -1
        return cls(tokens, parents), starts

    def __len__(self) -> int:
        return len(self.tokens)

    def depths(self) -> Ints:
        """Number of tokens before each, the beginning not counted, shape (n,)."""
        depths = np.zeros(len(self), dtype=np.int64)
        for at, parent in enumerate(self.parents):
            depths[at] = depths[parent] + 1 if parent >= 0 else 0
        return depths

    def sees(self) -> NDArray[np.bool_]:
        """Which tokens each token sees: itself and those on its way, shape (n, n)."""
        seen = np.eye(len(self), dtype=np.bool_)
        for at, parent in enumerate(self.parents):
            if parent >= 0:
                seen[at] |= seen[parent]
        return seen

    def after(self, stem: Sequence[int]) -> Tree:
        """The same behind a chain of tokens that all branches share; positions move by its length."""
        n = len(stem)
        chain = np.arange(-1, n - 1)
        parents = np.where(self.parents < 0, n - 1, self.parents + n)
        return Tree(
            np.concatenate([np.asarray(stem, np.int64), self.tokens]), np.concatenate([chain, parents])
        )


class ItemTrie:
    """The lines of all items, and how often each was chosen.

    Parameters
    ----------
    lines
        Tokens of each item's line by code, without the end.
    end
        The token that ends a line.
    counts
        Weight of the training events of each item, shape (items,).
    smoothing
        Added to each count, so that no item has probability 0.

    Attributes
    ----------
    tokens, parents
        Token of each node and the node before it, -1 for the root, shape (nodes,).
    first, last
        The children of node i are ``first[i]:last[i]``, shape (nodes,).
    low, high
        The items under node i are ``items[low[i]:high[i]]``, shape (nodes,).
    leaf
        Leaf of each item by code, shape (items,).
    mass
        Smoothed count under each node, shape (nodes,).
    """

    def __init__(
        self, lines: Sequence[Sequence[int]], end: int, counts: NDArray[np.floating], smoothing: float = 1.0
    ) -> None:
        longest = max((len(line) for line in lines), default=0) + 1
        table = np.full((len(lines), longest), -1, dtype=np.int64)
        for code, line in enumerate(lines):
            table[code, : len(line)] = line
            table[code, len(line)] = end
        order = np.lexsort(table.T[::-1]) if len(lines) else np.empty(0, np.int64)
        self.items: Codes = order.astype(np.int32)
        self.leaf = np.zeros(len(lines), dtype=np.int64)
        self._number(table[order])
        smoothed = counts.astype(np.float64)[order] + smoothing
        self._cumulative = np.append(0.0, np.cumsum(smoothed))
        self.mass = self._cumulative[self.high] - self._cumulative[self.low]
        self._share = np.empty(len(lines))
        self._share[order] = smoothed
        self._share /= self.mass[self.leaf]

    def _number(self, table: Ints) -> None:
        rows, longest = table.shape
        nodes = np.zeros(rows, dtype=np.int64)
        tokens, parents, low, high = [[-1]], [[-1]], [[0]], [[rows]]
        total = 1
        new = np.zeros(rows, dtype=np.bool_)
        for depth in range(longest):
            column = table[:, depth]
            inside = np.flatnonzero(column >= 0)
            if not len(inside):
                break
            # A row starts a node if it, or what precedes it on its way, differs from the row above.
            new[1:] |= column[1:] != column[:-1]
            new[0] = True
            starts = inside[new[inside]]
            number = total + np.cumsum(new[inside]) - 1
            ends = np.append(starts[1:], inside[-1] + 1)
            gaps = np.searchsorted(inside, ends - 1, side="right")
            tokens.append(column[starts].tolist())
            parents.append(nodes[starts].tolist())
            low.append(starts.tolist())
            high.append((inside[gaps - 1] + 1).tolist())
            nodes[inside] = number
            total += len(starts)
        self.leaf[self.items] = nodes
        self.tokens, self.parents, self.low, self.high = (
            np.array([value for level in levels for value in level], dtype=np.int64)
            for levels in (tokens, parents, low, high)
        )
        # Parents are numbered in ascending order, so the children of one lie together.
        self.first = np.searchsorted(self.parents[1:], np.arange(total), side="left") + 1
        self.last = np.searchsorted(self.parents[1:], np.arange(total), side="right") + 1

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> Ints:
        """Nodes after a node."""
        return np.arange(self.first[node], self.last[node])

    def branches(self, nodes: Ints) -> NDArray[np.bool_]:
        """Whether there is a choice after each node, shape (len(nodes),)."""
        choice: NDArray[np.bool_] = self.last[nodes] - self.first[nodes] > 1
        return choice

    def path(self, node: int) -> list[int]:
        """Nodes from the first token to `node`, which is the last; empty for the root."""
        way: list[int] = []
        while node != ROOT:
            way.append(node)
            node = int(self.parents[node])
        return way[::-1]

    def share(self, items: Codes) -> NDArray[np.float64]:
        """Share of each item in the mass of its leaf: 1 unless other items have the same line."""
        share: NDArray[np.float64] = self._share[items]
        return share

    def allowed(self, mask: Mask | None) -> NDArray[np.bool_]:
        """Which nodes lead to an allowed item, shape (nodes,)."""
        if mask is None:
            return np.ones(len(self), dtype=np.bool_)
        cumulative = np.append(0, np.cumsum(mask[self.items]))
        found: NDArray[np.bool_] = cumulative[self.high] > cumulative[self.low]
        return found

    def to_score(self, items: Codes) -> Ints:
        """Nodes whose state the scores of these items need, ascending; the root is not among them.

        On the way to each item: up to the last node after which there is a choice. What follows is forced,
        and a forced token is certain.
        """
        wanted: set[int] = set()
        for leaf in set(self.leaf[items].tolist()):
            node = int(self.parents[leaf])
            while node != ROOT and self.last[node] - self.first[node] < 2:
                node = int(self.parents[node])
            while node != ROOT and node not in wanted:
                wanted.add(node)
                node = int(self.parents[node])
        return np.array(sorted(wanted), dtype=np.int64)

    def tree(self, nodes: Ints) -> Tree:
        """The tree of some nodes, ascending; with each node comes the one before it."""
        parents = np.searchsorted(nodes, self.parents[nodes])
        return Tree(self.tokens[nodes], np.where(self.parents[nodes] == ROOT, -1, parents))
