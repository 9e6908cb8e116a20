"""Whether a language model knows a data file by heart: it is asked to go on with its rows.

A model that has read the file in its training finds the row that follows more probable than the same
row with another item of the file, whose id is near the true one. It may also have learned which ids are
frequent: so only counts by how much more it prefers the true row here than after the rows of another user.
After Bordt et al. 2024, "Elephants Never Forget" (arXiv 2404.06209).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmrec.errors import DataError
from llmrec.metrics import Comparison, Values, compare_values
from llmrec.quiet import quiet_transformers

ROWS = 8
"""Rows that are shown before the one to complete."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Nats by which a user's own rows raise the true next row over a changed one, with an interval."""

    gain: Comparison
    preferred: float

    def as_dict(self) -> dict[str, object]:
        """The form written to results files."""
        return {"gain_nats": self.gain.as_dict(), "share_true_preferred": self.preferred}

    def __str__(self) -> str:
        c = self.gain
        said = (
            "the model seems to know rows of this file"
            if c.low > 0
            else "no sign that the model knows this file"
        )
        return (
            f"own rows raise the true next one over a changed one by {c.difference:+.3f} nats "
            f"[{c.low:+.3f}, {c.high:+.3f}] more than those of another user do, over {c.users} users, "
            f"above 0 for {self.preferred:.0%}: {said}"
        )


def remembered(
    header: str,
    rows: Sequence[Sequence[str]],
    base: Path,
    *,
    user: int = 0,
    item: int = 1,
    users: int = 200,
    seed: int = 0,
    tokens: int = 2048,
) -> Memory:
    """Ask a causal LM, as it came, to go on with the rows of a file.

    Parameters
    ----------
    header
        First line of the file.
    rows
        Fields of each further line, in the file's order and spelling; those of a user stand together.
    base
        Folder of the causal LM.
    user, item
        Position of the user id and of the item id among the fields.
    users
        Size of the seeded sample; one place in the rows of each.
    tokens
        Padded positions in one forward.

    Raises
    ------
    DataError
        If fewer than two users have enough rows.
    """
    starts: dict[str, list[int]] = {}
    for place, fields in enumerate(rows):
        starts.setdefault(fields[user], []).append(place)
    able = [places for places in starts.values() if len(places) > ROWS + 1]
    if min(len(able), users) < 2:
        raise DataError(f"this test needs two users with more than {ROWS + 1} rows")
    numbers = [(int(i), i) for i in sorted({fields[item] for fields in rows}) if i.isdigit()]
    rng = np.random.default_rng(seed)
    prompts, true, changed = [], [], []
    for which in np.sort(rng.choice(len(able), min(users, len(able)), replace=False)):
        places = able[which]
        start = int(rng.integers(0, len(places) - ROWS - 1))
        shown, target = places[start : start + ROWS], places[start + ROWS]
        prompts.append("\n".join([header, *(",".join(rows[p]) for p in shown)]) + "\n")
        true.append(",".join(rows[target]) + "\n")
        taken = {rows[p][item] for p in places}
        others = [number for number, identity in numbers if identity not in taken]
        later = [rows[p][item] for p in places[start + ROWS + 1 :]]
        other = _near_true(rows[shown[-1]][item], rows[target][item], others, later, rng)
        fields = list(rows[target])
        fields[item] = other
        changed.append(",".join(fields) + "\n")
    strange = [*prompts[1:], prompts[0]]
    contexts, ends = [*prompts, *prompts, *strange, *strange], [*true, *changed] * 2
    likely, unlikely, likely_elsewhere, unlikely_elsewhere = _log_likelihoods(
        base, contexts, ends, tokens
    ).reshape(4, -1)
    gain = (likely - unlikely) - (likely_elsewhere - unlikely_elsewhere)
    return Memory(compare_values(gain, "own rows", "rows of another user", "nats"), float((gain > 0).mean()))


def _near_true(
    before: str, true: str, others: Sequence[int], later: Sequence[str], rng: np.random.Generator
) -> str:
    """Another item's id near the true one, on the same side of the one before, so that order tells nothing.

    `others` are the ids in the file that the user does not have; a later id of the user where ids are no
    numbers, or none is near.
    """
    if not (before.isdigit() and true.isdigit()):
        return later[int(rng.integers(0, len(later)))]
    last, own = int(before), int(true)
    same = [o for o in others if (o > last) == (own > last) and len(str(o)) == len(true)]
    near = sorted(same, key=lambda other: abs(other - own))[:4]
    return str(near[int(rng.integers(0, len(near)))]) if near else later[0]


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
