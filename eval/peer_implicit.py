"""ALS of `implicit` on a split that `peers.py` has written; runs where implicit is installed.

python eval/peer_implicit.py FOLDER NAME
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from implicit.als import AlternatingLeastSquares
from peer_split import LISTED, columns, read_split, write_lists
from scipy import sparse


def main(folder: Path, name: str) -> None:
    """Train, rank for every user, write."""
    histories, asked = read_split(folder)
    rows, items, _ = columns(histories)
    seen = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, items)))
    seen.data[:] = 1.0
    model = AlternatingLeastSquares(factors=64, regularization=0.05, alpha=2.0, iterations=20, random_state=0)
    begun = time.perf_counter()
    model.fit(seen, show_progress=False)
    seconds = time.perf_counter() - begun
    found, scores = model.recommend(asked, seen[asked], N=LISTED, filter_already_liked_items=True)
    # What is filtered is listed last with the lowest number there is.
    kept = [own[score > np.finfo(np.float32).min / 2] for own, score in zip(found, scores, strict=True)]
    write_lists(folder, name, kept, seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
