"""Training on histories: windows, batches, and the loss of the next item.

Shared by the language model and the small sequence encoders: whatever reads a history and scores the
catalogue learns by the same loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llmrec.errors import DataError
from llmrec.protocols import Codes, Floats

FULL_SOFTMAX_UP_TO = 50_000
"""Above this many items the softmax is over the targets and `negatives` drawn ones."""


class NextItemModel(Protocol):
    """Scores the catalogue at each position of a history, from the items before it alone."""

    counts: Tensor

    def before(self, codes: Tensor) -> Tensor:
        """State before each item: (batch, n) -> (batch, n, dim)."""
        ...

    def outputs_of(self, codes: Tensor) -> Tensor:
        """Output vectors of some items: (n,) -> (n, dim)."""
        ...

    def item_outputs(self) -> Tensor:
        """Output vectors of all items, shape (items, dim)."""
        ...

    def popularity(self) -> Tensor:
        """Log of the share of each item in the training events, shape (items,)."""
        ...

    def logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Unnormalised log-probabilities: (..., dim) and (items, dim) -> (..., items)."""
        ...

    def own_logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Those of one item a state: (n, dim), (n, dim) and (n,) -> (n,)."""
        ...


def pad(histories: Sequence[Codes]) -> tuple[Tensor, Tensor]:
    """Stack histories padded on the right: codes (batch, longest) and lengths (batch,), both int64."""
    lengths = torch.tensor([len(h) for h in histories], dtype=torch.long)
    codes = torch.zeros(len(histories), int(lengths.max()) if len(histories) else 0, dtype=torch.long)
    for row, history in enumerate(histories):
        codes[row, : len(history)] = torch.from_numpy(history.astype(np.int64))
    return codes, lengths


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a history, oldest first, and what each of its events counts in the loss.

    `typed` are tokens of a wish that was typed before the last item was chosen; none if empty.
    """

    items: Codes
    weights: Floats
    typed: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.items)


