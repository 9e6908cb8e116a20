"""What is known of a training run: how far it is, when it ends early, and what it did in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

WORSE = 0.5
"""Nats an item by which the held-out loss has to rise above its lowest to end the run early."""

RECENT = 50
"""Steps over which the training loss is averaged."""


@dataclass(frozen=True, slots=True)
class Cooling:
    """The end of a run that was seen to learn by heart: from `start` to `end` events the rate falls to 0.

    `rate` is the share of the learning rate at its start.
    """

    start: int
    end: int
    rate: float


@dataclass(slots=True)
class Progress:
    """State of a run; written into every checkpoint.

    `stale` counts validations since the best one, `stopped` says that they were too many, `validating` is
    how many seconds the last one took, `logged` is the number of lines in the log of the run.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    events: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    validated: int = 0
    best: float = -math.inf
    best_nats: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    cooling: Cooling | None = None
    recent: list[float] = field(default_factory=list)
    stale: int = 0
    stopped: bool = False
    logged: int = 0
    validating: float = 0.0

    def took(self, loss: float, seconds: float) -> None:
        """Note the loss of the step that was just taken, and how long the run has lasted."""
        self.recent = [*self.recent[1 - RECENT :], loss]
        self.loss, self.seconds = float(np.mean(self.recent)), seconds

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of it."""
        cooling = stored["cooling"]
        return cls(**{**stored, "cooling": None if cooling is None else Cooling(**cooling)})


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run did. `curve` holds one row a validation: events, seconds, train_nats and the measures.

    `early` says that it ended before its budget, and `reason` why; `best` is None where nothing was held out.
    """

    steps: int
    events: int
    seconds: float
    events_per_second: float
    best: float | None
    best_step: int
    curve: list[dict[str, float]]
    early: bool = False
    reason: str = ""

    def __str__(self) -> str:
        said = (
            f"{self.steps} steps, {self.events} events in {self.seconds:.0f} s "
            f"({self.events_per_second:.0f} a second)"
        )
        if self.best is not None:
            said += f", {self.curve[-1]['train_nats']:.2f} nats an item; "
            said += f"validation NDCG@10 {self.best:.4f} at step {self.best_step}"
        return said + (f"; ended early, since {self.reason}" if self.early else "")


def cooling(curve: Sequence[Mapping[str, float]], rate: float) -> Cooling | None:
    """Whether the last validation says that a run learns by heart, and how it then ends.

    Where the held-out loss has risen by `WORSE` above its lowest, as many events follow as there were up to
    that lowest, with a falling learning rate: lists still get better while the rate falls, though the loss
    does not. The state that ranked best is kept either way.

    Parameters
    ----------
    curve
        Validations so far, with ``events`` and ``nats`` (never cooling without).
    rate
        Share of the learning rate now.
    """
    known = [row for row in curve if "nats" in row]
    if len(known) < 2:
        return None
    lowest = min(known, key=lambda row: row["nats"])
    if known[-1]["nats"] <= lowest["nats"] + WORSE:
        return None
    now = int(known[-1]["events"])
    return Cooling(now, now + int(lowest["events"]), rate)
