"""Checks that no fitted parameter has seen what is reported, run in every evaluation.

Each check recomputes from the log alone what a component would hold had it seen the training events
only. They are written apart from the fitting code: a check that shared its code would share its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

from llmrec.errors import LeakError
from llmrec.evaluation.split import Split
from llmrec.protocols import Floats, Retriever, VectorIndex
from llmrec.recipe import HeldOut, Recipe, hash_histories
from llmrec.retrieve.linear import EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.transitions import TransitionsRetriever

NEAR = 0.98
"""Cosine of two text vectors from which on items count as near-duplicates."""

COLUMNS = 16
"""Columns of EASE that are solved anew."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What is there twice, and how often the target is a near-duplicate of something in the history."""

    repeated_rows: int
    near_duplicate_items: int
    targets_near_history: int

    def as_dict(self) -> dict[str, int]:
        """The form written to results files."""
        return {
            "repeated_rows": self.repeated_rows,
            "near_duplicate_items": self.near_duplicate_items,
            "test_targets_near_duplicate_of_history": self.targets_near_history,
        }


def check_split(split: Split) -> None:
    """Targets are not fitted on, histories end right before them, test is not validation.

    Raises
    ------
    LeakError
        Naming the first user where it is otherwise.
    """
    log = split.log
    for name, part in (("validation", split.validation), ("test", split.test)):
        _demand(
            not split.fitted[part.events].any(),
            f"{int(split.fitted[part.events].sum())} {name} targets are among the training events",
        )
        for user, history, target, event in zip(
            part.users, part.histories, part.targets, part.events, strict=True
        ):
            start = log.offsets[user]
            _demand(
                bool(start <= event < log.offsets[user + 1]) and log.item[event] == target,
                f"the {name} target of user {log.users[user]!r} is not the event it is said to be",
            )
            _demand(
                len(history) == event - start and bool((history == log.item[start:event]).all()),
                f"the {name} history of user {log.users[user]!r} is not what came before the target",
            )
    both = np.intersect1d(split.validation.events, split.test.events)
    _demand(not len(both), f"{len(both)} events are validation and test at once")


def check_retrievers(retrievers: Mapping[str, Retriever], split: Split) -> None:
    """Popularity, transitions and EASE hold what the training events give, and nothing else.

    Popularity: equal counts. Transitions: no weight between items that never stood in one training
    history. EASE: columns of held-out targets, solved anew, are the ones it kept.

    Raises
    ------
    LeakError
        Naming the retriever.
    """
    for retriever in retrievers.values():
        if isinstance(retriever, PopularityRetriever):
            _check_popularity(retriever, split)
        elif isinstance(retriever, TransitionsRetriever):
            _check_transitions(retriever, split)
        elif isinstance(retriever, EASERetriever):
            _check_ease(retriever, split)


def check_counts(counts: Floats, split: Split) -> None:
    """The language model's prior is counted from the training events.

    Raises
    ------
    LeakError
        If it is not.
    """
    expected = _counts(split, len(counts))
    _demand(
        bool(np.allclose(counts, expected, rtol=1e-4, atol=1e-3)),
        "the language model's counts are not those of the training events",
    )


def check_provenance(adapter: str | None, recipe: Recipe, split: Split, chosen_by: HeldOut) -> None:
    """The adapter says that it was trained on the training events, the recipe that validation chose it.

    Parameters
    ----------
    adapter
        `hash_histories` of what the adapter was trained on; None if there is none.
    chosen_by
        The validation events that settings and weights may be chosen by.

    Raises
    ------
    LeakError
        If a hash is another.
    """
    if adapter is not None:
        _same("adapter", adapter, hash_histories(split.train))
    for entry in recipe.log:
        if "sha256" in entry:
            _same(f"recipe ({entry['search']})", entry["sha256"], chosen_by.sha256())


def _same(what: str, found: str, expected: str) -> None:
    _demand(
        found == expected,
        f"the {what} was made on other events than it may see: {found[:12]}... instead of {expected[:12]}...",
    )


