"""Cornac's sequence models on a split that `peers.py` has written; runs where Cornac is installed.

python eval/peer_cornac.py FOLDER NAME sasrec|gru4rec EPOCHS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from cornac.data import SequentialDataset
from cornac.models import GRU4Rec, SASRec
from peer_split import LISTED, columns, read_split, write_lists


def main(folder: Path, name: str, kind: str, epochs: int) -> None:
    """Train, rank for every user, write."""
    histories, asked = read_split(folder)
    # A session a user: that is how these models see a history.
    rows, items, places = columns(histories)
    events = list(zip(rows.tolist(), items.tolist(), places.tolist(), strict=True))
    train = SequentialDataset.build(events, fmt="SIT", seed=0)
    if kind == "sasrec":
        model = SASRec(embedding_dim=64, num_heads=2, n_epochs=epochs, seed=0)
    else:
        model = GRU4Rec(layers=[128], dropout_p_hidden=0.3, n_epochs=epochs, seed=0)
    begun = time.perf_counter()
    model.fit(train)
    seconds = time.perf_counter() - begun

    code_of = np.array(list(train.iid_map))
    number = {int(code): own for own, code in enumerate(code_of)}
    lists = []
    for row in asked:
        known = [number[int(i)] for i in histories[row]]
        scores = np.asarray(model.score(0, known), dtype=np.float64)
        scores[known] = -np.inf
        best = np.argsort(-scores, kind="stable")[:LISTED]
        lists.append(code_of[best[np.isfinite(scores[best])]])
    write_lists(folder, name, lists, seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
