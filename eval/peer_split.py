"""The split that `peers.py` writes and the workers of other libraries read; needs nothing but numpy.

FOLDER/split.npz holds the histories to train on, one after another, which of them are asked for, and which
judge what is chosen, with the item that came next. FOLDER/NAME.npz holds what a worker answers: the best
unseen items of each user asked, and the seconds of training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

LISTED = 100
"""Items listed for each user."""


def write_split(
    folder: Path, histories: list[np.ndarray], asked: np.ndarray, judging: np.ndarray, next_items: np.ndarray
) -> None:
    """Write histories, oldest first, and the rows of those whose next item is asked for, shape (users,).

    `judging` are the rows of others, and `next_items` what came next there.
    """
    lengths = np.array([len(history) for history in histories])
    np.savez(
        folder / "split.npz",
        flat=np.concatenate(histories),
        lengths=lengths,
        asked=asked,
        judging=judging,
        next_items=next_items,
    )


def read_split(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Histories, and the rows that are asked for."""
    data = np.load(folder / "split.npz")
    return np.split(data["flat"], np.cumsum(data["lengths"])[:-1]), data["asked"]


def read_judges(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the users that judge, and the item that came next for each."""
    data = np.load(folder / "split.npz")
    return data["judging"], data["next_items"]


def ndcg_at_10(lists: list[np.ndarray], next_items: np.ndarray) -> float:
    """Mean of 1 / log2(1 + rank) of the next item in each list, 0 from rank 11 on."""
    ranks = [np.flatnonzero(items[:10] == item) for items, item in zip(lists, next_items, strict=True)]
    return float(np.mean([1 / np.log2(2 + rank[0]) if len(rank) else 0.0 for rank in ranks]))


def write_lists(folder: Path, name: str, lists: list[np.ndarray], seconds: float) -> None:
    """Write the items of each user asked, best first."""
    table = np.full((len(lists), LISTED), -1, np.int64)
    for row, items in enumerate(lists):
        table[row, : len(items[:LISTED])] = items[:LISTED]
    np.savez(folder / f"{name}.npz", lists=table, seconds=seconds)


def columns(histories: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row of the user, item and place in the history of every event, shape (events,) each."""
    lengths = np.array([len(history) for history in histories])
    rows = np.repeat(np.arange(len(histories)), lengths)
    places = np.concatenate([np.arange(n) for n in lengths])
    return rows, np.concatenate(histories), places