def windows(
    histories: Sequence[Codes],
    length: int,
    rng: np.random.Generator,
    weights: Sequence[Floats] | None = None,
) -> list[Window]:
    """Cut histories into windows of at most `length` items so that every event is seen once.

    The first cut of a long history falls at random, so that over epochs every event gets every context.
    `weights` are those of the events, one array a history; 1 where none are given.
    """
    pieces: list[Window] = []
    for row, history in enumerate(histories):
        weight = np.ones(len(history), np.float32) if weights is None else weights[row]
        first = len(history) if len(history) <= length else int(rng.integers(1, length + 1))
        cuts = [0, *range(first, len(history), length), len(history)]
        pieces += [Window(history[a:b], weight[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
    return pieces


@dataclass(frozen=True, slots=True)
class Replay:
    """Old histories, of which each epoch learns some again.

    Parameters
    ----------
    histories
        Oldest first.
    weights
        Of their events, one array a history; 1 if None.
    events
        About so many events are drawn an epoch, in whole histories.
    """

    histories: Sequence[Codes]
    weights: Sequence[Floats] | None
    events: int

    def draw(self, length: int, rng: np.random.Generator) -> list[Window]:
        """Windows of at most `length` items of histories drawn at random, no history twice."""
        left, drawn = self.events, []
        for user in rng.permutation(len(self.histories)).tolist():
            if left <= 0:
                break
            drawn.append(user)
            left -= len(self.histories[user])
        weights = None if self.weights is None else [self.weights[user] for user in drawn]
        return windows([self.histories[user] for user in drawn], length, rng, weights)


class Portions(Protocol):
    """What a training run draws its windows from."""

    def portions(self, rng: np.random.Generator, length: int) -> Iterator[list[Window]]:
        """Windows of at most `length` items of all histories, as many at a time as are to be in memory."""
        ...


class Source:
    """Windows of histories, anew in each epoch.

    Raises
    ------
    DataError
        If there are no events to learn.
    """

    def __init__(
        self, histories: Sequence[Codes], weights: Sequence[Floats] | None, replay: Replay | None = None
    ) -> None:
        counted = histories if weights is None else weights
        if not any(len(h) if weights is None else h.any() for h in counted):
            raise DataError("no events to train on: all training histories are empty")
        self.histories, self.weights, self.replay = list(histories), weights, replay

    def portions(self, rng: np.random.Generator, length: int) -> Iterator[list[Window]]:
        """All windows at once."""
        yield self(rng, length)

    def __call__(self, rng: np.random.Generator, length: int) -> list[Window]:
        """Windows of at most `length` items; those in which nothing counts are left out."""
        pieces = windows(self.histories, length, rng, self.weights)
        pieces = [piece for piece in pieces if piece.weights.any()]
        return pieces if self.replay is None else pieces + self.replay.draw(length, rng)


def batches(
    pieces: Sequence[Window], overhead: int, tokens: int, rng: np.random.Generator
) -> list[list[Window]]:
    """Group windows of like length so that a batch has about `tokens` positions, padding included.

    `overhead` is the number of instruction tokens that each window carries. The order of batches is random.
    """
    order = rng.permutation(len(pieces))
    by_length = sorted(order.tolist(), key=lambda i: -len(pieces[i]))
    grouped: list[list[Window]] = []
    start = 0
    while start < len(by_length):
        rows = max(1, tokens // (overhead + len(pieces[by_length[start]])))
        grouped.append([pieces[i] for i in by_length[start : start + rows]])
        start += rows
    return [grouped[i] for i in rng.permutation(len(grouped))]


def packs(sizes: Sequence[int], tokens: int, rng: np.random.Generator) -> list[list[int]]:
    """Group pieces of these sizes at random, a batch of at most `tokens` positions or one piece."""
    grouped: list[list[int]] = []
    left = 0
    for i in rng.permutation(len(sizes)).tolist():
        if sizes[i] > left or not grouped:
            grouped.append([])
            left = tokens
        grouped[-1].append(i)
        left -= sizes[i]
    return grouped


def rows_of(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Lay pieces side by side in rows of at most `width`, the longest first; one that is longer is alone."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, space in enumerate(left) if space >= sizes[i]), None)
        if row is None:
            rows.append([])
            left.append(width)
            row = len(rows) - 1
        rows[row].append(i)
        left[row] -= sizes[i]
    return rows


def shares(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Deal pieces of these sizes out to parts of about the same size, in the old order; none is empty."""
    dealt: list[list[int]] = [[] for _ in range(min(parts, len(sizes)))]
    total = [0] * len(dealt)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = total.index(min(total))
        dealt[least].append(i)
        total[least] += max(1, sizes[i])
    return [sorted(part) for part in dealt]


def next_item_loss(model: NextItemModel, batch: Sequence[Window], negatives: int) -> Tensor:
    """Mean nats an item over all positions of a batch, each counted with the weight of its event.

    Full softmax over the catalogue, or, in a large one, over the batch's targets and drawn items with
    the logQ correction (Bengio and Senecal 2008; Yi et al. 2019).
    """
    device = model.counts.device
    codes, lengths = pad([window.items for window in batch])
    codes, lengths = codes.to(device), lengths.to(device)
    real = torch.arange(codes.shape[1], device=device)[None, :] < lengths[:, None]
    return weighted_mean(item_nats(model, model.before(codes)[real], codes[real], negatives), batch)


def weighted_mean(nats: Tensor, batch: Sequence[Window]) -> Tensor:
    """Mean of the nats of all items of a batch, in its order, each with the weight of its event."""
    weights = torch.from_numpy(np.concatenate([window.weights for window in batch])).to(nats.device)
    return (weights * nats).sum() / weights.sum()


def weight_of(batch: Sequence[Window]) -> float:
    """What all events of a batch count together, which `weighted_mean` divides by."""
    return float(sum(window.weights.sum(dtype=np.float64) for window in batch))


def item_nats(model: NextItemModel, states: Tensor, targets: Tensor, negatives: int) -> Tensor:
    """Nats of each target after its state: (n, dim) and (n,) -> (n,); the softmax of `next_item_loss`.

    It is over the items with training events and the targets. Items without events are never chosen in
    training: as alternatives they would teach that what is new is never chosen, whatever its text.
    """
    popularity = model.popularity()
    chosen = model.counts > 0
    chosen[targets] = True
    popularity = popularity.masked_fill(~chosen, -torch.inf)
    if len(popularity) > FULL_SOFTMAX_UP_TO:
        return _sampled_nats(model, states, targets, popularity, negatives)
    logits = model.logits(states, model.item_outputs(), popularity)
    return functional.cross_entropy(logits, targets, reduction="none")


def _sampled_nats(
    model: NextItemModel, states: Tensor, targets: Tensor, popularity: Tensor, negatives: int
) -> Tensor:
    """Estimate the nats of each target, shape (targets,), from items drawn by popularity."""
    popularity = torch.log_softmax(popularity, dim=0)
    drawn = torch.multinomial(popularity.exp(), negatives, replacement=True)
    shared = model.logits(states, model.outputs_of(drawn), popularity[drawn])
    # Draws repeat, so dividing by their expected number, negatives * q, makes the sum of exponentials an
    # unbiased estimate of the full one; a draw that equals the target would count it twice.
    shared = shared - popularity[drawn] - math.log(negatives)
    shared = shared.masked_fill(drawn[None, :] == targets[:, None], -torch.inf)
    own = model.own_logits(states, model.outputs_of(targets), popularity[targets])[:, None]
    first = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
    return functional.cross_entropy(torch.cat([own, shared], dim=1), first, reduction="none")
