"""What a training run learns from: its batches, and the loss of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.errors import DataError
from llmrec.protocols import Codes, Floats
from llmrec.score.config import TrainingConfig
from llmrec.score.item_tokens import ItemTokenModel
from llmrec.sequences import Window, item_nats, packs, weighted_mean, windows

Batch = TypeVar("Batch")

ROW = 256
"""Positions in a row of a packed batch: the cost of attention grows with its square."""


class Task(Protocol[Batch]):
    """Batches of an epoch and their loss. The order of batches follows from the generator alone."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        ...

    def epoch(self, rng: np.random.Generator) -> list[Batch]:
        """All batches of one pass over the data."""
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
    histories
        Oldest first.
    window
        Longest window in items.
    weights
        Of the events, one array a history: what each counts in the loss; 1 if None.

    Raises
    ------
    DataError
        If there are no events.
    """

    def __init__(
        self,
        model: ItemTokenModel,
        histories: Sequence[Codes],
        window: int,
        config: TrainingConfig,
        weights: Sequence[Floats] | None = None,
    ) -> None:
        if not any(len(h) for h in histories):
            raise DataError("no events to train on: all training histories are empty")
        self.model, self.window, self.config = model, window, config
        self.histories, self.weights = list(histories), weights

    def epoch(self, rng: np.random.Generator) -> list[list[Window]]:
        """Windows that hold every event once, grouped at random."""
        pieces = windows(self.histories, self.window, rng, self.weights)
        grouped = packs([len(piece) for piece in pieces], self.config.tokens_per_step, rng)
        return [[pieces[i] for i in group] for group in grouped]

    def loss(self, batch: Sequence[Window]) -> Tensor:
        """Mean nats an item, each with the weight of its event."""
        states, order = self.model.packed([window.items for window in batch], ROW)
        ordered = [batch[i] for i in order]
        targets = np.concatenate([window.items for window in ordered]).astype(np.int64)
        return weighted_mean(
            item_nats(self.model, states, as_tensor(targets, states), self.config.negatives), ordered
        )

    def events(self, batch: Sequence[Window]) -> int:
        """Items of a batch."""
        return sum(map(len, batch))


def as_tensor(values: NDArray[Any], like: Tensor) -> Tensor:
    """An array as a tensor on the device of another."""
    return torch.from_numpy(values).to(like.device)
