"""One forward for a shared beginning and all that branches from it.

A branch sees the beginning and its own way, nothing of its siblings (block mask), and its positions go on
from the end of the beginning, so every token has the state that it would have in a prompt of its own.
What was read of a beginning is kept and extended when it grows.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.protocols import Codes, Floats, Query
from llmrec.score.attention import mask_of
from llmrec.score.trie import Ints, Tree

logger = logging.getLogger(__name__)

TOGETHER = 64
"""Requests whose states are held at once: one for each token of their trees."""

SHARED = 8
"""Beginnings of several requests that are held while these are answered, whatever else is kept."""

NOTHING = Tree(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
"""No tokens."""


Score = Callable[[Sequence[Query], Sequence[Codes]], list[Floats]]


def in_turn(score: Score, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
    """Score the candidates of each query, `TOGETHER` queries at once."""
    scores: list[Floats] = []
    for start in range(0, len(queries), TOGETHER):
        rows = slice(start, start + TOGETHER)
        scores += score(queries[rows], candidates[rows])
    return scores


@dataclass(frozen=True, slots=True)
class Past:
    """What the layers keep of a beginning.

    Parameters
    ----------
    kept
        Keys and values, shape (layers, 2, heads, length, dim).
    end
        State after its last token, shape (hidden,).
    """

    kept: Tensor
    end: Tensor

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return int(self.kept.shape[3])

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return self.kept.nbytes + self.end.nbytes


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one request, and what they see.

    Parameters
    ----------
    past
        Keys and values of what was read before, shape (layers, 2, heads, p, dim), None for nothing.
    tokens, positions
        Shape (n,).
    sees
        Shape (n, p + n): each token sees at least itself.
    """

    past: Tensor | None
    tokens: Ints
    positions: Ints
    sees: NDArray[np.bool_]

    @property
    def read(self) -> int:
        """Tokens read before."""
        return 0 if self.past is None else int(self.past.shape[3])


