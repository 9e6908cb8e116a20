"""Whether probabilities mean what they say: log-loss, Brier score, calibration error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmrec.protocols import Codes, Floats

BINS = 15


@dataclass
class Probabilities:
    """Gathers predicted distributions over the catalogue, a chunk of users at a time."""

    nats: list[float] = field(default_factory=list)
    brier: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)

    def add(self, log_probs: Floats, targets: Codes) -> None:
        """Take the log-probabilities of a chunk, shape (users, items), and what happened, shape (users,)."""
        p = np.exp(log_probs.astype(np.float64))
        rows = np.arange(len(targets))
        own = p[rows, targets]
        self.nats += (-log_probs[rows, targets].astype(np.float64)).tolist()
        self.brier += ((p * p).sum(axis=1) - 2 * own + 1.0).tolist()
        best = p.argmax(axis=1)
        self.confidence += p[rows, best].tolist()
        self.correct += (best == targets).tolist()

    def reliability(self) -> list[list[float]]:
        """Mean confidence and share of hits of each bin of equal size: the reliability curve."""
        confidence, correct = np.array(self.confidence), np.array(self.correct)
        chunks = np.array_split(np.argsort(confidence, kind="stable"), min(BINS, max(len(confidence), 1)))
        return [[float(confidence[c].mean()), float(correct[c].mean())] for c in chunks if len(c)]

    def summary(self) -> dict[str, float]:
        """Mean measures.

        ``nats``
            Log-loss, the mean of -log p(target).
        ``brier``
            Mean of the sum over items of (p - [item is the target]) ** 2; 0 is best, 2 worst (Brier 1950).
        ``calibration_error``
            Expected calibration error of the most probable item over bins of equal size (Naeini et al.
            2015): the mean distance of confidence and share of hits.
        """
        if not self.nats:
            return {}
        return {
            "nats": float(np.mean(self.nats)),
            "brier": float(np.mean(self.brier)),
            "calibration_error": calibration_error(np.array(self.confidence), np.array(self.correct)),
        }


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Distance of confidence and share of hits, averaged over bins that hold equally many predictions."""
    order = np.argsort(confidence, kind="stable")
    total = 0.0
    for chunk in np.array_split(order, min(bins, len(order))):
        total += len(chunk) * abs(float(confidence[chunk].mean()) - float(correct[chunk].mean()))
    return total / len(order)
