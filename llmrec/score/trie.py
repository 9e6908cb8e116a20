"""All lines of the catalogue as one tree of tokens.

Each line ends in an end token that is itself a branch, so a title that begins another is well defined.
Nodes are numbered by depth, the children of a node one after another; identical lines share one leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, Mask
from llmrec.score.lines import TokenLines

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
    arrays
        Its shape, as `arrays` gives it; int32, may be mapped from a file.
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
    items
        All items in the order of their lines, shape (items,).
    leaf
        Leaf of each item by code, shape (items,).
    """

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], counts: NDArray[np.floating], smoothing: float = 1.0
    ) -> None:
        self._arrays = dict(arrays)
        self.tokens, self.parents, self.low, self.high, self.items, self.leaf = (
            self._arrays[name] for name in ("tokens", "parents", "low", "high", "items", "leaf")
        )
        # The children of a node lie together, and before those of the next one.
        self.first, self.last = self._arrays["first"][:-1], self._arrays["first"][1:]
        smoothed = counts.astype(np.float64)[self.items] + smoothing
        self._cumulative = np.append(0.0, np.cumsum(smoothed))
        self._share = np.empty(len(self.items))
        self._share[self.items] = smoothed
        self._share /= self.mass(self.leaf)

    @classmethod
    def of(
        cls, lines: Sequence[Sequence[int]], end: int, counts: NDArray[np.floating], smoothing: float = 1.0
    ) -> ItemTrie:
        """Build it; what is held besides the result is a few times the tokens of all lines, padded.

        Parameters
        ----------
        lines
            Tokens of each item's line by code, without the end.
        end
            The token that ends a line.
        """
        packed = lines if isinstance(lines, TokenLines) else TokenLines.of(lines)
        return cls(_shape(packed.table(end)), counts, smoothing)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its shape, which is the same whatever was chosen how often."""
        return self._arrays

    def mass(self, nodes: Ints | slice) -> NDArray[np.float64]:
        """Smoothed count under some nodes."""
        mass: NDArray[np.float64] = self._cumulative[self.high[nodes]] - self._cumulative[self.low[nodes]]
        return mass

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

    def allowed(self, mask: Mask | None) -> Callable[[int], bool]:
        """Tells of a node whether it leads to an allowed item."""
        if mask is None:
            return lambda node: True
        cumulative = np.append(0, np.cumsum(mask[self.items]))
        return lambda node: bool(cumulative[self.high[node]] > cumulative[self.low[node]])

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


def _shape(table: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
    """Arrays of the trie of lines that are the rows of a table, each with its end and padded with -1."""
    rows, longest = table.shape
    order = np.lexsort(table.T[::-1]) if rows else np.empty(0, np.int64)
    nodes = np.zeros(rows, np.int32)
    levels: dict[str, list[NDArray[np.int32]]] = {"tokens": [], "parents": [], "low": [], "high": []}

    def add(**values: NDArray[Any] | list[int]) -> None:
        for name, part in values.items():
            levels[name].append(np.asarray(part, np.int32))

    add(tokens=[-1], parents=[-1], low=[0], high=[rows])
    total = 1
    new = np.zeros(rows, dtype=np.bool_)
    for depth in range(longest):
        column = table[order, depth]
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
        add(tokens=column[starts], parents=nodes[starts], low=starts, high=inside[gaps - 1] + 1)
        nodes[inside] = number
        total += len(starts)
    leaf = np.zeros(rows, np.int32)
    leaf[order] = nodes
    made = {name: np.concatenate(parts) for name, parts in levels.items()}
    # Parents are numbered in ascending order, so the children of one lie together.
    first = np.searchsorted(made["parents"][1:], np.arange(total + 1, dtype=np.int32)) + 1
    return {**made, "first": first.astype(np.int32), "items": order.astype(np.int32), "leaf": leaf}
