"""Checks that no fitted parameter has seen what is reported, run in every evaluation.

Each check recomputes from the log alone what a component would hold had it seen the training events
only. They are written apart from the fitting code: a check that shared its code would share its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

from llmrec.errors import LeakError
from llmrec.evaluation.split import Part, Split
from llmrec.families import FAMILIES
from llmrec.protocols import Codes, Floats, Retriever, VectorIndex
from llmrec.recipe import HeldOut, Recipe
from llmrec.retrieve.linear import EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.sparse_linear import is_whole
from llmrec.retrieve.transitions import TransitionsRetriever

NEAR = 0.98
"""Cosine of two text vectors from which on items count as near-duplicates."""

COLUMNS = 16
"""Columns of EASE, and rows of the transitions, that are computed anew."""


def check_split(split: Split) -> list[str]:
    """Targets are not fitted on, histories end right before them, and validation sees no test event.

    Returns
    -------
    list of str
        What was checked.

    Raises
    ------
    LeakError
        Naming the first user where it is otherwise.
    """
    log = split.log
    tested = np.zeros(len(log), dtype=np.bool_)
    tested[split.test.events] = True
    for name, part in (("validation", split.validation), ("test", split.test)):
        among = int(split.fitted[part.events].sum())
        _demand(not among, f"{among} {name} targets are among the training events")
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
            _demand(
                name == "test" or not tested[start : event + 1].any(),
                f"validation of user {log.users[user]!r} holds a test event",
            )
    return ["split"]


def check_retrievers(
    retrievers: Mapping[str, Retriever], split: Split, vectors: Floats | None = None
) -> tuple[list[str], list[str]]:
    """Popularity, transitions and EASE hold what the training events give, and nothing else.

    Popularity: equal counts. Transitions: rows of items that precede held-out targets, counted anew by a
    plain loop. EASE: columns of held-out targets, solved anew by another method. Any other that learns
    from the log and keeps counts of it: equal counts.

    Parameters
    ----------
    vectors
        Text vectors that the retrievers were fitted with, shape (items, dim); None if with none.

    Returns
    -------
    tuple
        Names of the retrievers that were checked, and of those that learn and could not be.

    Raises
    ------
    LeakError
        Naming the retriever.
    """
    checked, unchecked = [], []
    for name, retriever in retrievers.items():
        kept: Any = getattr(getattr(retriever, "model", None), "counts", None)
        if isinstance(retriever, PopularityRetriever):
            _check_counts(np.expm1(retriever.scores), split, "popularity")
        elif isinstance(retriever, TransitionsRetriever):
            _check_transitions(retriever, split)
        elif isinstance(retriever, EASERetriever):
            if not _check_ease(retriever, split, vectors):
                unchecked.append(name)
                continue
        elif kept is not None:
            _check_counts(kept.cpu().numpy(), split, name)
        elif name not in FAMILIES or FAMILIES[name].learns:
            unchecked.append(name)
            continue
        else:
            continue
        checked.append(name)
    return checked, unchecked


def check_language_model(
    counts: Floats, card: Mapping[str, Any], split: Split, chosen_by: HeldOut
) -> list[str]:
    """The prior is counted from the training events; the card says that these and validation made it.

    Parameters
    ----------
    card
        What the adapter's card says of its training.
    chosen_by
        The validation events that may decide which state is kept.

    Raises
    ------
    LeakError
        If it is otherwise.
    """
    _check_counts(counts, split, "the language model's prior")
    _same("adapter", str(card.get("histories_sha256")), split.training.sha256())
    _same("choice of the adapter's state", str(card.get("selected_on_sha256")), chosen_by.sha256())
    return ["prior of the language model", "adapter"]


def check_recipe(recipe: Recipe, *chosen_by: HeldOut) -> list[str]:
    """The recipe's log says that these validation events chose settings and weights, and no others.

    Raises
    ------
    LeakError
        If other events did.
    """
    entries = [entry for entry in recipe.log if "sha256" in entry]
    allowed = [part.sha256() for part in chosen_by]
    for entry in entries:
        _same(f"recipe ({entry['search']})", entry["sha256"], *allowed)
    return ["recipe and blend"] if entries else []


def count_duplicates(split: Split, part: Part, vectors: Floats, index: VectorIndex) -> dict[str, int | None]:
    """Count what is there twice, and targets of the reported part that are near something in the history.

    ``repeated_rows``
        Rows that repeat user, item and time stamp of another; None without a clock.
    ``repeated_pairs``
        Rows that repeat user and item of another.
    ``near_duplicate_items``
        Items whose text vector has a cosine of `NEAR` or more with that of another.
    ``targets_near_history``
        Targets with a near-duplicate in their history.
    """
    log = split.log
    pairs = np.stack([log.user.astype(np.int64), log.item.astype(np.int64)], axis=1)
    rows = None
    if log.timestamp is not None:
        rows = _repeats(np.concatenate([pairs, log.timestamp[:, None]], axis=1))
    twins = 0
    if len(vectors) > 1:
        for code, hits in enumerate(index.search(vectors, 2, [None] * len(vectors))):
            twins += bool((hits.scores[hits.items != code] >= NEAR).any())
    near = 0
    for history, target in zip(part.histories, part.targets, strict=True):
        earlier = history[history != target]
        near += bool(len(earlier)) and bool((vectors[earlier] @ vectors[target] >= NEAR).any())
    return {
        "repeated_rows": rows,
        "repeated_pairs": _repeats(pairs),
        "near_duplicate_items": twins,
        "targets_near_history": int(near),
    }


def _repeats(rows: NDArray[np.int64]) -> int:
    return len(rows) - len(np.unique(rows, axis=0)) if len(rows) else 0


def _check_counts(counts: Floats, split: Split, what: str) -> None:
    expected = np.zeros(len(counts))
    np.add.at(expected, split.log.item[split.fitted], split.log.weight[split.fitted])
    # Less than any event would add.
    smallest = float(split.log.weight.min(initial=1.0))
    _demand(
        bool(np.allclose(counts, expected, rtol=1e-4, atol=1e-2 * min(1.0, smallest))),
        f"{what} does not count the training events alone",
    )


def _check_transitions(retriever: TransitionsRetriever, split: Split) -> None:
    config, training = retriever.config, split.training
    last = {int(h[-1]) for h in (*split.validation.histories, *split.test.histories) if len(h)}
    chosen = sorted(last)[:: max(1, len(last) // COLUMNS)]
    counts: dict[int, dict[int, float]] = {item: {} for item in chosen}
    for user, history in enumerate(training.histories):
        weight = np.ones(len(history)) if training.weights is None else training.weights[user]
        for place in np.flatnonzero(np.isin(history, chosen)).tolist():
            row = counts[int(history[place])]
            for other in range(max(0, place - config.window), min(len(history), place + config.window + 1)):
                if history[other] == history[place]:
                    continue
                value = config.step_decay ** (abs(other - place) - 1) * weight[other] * weight[place]
                value *= 1.0 if other > place else config.backward
                row[int(history[other])] = row.get(int(history[other]), 0.0) + float(value)
    for item, row in counts.items():
        expected = np.zeros(retriever.matrix.shape[1])
        expected[list(row)] = list(row.values())
        expected /= max(expected.sum() + config.smoothing, 1e-9)
        kept = retriever.matrix[[item]]
        same = np.allclose(kept.data, expected[kept.indices], rtol=1e-3, atol=1e-6)
        # Of a long row the largest entries are kept, and no other may be above them.
        expected[kept.indices] = 0.0
        least = float(kept.data.min(initial=np.inf)) if kept.nnz >= config.keep else 0.0
        _demand(
            same and float(expected.max(initial=0.0)) <= 1.001 * least + 1e-6,
            f"the transitions from item code {item} are not those of the training events",
        )


def _check_ease(retriever: EASERetriever, split: Split, vectors: Floats | None) -> bool:
    """Solve some columns anew by conjugate gradients and compare them with the weights that were kept.

    False where the weights are approximations, which cannot be compared, or the second method finds none.
    """
    config, items = retriever.config, retriever.items
    matrix = _user_item(split, config.fit_decay, retriever.n_items)[:, items].tocsc()
    if len(items) > config.max_items and not is_whole(matrix.tocsr()):
        return False
    if vectors is not None:
        # A text dimension is one more user.
        texts = scipy.sparse.csc_matrix(np.sqrt(config.text) * vectors[items].T.astype(np.float64))
        matrix = scipy.sparse.vstack([matrix, texts]).tocsc()
    # A leak moves the columns of held-out targets first.
    held_out: Codes = np.union1d(split.validation.targets, split.test.targets)
    targets = np.flatnonzero(np.isin(items, held_out))
    among = len(items) > config.max_items
    for column in targets[np.linspace(0, len(targets) - 1, min(COLUMNS, len(targets))).astype(int)]:
        kept = retriever.weights[:, [column]].toarray().ravel()
        there = np.flatnonzero(kept)
        if among:
            expected = _regressed(matrix, column, there, config.l2)
        else:
            others = np.delete(np.arange(len(items)), column)
            expected = _regressed(matrix, column, others, config.l2)
            expected = None if expected is None else expected[np.searchsorted(others, there)]
        if expected is None:
            return False
        worst = np.abs(kept[there] - expected).max(initial=0.0)
        _demand(
            worst <= 0.01 * np.abs(expected).max(initial=1e-3),
            f"the weights of EASE towards item code {items[column]} are not those of the training events "
            f"(off by {worst:.4f})",
        )
    return True


def _regressed(
    matrix: scipy.sparse.csc_matrix, column: int, on: NDArray[np.int64], l2: float
) -> NDArray[np.float64] | None:
    """Ridge regression of one column on others, by conjugate gradients: what a column of EASE is.

    None where they do not end, which a tiny penalty can do.
    """
    others, target = matrix[:, on], matrix[:, [column]].toarray().ravel()

    def regularised(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(others.T @ (others @ x) + l2 * x)

    shape = (others.shape[1], others.shape[1])
    operator = scipy.sparse.linalg.LinearOperator(shape, regularised, dtype=np.float64)
    solved, failed = scipy.sparse.linalg.cg(operator, others.T @ target, rtol=1e-9, maxiter=2000)
    return None if failed else np.asarray(solved)


def _user_item(split: Split, decay: float, n_items: int) -> scipy.sparse.csr_matrix:
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
    values = np.array(list(best.values()))
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=(split.log.n_users, n_items))


def _same(what: str, found: str, *expected: str) -> None:
    rather = " or ".join(f"{one[:12]}..." for one in expected)
    _demand(
        found in expected,
        f"the {what} was made on other events than it may see: {found[:12]}... instead of {rather}",
    )


def _demand(fine: bool, otherwise: str) -> None:
    if not fine:
        raise LeakError(f"{otherwise}; the numbers of this run are worthless")
