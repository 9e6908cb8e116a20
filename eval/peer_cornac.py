"""Cornac's sequence models on a split that `peers.py` has written; runs where Cornac is installed.

    python eval/peer_cornac.py FOLDER sasrec|gru4rec EPOCHS

Reads FOLDER/split.npz (histories to train on, and of the users to answer) and writes
FOLDER/NAME.npz with the 100 best unseen items of each user, and the seconds of training.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from cornac.data import SequentialDataset
from cornac.models import GRU4Rec, SASRec

LISTED = 100


def split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut one array into pieces of these lengths."""
    return np.split(flat, np.cumsum(lengths)[:-1])


def main(folder: Path, name: str, epochs: int) -> None:
    """Train, rank for every user, write."""
    data = np.load(folder / "split.npz")
    histories = split(data["train"], data["train_lengths"])
    # A session a user: that is how these models see a history.
    rows = [(u, int(i), t) for u, history in enumerate(histories) for t, i in enumerate(history)]
    train = SequentialDataset.build(rows, fmt="SIT", seed=0)
    if name == "sasrec":
        model = SASRec(embedding_dim=64, num_heads=2, n_epochs=epochs, seed=0)
    else:
        model = GRU4Rec(layers=[128], dropout_p_hidden=0.3, n_epochs=epochs, seed=0)
    begun = time.perf_counter()
    model.fit(train)
    seconds = time.perf_counter() - begun

    code_of = np.array(list(train.iid_map))
    number = {int(code): own for own, code in enumerate(code_of)}
    lists = np.full((len(data["asked_lengths"]), LISTED), -1, np.int64)
    for row, history in enumerate(split(data["asked"], data["asked_lengths"])):
        known = [number[int(i)] for i in history if int(i) in number]
        scores = np.asarray(model.score(0, known), dtype=np.float64)
        scores[known] = -np.inf
        best = np.argsort(-scores, kind="stable")[:LISTED]
        best = best[np.isfinite(scores[best])]
        lists[row, : len(best)] = code_of[best]
    np.savez(folder / f"{name}.npz", lists=lists, seconds=seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
