"""What items without training events count before a history is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.protocols import Codes, Mask

if TYPE_CHECKING:
    from llmrec.score.item_tokens import ItemTokenModel, ItemTokenScorer

ROWS = 64
"""Users whose probabilities of all items are in memory at once."""

UNSEEN_SPREAD = 2.0
"""Standard deviation, in nats, of what is assumed of the bias of items without training events."""


def expected_counts(counts: Tensor, late: Tensor) -> Tensor:
    """Counts in which items that came after training have those of a middling item, not none.

    Nobody could choose them, so that they have no events says nothing. One more than their count is the
    geometric mean of one more than that of the items with events.

    Parameters
    ----------
    counts
        Weight of the training events of each item, shape (items,).
    late
        Whether an item came after training, shape (items,).
    """
    seen = counts > 0
    if not bool(late.any()) or not bool(seen.any()):
        return counts
    return torch.where(late & ~seen, torch.expm1(torch.log1p(counts[seen]).mean()), counts)


def still_late(late: Mask, before: NDArray[Any], counts: NDArray[Any]) -> Mask:
    """Which items that came after the earlier training count as coming after the present one, too.

    Those without events, as long as a middling item has less than one among the events since: until then
    nobody could be expected to choose them.

    Parameters
    ----------
    late
        Of the earlier training, shape (items,).
    before, counts
        Weight of the training events of each item, then and now, shape (items,).
    """
    seen = counts > 0
    since = 1 - before.sum() / counts.sum() if seen.any() else 0.0
    usual = np.expm1(np.log1p(counts[seen]).mean()) if seen.any() else 0.0
    kept: Mask = late & ~seen & (usual * since < 1)
    return kept


def fit_unseen(
    model: ItemTokenModel, scorer: ItemTokenScorer, histories: Sequence[Codes], targets: Codes
) -> None:
    """Fit the bias of items that were there without training events to what held-out users chose.

    Training says nothing of it: such items are never chosen there. One number for all, it minimises the nats
    of the targets plus those of a normal prior around what it was, at first that of an item that counts 1;
    then the items without events together have about the probability that users choose one of them.

    Parameters
    ----------
    scorer
        Of the model, with nothing kept and no index.
    histories, targets
        Of the held-out users, which the model was not trained on; shape (users,).
    """
    unseen = ((model.counts == 0) & ~model.late).cpu().numpy()
    before = float(model.unseen)
    if not len(targets) or unseen.all() or not unseen.any():
        return
    scorer.forget()
    # Log-odds, with the bias as it was, of the items without events against the others.
    odds = []
    for start in range(0, len(targets), ROWS):
        p = np.exp(scorer.log_probs(histories[start : start + ROWS]).astype(np.float64))
        odds.append(np.log(p[:, unseen].sum(axis=1)) - np.log(p[:, ~unseen].sum(axis=1)))
    known, chosen = np.concatenate(odds), float(unseen[targets].sum())
    # Of what is added to the bias.
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        # The slope of the nats falls to 0 where the expected choices are those that were made.
        slope = chosen - float((1 / (1 + np.exp(-(known + middle)))).sum()) - middle / UNSEEN_SPREAD**2
        low, high = (middle, high) if slope > 0 else (low, middle)
    model.unseen.fill_(before + (low + high) / 2)
    scorer.forget()
