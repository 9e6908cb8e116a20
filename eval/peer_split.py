"""The split that `peers.py` writes and the workers of other libraries read; needs nothing but numpy.

FOLDER/split.npz holds the histories to train on, one after another, and which of them are asked for;
FOLDER/NAME.npz what a worker answers: the best unseen items of each user asked, and the seconds of training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

LISTED = 100
"""Items listed for each user."""


def write_split(folder: Path, histories: list[np.ndarray], asked: np.ndarray) -> None:
    """Write histories, oldest first, and the rows of those whose next item is asked for, shape (users,)."""
    lengths = np.array([len(history) for history in histories])
    np.savez(folder / "split.npz", flat=np.concatenate(histories), lengths=lengths, asked=asked)


def read_split(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """What `write_split` wrote."""
    data = np.load(folder / "split.npz")
    return np.split(data["flat"], np.cumsum(data["lengths"])[:-1]), data["asked"]


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
