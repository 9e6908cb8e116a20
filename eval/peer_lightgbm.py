"""A gradient-boosted reranker on the features that `peers.py` has written; runs where LightGBM is installed.

    python eval/peer_lightgbm.py FOLDER NAME

Reads FOLDER/features.npz: candidates of the users that judge (``x``, ``label``, ``sizes``), one user after
another, and of those asked (``asked``). Writes FOLDER/NAME.npz with a score for each row of the latter.
LambdaMART (Burges 2010), stopped by a fifth of the judging users.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lightgbm
import numpy as np


def main(folder: Path, name: str) -> None:
    """Train, score, write."""
    data = np.load(folder / "features.npz")
    x, label, sizes = data["x"], data["label"], data["sizes"]
    begun = time.perf_counter()
    fifth = np.arange(len(sizes)) % 5 == 0
    stops = np.repeat(fifth, sizes)
    part = lightgbm.Dataset(x[~stops], label[~stops], group=sizes[~fifth])
    watched = lightgbm.Dataset(x[stops], label[stops], group=sizes[fifth], reference=part)
    settings = {
        "objective": "lambdarank",
        "metric": "ndcg",
        "eval_at": [10],
        "learning_rate": 0.05,
        "num_leaves": 15,
        "min_data_in_leaf": 100,
        "lambdarank_truncation_level": 20,
        "feature_fraction": 0.8,
        "seed": 0,
        "deterministic": True,
        "verbosity": -1,
    }
    model = lightgbm.train(
        settings, part, 500, valid_sets=[watched], callbacks=[lightgbm.early_stopping(50, verbose=False)]
    )
    seconds = time.perf_counter() - begun
    scores = model.predict(data["asked"], num_iteration=model.best_iteration)
    np.savez(folder / f"{name}.npz", scores=scores, seconds=seconds, trees=model.best_iteration)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
