"""What a training run learns from: its batches, and the loss of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.errors import DataError
from llmrec.protocols import Codes, Query
from llmrec.score.config import TrainingConfig
from llmrec.score.item_tokens import ItemTokenModel, Stretch
from llmrec.score.labels import LettersScorer, YesNoScorer
from llmrec.score.packed import forward, row_of
from llmrec.sequences import (
    Portions,
    Window,
    item_nats,
    packs,
    shares,
    weight_of,
    weighted_mean,
)

Batch = TypeVar("Batch")

ROW = 256
"""Positions in a row of a packed batch: the cost of attention grows with its square."""


Typed = Callable[[int, np.random.Generator], Sequence[int]]
"""Draws the tokens of a wish that asks for an item; none for an item without words."""


def asking(
    windows: Sequence[Window], typed: Typed | None, share: float, rng: np.random.Generator
) -> list[Window]:
    """The same windows, a share of them with a wish for their last item."""
    if typed is None or share == 0:
        return list(windows)
    return [
        replace(window, typed=typed(int(window.items[-1]), rng)) if rng.random() < share else window
        for window in windows
    ]


class Task(Protocol[Batch]):
    """Batches of an epoch and their loss. The order of batches follows from the generator alone.

    A batch may be split into parts, whose losses, each with the share that its `weight` has, sum to the loss
    of the batch.
    """

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        ...

    def epoch(self, rng: np.random.Generator, parts: int = 1) -> Iterable[Batch]:
        """All batches of one pass over the data, each to be read in so many parts of the usual size."""
        ...

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """At most so many parts of a batch, none of them empty, which take about the same time."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the events of a batch count together."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, in nats."""
        ...

    def events(self, batch: Batch) -> int:
        """How many events a batch holds."""
        ...


class ItemTokensTask:
    """The next item at each position of a history; windows lie side by side behind one instruction.

    Parameters
    ----------
    source
        Windows of histories; an event of weight 0 is read and not learned.
    window
        Longest window in items.
    typed
        Gives the tokens of a wish, drawn, for an item; None for no wishes.
    wishes
        Share of windows whose last item is asked for by such a wish.
    """

    def __init__(
        self,
        model: ItemTokenModel,
        source: Portions,
        window: int,
        config: TrainingConfig,
        *,
        typed: Typed | None = None,
        wishes: float = 0.0,
    ) -> None:
        self.model, self.window, self.config = model, window, config
        self.source = source
        self.typed, self.wishes = typed, wishes

    def epoch(self, rng: np.random.Generator, parts: int = 1) -> Iterator[list[Window]]:
        """Windows that hold every event once, grouped at random."""
        for pieces in self.source.portions(rng, self.window):
            pieces = asking(pieces, self.typed, self.wishes, rng)
            sizes = [len(piece) + len(piece.typed) for piece in pieces]
            for group in packs(sizes, parts * self.config.tokens_per_step, rng):
                yield [pieces[i] for i in group]

    def split(self, batch: Sequence[Window], parts: int) -> list[list[Window]]:
        """Parts with about as many items each."""
        return [[batch[i] for i in part] for part in shares([len(window) for window in batch], parts)]

    def weight(self, batch: Sequence[Window]) -> float:
        """Weight of the events of a batch."""
        return weight_of(batch)

    def loss(self, batch: Sequence[Window]) -> Tensor:
        """Mean nats an item, each with the weight of its event."""
        states, order = self.model.packed([Stretch.of(window) for window in batch], ROW)
        ordered = [batch[i] for i in order]
        targets = np.concatenate([window.items for window in ordered]).astype(np.int64)
        return weighted_mean(
            item_nats(self.model, states, as_tensor(targets, states), self.config.negatives), ordered
        )

    def events(self, batch: Sequence[Window]) -> int:
        """Items of a batch."""
        return sum(map(len, batch))


@dataclass(frozen=True, slots=True)
class Choice:
    """A history, candidates, which of them came next, and what that event counts in the loss."""

    query: Query
    candidates: Codes
    truth: int
    weight: float = 1.0


class ListwiseTask:
    """Which of some hard candidates came next: for the modes that answer with a label.

    Parameters
    ----------
    scorer
        Of the model that is trained.
    choices
        Candidates from retrievers that have not seen what came next.
    old, replayed
        Old choices, of which each epoch learns so many again.

    Raises
    ------
    DataError
        If there are no choices.
    """

    def __init__(
        self,
        scorer: YesNoScorer | LettersScorer,
        choices: Sequence[Choice],
        config: TrainingConfig,
        old: Sequence[Choice] = (),
        replayed: int = 0,
    ) -> None:
        if not choices:
            raise DataError("no events to train on: no history has an event that retrievers can be asked for")
        self.scorer, self.model, self.choices, self.config = scorer, scorer.words, list(choices), config
        self.old, self.replayed = list(old), min(replayed, len(old))

    def epoch(self, rng: np.random.Generator, parts: int = 1) -> list[list[Choice]]:
        """All choices once, their candidates in an order drawn anew, grouped at random."""
        again = rng.choice(len(self.old), self.replayed, replace=False).tolist() if self.replayed else []
        shuffled = []
        for choice in [*self.choices, *(self.old[i] for i in again)]:
            order = rng.permutation(len(choice.candidates))
            truth = int(np.flatnonzero(order == choice.truth)[0])
            shuffled.append(replace(choice, candidates=choice.candidates[order], truth=truth))
        grouped = packs(self._lengths(shuffled), parts * self.config.tokens_per_step, rng)
        return [[shuffled[i] for i in group] for group in grouped]

    def split(self, batch: Sequence[Choice], parts: int) -> list[list[Choice]]:
        """Parts with about as many words each."""
        return [[batch[i] for i in part] for part in shares(self._lengths(batch), parts)]

    def weight(self, batch: Sequence[Choice]) -> float:
        """Weight of the events of a batch."""
        return sum(choice.weight for choice in batch)

    def _lengths(self, batch: Sequence[Choice]) -> list[int]:
        """Words of each choice: those of its history and its candidates."""
        lines, end = self.model.lines, 1 + len(self.scorer.last)
        return [
            len(self.model.beginning(c.query.history)) + sum(len(lines[i]) + end for i in c.candidates)
            for c in batch
        ]

    def loss(self, batch: Sequence[Choice]) -> Tensor:
        """Mean nats of what came next among the candidates, each with the weight of its event."""
        asked = [self.scorer.asks(choice.query, choice.candidates) for choice in batch]
        rows = [
            row_of(self.model.beginning(choice.query.history), tree)
            for choice, (tree, _) in zip(batch, asked, strict=True)
        ]
        hidden, _ = forward(self.model.body, rows, keep=False)
        nats = []
        for at, (choice, (_, places)) in enumerate(zip(batch, asked, strict=True)):
            behind = len(self.model.beginning(choice.query.history)) - 1
            states = hidden[at, behind + as_tensor(places, hidden)]
            values = self.scorer.answers(states, len(choice.candidates))
            nats.append(-torch.log_softmax(values, dim=-1)[choice.truth])
        weights = torch.tensor([choice.weight for choice in batch], device=hidden.device)
        return (weights * torch.stack(nats)).sum() / weights.sum()

    def events(self, batch: Sequence[Choice]) -> int:
        """Choices of a batch."""
        return len(batch)


def as_tensor(values: NDArray[Any], like: Tensor) -> Tensor:
    """An array as a tensor on the device of another."""
    return torch.from_numpy(values).to(like.device)