def forward(
    body: nn.Module, rows: Sequence[Row], keep: bool = True
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Read the new tokens of several rows at once.

    Without `keep` no keys and values are returned, as in training.

    Returns
    -------
    tuple
        Hidden states, shape (rows, longest, hidden), and keys and values of each layer, shape
        (rows, heads, longest past + longest, dim): those of row i's past come first, its new ones begin at
        the longest past.
    """
    from transformers import DynamicCache

    embedding: Tensor = body.get_input_embeddings().weight  # type: ignore[operator]
    device = embedding.device
    longest, read = max(len(row.tokens) for row in rows), max(row.read for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    positions = np.zeros((len(rows), longest), dtype=np.int64)
    sees = np.zeros((len(rows), longest, read + longest), dtype=np.bool_)
    # Padding sees itself, so that its softmax is defined; nothing sees it.
    sees[:, np.arange(longest), read + np.arange(longest)] = True
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], positions[i, :n] = row.tokens, row.positions
        sees[i, :n, : row.read] = row.sees[:, : row.read]
        sees[i, :n, read : read + n] = row.sees[:, row.read :]
    # Made here, so that layers with a sliding window keep all: the mask says what is seen.
    past = DynamicCache(_stacked(rows, read)) if read else DynamicCache() if keep else None
    output = body(
        input_ids=torch.from_numpy(tokens).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=mask_of(sees, embedding),
        past_key_values=past,
        use_cache=keep,
    )
    layers = output.past_key_values.layers if keep else []
    return output.last_hidden_state, [(layer.keys, layer.values) for layer in layers]


def takes_branches(body: nn.Module) -> bool:
    """Whether branches behind one beginning have the states that they have in prompts of their own.

    They do where attention follows the mask and positions are given: not in models that carry a state along.
    """
    embedding: Tensor = body.get_input_embeddings().weight  # type: ignore[operator]
    device = embedding.device
    words = (np.arange(8) % len(embedding)).tolist()
    beginning, branches = words[:3], [words[3:6], words[6:]]
    tree, ends = Tree.of(branches)
    with torch.inference_mode():
        packed = forward(body, [row_of(beginning, tree)], keep=False)[0][0].float()
        alone = [
            body(input_ids=torch.tensor([beginning + branch], device=device), use_cache=False)
            .last_hidden_state[0, -1]
            .float()
            for branch in branches
        ]
    expected = torch.stack(alone)
    apart = (packed[len(beginning) + torch.from_numpy(ends)] - expected).norm(dim=1) / expected.norm(dim=1)
    return bool(apart.max() < (0.1 if embedding.dtype == torch.bfloat16 else 1e-3))


def _stacked(rows: Sequence[Row], read: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of several pasts by layer, padded on the right: (rows, heads, read, dim)."""
    if len(rows) == 1 and rows[0].past is not None:
        return [(layer[0][None], layer[1][None]) for layer in rows[0].past]
    example = next(row.past for row in rows if row.past is not None)
    layers, two, heads, _, dim = example.shape
    stacked = example.new_zeros((layers, two, len(rows), heads, read, dim))
    for i, row in enumerate(rows):
        if row.past is not None:
            stacked[:, :, i, :, : row.read] = row.past
    return [(layer[0], layer[1]) for layer in stacked]


class PackedReader:
    """Reads beginnings and the trees behind them. Thread-safe.

    Parameters
    ----------
    body
        Inner transformer of a causal LM, in evaluation mode.
    tokens
        Most new tokens in one forward, padding included; what is longer is read in pieces.
    memory
        Bytes of beginnings that are kept; the ones not used for longest go first.
    """

    def __init__(self, body: nn.Module, *, tokens: int = 2048, memory: int = 512 * 2**20) -> None:
        self.body, self.tokens, self.memory = body, tokens, memory
        self._kept: OrderedDict[bytes, Past] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Drop everything that was kept."""
        with self._lock:
            self._kept.clear()
            self._size = 0

    def read(self, beginnings: Sequence[Sequence[int]], trees: Sequence[Tree]) -> list[Tensor]:
        """States of each tree behind its beginning.

        Parameters
        ----------
        beginnings
            Tokens, at least one each.

        Returns
        -------
        list
            One float32 tensor a tree, shape (1 + len(tree), hidden): the state after the beginning, and
            after each token of the tree.
        """
        with self._lock, torch.inference_mode():
            states: list[Tensor | None] = [None] * len(trees)
            held = self._shared(beginnings)
            order = sorted(range(len(trees)), key=lambda i: len(beginnings[i]) + len(trees[i]))
            for group in self._groups(order, beginnings, trees):
                for i, found in zip(
                    group,
                    self._together([beginnings[i] for i in group], [trees[i] for i in group], held),
                    strict=True,
                ):
                    states[i] = found
        return [found for found in states if found is not None]

    def past(self, beginning: Sequence[int]) -> Past:
        """What the layers keep of a beginning, read now unless it was."""
        with self._lock, torch.inference_mode():
            return self._past(beginning)

    def _past(self, beginning: Sequence[int]) -> Past:
        found = self._longest(beginning)
        while found is None or found.length < len(beginning):
            part = beginning[: (0 if found is None else found.length) + self.tokens]
            row = row_of(part, NOTHING, found)
            hidden, layers = forward(self.body, [row])
            found = self._keep(part, row, layers, 0, row.read, hidden[0, len(row.tokens) - 1].float())
        return found

    def _shared(self, beginnings: Sequence[Sequence[int]]) -> dict[bytes, Past]:
        """Beginnings that several requests have, each read once; `SHARED` at most, since they are held."""
        first = {_key(beginning): beginning for beginning in beginnings}
        times = Counter(map(_key, beginnings)).most_common(SHARED)
        return {key: self._past(first[key]) for key, n in times if n > 1}

    def _groups(
        self, order: Sequence[int], beginnings: Sequence[Sequence[int]], trees: Sequence[Tree]
    ) -> list[list[int]]:
        """Split requests, shortest first, so that a padded batch has at most `tokens` positions."""
        groups: list[list[int]] = []
        for i in order:
            length = len(beginnings[i]) + len(trees[i])
            if groups and (len(groups[-1]) + 1) * length <= self.tokens:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _together(
        self, beginnings: Sequence[Sequence[int]], trees: Sequence[Tree], held: Mapping[bytes, Past]
    ) -> list[Tensor]:
        pasts = [held.get(_key(beginning)) or self._longest(beginning) for beginning in beginnings]
        rows = [row_of(b, tree, past) for b, tree, past in zip(beginnings, trees, pasts, strict=True)]
        if len(rows) == 1 and len(rows[0].tokens) > self.tokens:
            return [self._in_pieces(beginnings[0], trees[0], pasts[0])]
        asked = [i for i, row in enumerate(rows) if len(row.tokens)]
        if not asked:
            return [past.end[None] for past in pasts if past is not None]
        hidden, layers = forward(self.body, [rows[i] for i in asked])
        read = max(rows[i].read for i in asked)
        states: list[Tensor] = [past.end[None] if past is not None else hidden[0, :0] for past in pasts]
        for at, i in enumerate(asked):
            row, past, new = rows[i], pasts[i], len(beginnings[i]) - rows[i].read
            own = hidden[at, : len(row.tokens)].float()
            if new:
                past = self._keep(beginnings[i], row, layers, at, read, own[new - 1])
            assert past is not None
            states[i] = torch.cat([past.end[None], own[new:]])
        return states

    def _in_pieces(self, beginning: Sequence[int], tree: Tree, past: Past | None) -> Tensor:
        """States of a tree that is too long for one forward; what several pieces share is read in each."""
        if past is None or past.length < len(beginning):
            past = self._past(beginning)
        states = past.end.new_empty((1 + len(tree), len(past.end)))
        states[0] = past.end
        parents = set(tree.parents.tolist())
        ends = [at for at in range(len(tree)) if at not in parents]
        while ends:
            wanted: set[int] = set()
            while ends:
                way, at = [], ends[-1]
                while at >= 0 and at not in wanted:
                    way.append(at)
                    at = int(tree.parents[at])
                if wanted and len(wanted) + len(way) > self.tokens:
                    break
                wanted.update(way)
                ends.pop()
            piece = np.array(sorted(wanted))
            parents_of = tree.parents[piece]
            part = Tree(tree.tokens[piece], np.where(parents_of < 0, -1, np.searchsorted(piece, parents_of)))
            hidden, _ = forward(self.body, [row_of(beginning, part, past)])
            states[1 + torch.from_numpy(piece)] = hidden[0].float()
        return states

    def _longest(self, beginning: Sequence[int]) -> Past | None:
        """The longest kept part of a beginning; it is moved to the end of the queue."""
        if not self._kept:
            return None
        whole = _key(beginning)
        lengths = sorted({past.length for past in self._kept.values()}, reverse=True)
        for length in lengths:
            if length > len(beginning):
                continue
            key = whole[: 4 * length]
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def _keep(
        self,
        beginning: Sequence[int],
        row: Row,
        layers: Sequence[tuple[Tensor, Tensor]],
        at: int,
        read: int,
        end: Tensor,
    ) -> Past:
        new = len(beginning) - row.read
        fresh = torch.stack(
            [torch.stack([k[at, :, read : read + new], v[at, :, read : read + new]]) for k, v in layers]
        )
        kept = fresh if row.past is None else torch.cat([row.past, fresh], dim=3)
        past = Past(kept, end.clone())
        key = _key(beginning)
        if key[: 4 * row.read] in self._kept:
            # The user went on, and the shorter history is the first to go, unless others have it too.
            self._kept.move_to_end(key[: 4 * row.read], last=False)
        if past.size <= self.memory and key not in self._kept:
            self._kept[key] = past
            self._size += past.size
            while self._size > self.memory:
                _, dropped = self._kept.popitem(last=False)
                self._size -= dropped.size
        return past


def _key(beginning: Sequence[int]) -> bytes:
    """Four bytes a token, so that what a beginning begins with is what its key begins with."""
    return np.asarray(beginning, dtype=np.int32).tobytes()


def row_of(beginning: Sequence[int], tree: Tree, past: Past | None = None) -> Row:
    """The tokens of a beginning that were not read yet, and the tree behind them."""
    read = 0 if past is None else past.length
    rest = np.asarray(beginning[read:], dtype=np.int64)
    new, n = len(rest), len(rest) + len(tree)
    sees = np.zeros((n, read + n), dtype=np.bool_)
    sees[:, :read] = True
    sees[:new, read : read + new] = np.tri(new, dtype=np.bool_)
    sees[new:, read : read + new] = True
    sees[new:, read + new :] = tree.sees()
    positions = np.concatenate([read + np.arange(new), len(beginning) + tree.depths()])
    return Row(None if past is None else past.kept, np.concatenate([rest, tree.tokens]), positions, sees)