def count_duplicates(split: Split, vectors: Floats, index: VectorIndex) -> Duplicates:
    """Count repeated rows, items that are near-duplicates by text, and targets with one in the history."""
    log = split.log
    stamps = np.arange(len(log)) if log.timestamp is None else log.timestamp
    rows = np.stack([log.user.astype(np.int64), log.item.astype(np.int64), stamps], axis=1)
    repeated = len(rows) - len(np.unique(rows, axis=0)) if len(rows) else 0
    twins = 0
    for code, hits in enumerate(index.search(vectors, 2, [None] * len(vectors))):
        twins += bool((hits.scores[hits.items != code] >= NEAR).any())
    near = 0
    for history, target in zip(split.test.histories, split.test.targets, strict=True):
        earlier = history[history != target]
        near += bool(len(earlier)) and bool((vectors[earlier] @ vectors[target] >= NEAR).any())
    return Duplicates(repeated, twins, int(near))


def _counts(split: Split, n_items: int) -> Floats:
    fitted = split.fitted
    counts = np.zeros(n_items)
    np.add.at(counts, split.log.item[fitted], split.log.weight[fitted])
    return counts.astype(np.float32)


def _check_popularity(retriever: PopularityRetriever, split: Split) -> None:
    expected = np.log1p(_counts(split, len(retriever.scores)))
    _demand(
        bool(np.allclose(retriever.scores, expected, rtol=1e-4, atol=1e-4)),
        "popularity does not count the training events alone",
    )


def _check_transitions(retriever: TransitionsRetriever, split: Split) -> None:
    n = retriever.matrix.shape[0]
    user, item = split.log.user[split.fitted], split.log.item[split.fitted]
    ones = np.ones(len(item), dtype=np.float32)
    matrix = scipy.sparse.csr_matrix((ones, (user, item)), shape=(split.log.n_users, n))
    together = (matrix.T @ matrix).astype(np.bool_)
    learned = (retriever.matrix > 0).astype(np.bool_)
    strange = learned.nnz - learned.multiply(together).nnz
    _demand(
        not strange,
        f"transitions join {strange} pairs of items that never stood in one training history",
    )


def _check_ease(retriever: EASERetriever, split: Split) -> None:
    """Solve some columns anew by conjugate gradients and compare them with the weights that were kept."""
    config, items = retriever.config, retriever.items
    matrix = _user_item(split, config.fit_decay)[:, items]

    def regularised(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(matrix.T @ (matrix @ x) + config.l2 * x)

    operator = scipy.sparse.linalg.LinearOperator((len(items), len(items)), regularised, dtype=np.float64)
    # A leak moves the columns of held-out targets first.
    targets = np.flatnonzero(np.isin(items, np.unique(split.test.targets)))
    for column in targets[np.linspace(0, len(targets) - 1, min(COLUMNS, len(targets))).astype(int)]:
        unit = np.zeros(len(items))
        unit[column] = 1.0
        solved, failed = scipy.sparse.linalg.cg(operator, unit, rtol=1e-6, maxiter=1000)
        expected = -solved / solved[column]
        kept = retriever.weights[:, [column]].toarray().ravel()
        there = kept != 0
        worst = np.abs(kept - expected)[there].max(initial=0.0)
        _demand(
            not failed and worst <= 0.01 * np.abs(expected[there]).max(initial=1e-3),
            f"the weights of EASE towards item code {items[column]} are not those of the training events "
            f"(off by {worst:.4f})",
        )


def _user_item(split: Split, decay: float) -> scipy.sparse.csr_matrix:
    """Training events by user and item: decay ** age times the weight; the largest of repeated ones."""
    best: dict[tuple[int, int], float] = {}
    weights = split.training.weights
    for user, history in enumerate(split.train):
        for row, code in enumerate(history.tolist()):
            value = decay ** (len(history) - 1 - row) * (
                1.0 if weights is None else float(weights[user][row])
            )
            best[user, code] = max(best.get((user, code), 0.0), value)
    rows, columns = np.array(list(best), dtype=np.int64).reshape(-1, 2).T
    shape = (split.log.n_users, int(split.log.item.max()) + 1)
    return scipy.sparse.csr_matrix((np.array(list(best.values())), (rows, columns)), shape=shape)


def _demand(fine: bool, otherwise: str) -> None:
    if not fine:
        raise LeakError(f"leak: {otherwise}; the numbers of this run are worthless")
