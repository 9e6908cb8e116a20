"""Whether a language model knows a log by heart: it is asked to go on with rows of the data file.

Rows of identifiers carry no meaning. A model that has read the file in its training finds the row that
follows more probable than the same row with a later item; a model that has not, does not.
After Bordt et al. 2024, "Elephants Never Forget" (arXiv 2404.06209).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmrec.catalog import Catalog
from llmrec.errors import DataError
from llmrec.events import EventLog
from llmrec.metrics import Comparison, Values, compare_values
from llmrec.quiet import quiet_transformers

ROWS = 8
"""Rows that are shown before the one to complete."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Nats by which the true next row is more probable than a shuffled one, with an interval."""

    gain: Comparison
    preferred: float

    def as_dict(self) -> dict[str, object]:
        """The form written to results files."""
        return {"gain_nats": self.gain.as_dict(), "share_true_preferred": self.preferred}

    def __str__(self) -> str:
        c = self.gain
        said = (
            "the model seems to know rows of this log by heart"
            if c.low > 0
            else "no sign that the model knows this log by heart"
        )
        return (
            f"true next row against a shuffled one: {c.difference:+.3f} nats [{c.low:+.3f}, {c.high:+.3f}] "
            f"over {c.users} users, preferred in {self.preferred:.0%}: {said}"
        )


def remembered(
    log: EventLog, catalog: Catalog, base: Path, *, users: int = 200, seed: int = 0, tokens: int = 2048
) -> Memory:
    """Ask a causal LM, as it came, to go on with rows ``user,item,timestamp`` of real users.

    The shuffled row differs in its item alone, which is one that the same user chose later: ids of a
    user's items are alike, in both.

    Parameters
    ----------
    base
        Folder of the causal LM.
    users
        Size of the seeded sample.
    tokens
        Padded positions in one forward.

    Raises
    ------
    DataError
        If no user has enough rows.
    """
    known = np.flatnonzero(np.diff(log.offsets) > ROWS + 1)
    if len(known) < 2:
        raise DataError(f"this test needs two users with more than {ROWS + 1} events")
    rng = np.random.default_rng(seed)
    prompts, true, shuffled = [], [], []
    for user in np.sort(rng.choice(known, min(users, len(known)), replace=False)):
        start = int(rng.integers(log.offsets[user], log.offsets[user + 1] - ROWS - 1))
        end = start + ROWS
        other = int(rng.integers(end + 1, log.offsets[user + 1]))
        rows = "".join(_row(log, catalog, event) for event in range(start, end))
        prompts.append(f"user_id,item_id,timestamp\n{rows}")
        true.append(_row(log, catalog, end))
        shuffled.append(_row(log, catalog, end, int(log.item[other])))
    gain = _log_likelihoods(base, prompts, true, tokens) - _log_likelihoods(base, prompts, shuffled, tokens)
    return Memory(compare_values(gain, "true row", "shuffled row", "nats"), float((gain > 0).mean()))


def _row(log: EventLog, catalog: Catalog, event: int, item: int | None = None) -> str:
    code = int(log.item[event]) if item is None else item
    stamp = "" if log.timestamp is None else f",{log.timestamp[event]}"
    return f"{log.users[log.user[event]]},{catalog.ids[code]}{stamp}\n"


def _log_likelihoods(base: Path, prompts: Sequence[str], ends: Sequence[str], tokens: int) -> Values:
    """Log-likelihood of each end after its prompt, shape (len(prompts),)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model.eval()
    first = tokenizer(list(prompts))["input_ids"]
    second = tokenizer(list(ends), add_special_tokens=False)["input_ids"]
    rows = max(1, tokens // max(len(a) + len(b) for a, b in zip(first, second, strict=True)))
    values = []
    for start in range(0, len(first), rows):
        pairs = list(zip(first[start : start + rows], second[start : start + rows], strict=True))
        longest = max(len(a) + len(b) for a, b in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        for row, (a, b) in enumerate(pairs):
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        with torch.inference_mode():
            # Padded on the right: no real position sees the padding.
            logits = model(ids).logits.float().log_softmax(-1)
        for row, (a, b) in enumerate(pairs):
            at = torch.arange(len(a) - 1, len(a) + len(b) - 1)
            values.append(float(logits[row, at, torch.tensor(b)].sum()))
    return np.array(values)
