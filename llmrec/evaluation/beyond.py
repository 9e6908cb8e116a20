"""What lists are like besides being right: coverage, concentration, novelty, diversity, bias.

All measures are over the first k items of each list. p(i) is the share of item i in the training events,
with one pseudo-event for each item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrec.catalog import Catalog
from llmrec.evaluation.split import Part
from llmrec.protocols import Codes, Floats, Mask

K = 10


@dataclass(frozen=True)
class Beyond:
    """Measures lists against a catalogue and a training log.

    Parameters
    ----------
    counts
        Training events of each item, shape (items,).
    vectors
        Unit text vectors, shape (items, dim).
    groups
        Attribute values of each item, shape (items, values), rows sum to 1 or 0; None if the catalogue has
        no attribute of groups.
    active
        Items that may be recommended, shape (items,).
    """

    counts: NDArray[np.float64]
    vectors: Floats
    groups: Floats | None
    active: Mask

    def measure(self, lists: Sequence[Codes], part: Part, k: int = K) -> dict[str, float]:
        """All measures of one system; lists are in the order of the part's users."""
        lists = [items[:k] for items in lists]
        shown = np.bincount(np.concatenate([np.empty(0, np.int32), *lists]), minlength=len(self.counts))
        measures = {
            f"coverage@{k}": self.coverage(shown),
            f"gini@{k}": self.gini(shown),
            f"novelty@{k}": self.novelty(lists),
            f"diversity@{k}": self.diversity(lists),
            f"serendipity@{k}": self.serendipity(lists, part.targets, k),
            f"popularity_lift@{k}": self.popularity_lift(lists, part.histories),
        }
        if self.groups is not None:
            measures[f"miscalibration@{k}"] = self.miscalibration(lists, part.histories)
        return measures

    def coverage(self, shown: NDArray[np.int64]) -> float:
        """Share of active items that are in any list (catalogue coverage, Ge et al. 2010)."""
        return float((shown[self.active] > 0).mean()) if self.active.any() else 0.0

    def gini(self, shown: NDArray[np.int64]) -> float:
        """Gini coefficient of how often each active item is shown: 0 all alike, 1 a single one.

        Source: Shani and Gunawardana 2011, "Evaluating Recommendation Systems".
        """
        values = np.sort(shown[self.active]).astype(np.float64)
        n, total = len(values), values.sum()
        if n < 2 or total == 0:
            return 0.0
        # Divided by its largest value, (n - 1) / n, so that a single item gives 1.
        index = np.arange(1, n + 1)
        return float(((2 * index - n - 1) * values).sum() / (total * (n - 1)))

    def novelty(self, lists: Sequence[Codes]) -> float:
        """Mean self-information -log2 p(i) of shown items, in bits (Zhou et al. 2010, PNAS 107)."""
        smoothed = self.counts + 1.0
        bits = -np.log2(smoothed / smoothed.sum())
        return _mean([float(bits[items].mean()) for items in lists if len(items)])

    def diversity(self, lists: Sequence[Codes]) -> float:
        """Mean over lists of 1 - cosine of the text vectors of all pairs (Ziegler et al. 2005)."""
        values = []
        for items in lists:
            n = len(items)
            if n < 2:
                continue
            chosen = self.vectors[items].astype(np.float64)
            lengths = (chosen * chosen).sum()
            pairs = (chosen.sum(axis=0) @ chosen.sum(axis=0) - lengths) / (n * (n - 1))
            values.append(1.0 - float(pairs))
        return _mean(values)

    def serendipity(self, lists: Sequence[Codes], targets: Codes, k: int) -> float:
        """Share of users whose target is shown and is not among the k most popular items.

        After Ge et al. 2010: useful, and not what a primitive recommender would have shown anyway.
        """
        popular = np.argsort(-self.counts, kind="stable")[:k]
        expected = np.isin(targets, popular)
        found = np.array([t in items for items, t in zip(lists, targets, strict=True)], dtype=np.bool_)
        return float((found & ~expected).mean()) if len(targets) else 0.0

    def popularity_lift(self, lists: Sequence[Codes], histories: Sequence[Codes]) -> float:
        """Mean popularity of the shown items over that of the histories, less 1: above 0 is popularity bias.

        Source: Abdollahpouri et al. 2020, "The Connection Between Popularity Bias, Calibration, and
        Fairness in Recommendation"; popularity is p(i), averaged over users.
        """
        share = (self.counts + 1.0) / (self.counts + 1.0).sum()
        pairs = [(r, h) for r, h in zip(lists, histories, strict=True) if len(r) and len(h)]
        before = _mean([float(share[h].mean()) for _, h in pairs])
        shown = _mean([float(share[r].mean()) for r, _ in pairs])
        return shown / before - 1.0 if before > 0 else 0.0

    def miscalibration(self, lists: Sequence[Codes], histories: Sequence[Codes]) -> float:
        """Mean Kullback-Leibler divergence, in nats, of the list's groups from the history's.

        Steck 2018, "Calibrated Recommendations": KL(p || (1 - a) q + a p) with a = .01, p the groups of
        the history, q those of the list.
        """
        assert self.groups is not None
        values = []
        for items, history in zip(lists, histories, strict=True):
            p, q = self.groups[history].sum(axis=0), self.groups[items].sum(axis=0)
            if p.sum() <= 0 or q.sum() <= 0:
                continue
            p, q = p / p.sum(), q / q.sum()
            mixed = 0.99 * q + 0.01 * p
            there = p > 0
            values.append(float((p[there] * np.log(p[there] / mixed[there])).sum()))
        return _mean(values)


def groups_of(catalog: Catalog, largest: int = 200) -> tuple[str, Floats] | None:
    """The attribute that says most about groups of items, and each item's share in its values.

    It is the attribute of text or lists of text with 2 to `largest` values that most items have. None if
    there is none.
    """
    best: tuple[int, str, Floats] | None = None
    for name, rows in attribute_values(catalog).items():
        values = sorted({part for row in rows for part in row})
        filled = sum(bool(row) for row in rows)
        if not 2 <= len(values) <= largest or (best is not None and filled <= best[0]):
            continue
        column = {value: i for i, value in enumerate(values)}
        shares = np.zeros((len(rows), len(values)), dtype=np.float32)
        for i, row in enumerate(rows):
            for part in row:
                shares[i, column[part]] += 1.0 / len(row)
        best = (filled, name, shares)
    return None if best is None else best[1:]


def attribute_values(catalog: Catalog) -> dict[str, list[list[str]]]:
    """The values of each item for every attribute of text or lists of text, by code.

    A text with commas is a list written as one where its parts are fewer than the whole texts: genres
    are, names of firms are not.
    """
    found: dict[str, list[list[str]]] = {}
    for name, kind in sorted(catalog.attributes.items()):
        if kind not in ("string", "list of strings"):
            continue
        rows = [
            [value] if isinstance(value, str) else value or [] for value in catalog.column(name).to_list()
        ]
        if kind == "string":
            split = [[p.strip() for value in row for p in value.split(",") if p.strip()] for row in rows]
            if len({p for row in split for p in row}) < len({p for row in rows for p in row}):
                rows = split
        found[name] = [list(dict.fromkeys(row)) for row in rows]
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
