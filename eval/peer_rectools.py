"""RecTools' SASRec and two-stage model on a split that `peers.py` has written; runs where RecTools is.

    python eval/peer_rectools.py FOLDER NAME sasrec|"two stages"

SASRec with softmax loss and the library's defaults, asked after every ten epochs; what it answers where the
users who judge find it best is taken, and two stretches without a better one end it. The two-stage model has
ALS, EASE and popularity as candidate generators and CatBoost's YetiRank as reranker, on the last event of
each user.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peer_split import LISTED, columns, ndcg_at_10, read_judges, read_split, write_lists

STRETCH, MOST, PATIENCE = 10, 100, 2


def lists_of(model: Any, dataset: Any, rows: np.ndarray) -> list[np.ndarray]:
    """The best unseen items of some users."""
    found = model.recommend(rows, dataset, k=LISTED, filter_viewed=True)
    by_user = {user: own["item_id"].to_numpy() for user, own in found.groupby("user_id", sort=False)}
    return [by_user.get(row, np.empty(0, np.int64)) for row in rows.tolist()]


def sasrec(dataset: Any, folder: Path, asked: np.ndarray) -> list[np.ndarray]:
    """Lists of a SASRec, as it was where it was best."""
    from pytorch_lightning import Trainer, seed_everything
    from rectools.models import SASRecModel

    seed_everything(0, verbose=False)

    def trainer() -> Any:
        return Trainer(
            accelerator="cpu",
            deterministic=True,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    judging, next_items = read_judges(folder)
    model = SASRecModel(recommend_torch_device="cpu", get_trainer_func=trainer)
    best, kept, since = -1.0, [], 0
    for epochs in range(STRETCH, MOST + 1, STRETCH):
        model.fit_partial(dataset, min_epochs=STRETCH, max_epochs=STRETCH)
        value = ndcg_at_10(lists_of(model, dataset, judging), next_items)
        print(f"SASRec, {epochs} epochs: NDCG@10 {value:.4f} where it is judged", flush=True)
        since += 1
        if value > best:
            best, kept, since = value, lists_of(model, dataset, asked), 0
        if since == PATIENCE:
            break
    return kept


def two_stages(dataset: Any, asked: np.ndarray) -> list[np.ndarray]:
    """Lists of a CandidateRankingModel."""
    from catboost import CatBoostRanker
    from implicit.als import AlternatingLeastSquares
    from rectools.model_selection import LastNSplitter
    from rectools.models import EASEModel, ImplicitALSWrapperModel, PopularModel
    from rectools.models.ranking import (
        CandidateGenerator,
        CandidateRankingModel,
        CatBoostReranker,
        PerUserNegativeSampler,
    )

    als = AlternatingLeastSquares(factors=64, regularization=0.05, alpha=2.0, iterations=20, random_state=0)
    generators = [
        CandidateGenerator(
            model, 100, keep_ranks=True, keep_scores=True, scores_fillna_value=-1.0, ranks_fillna_value=101
        )
        for model in (ImplicitALSWrapperModel(als), EASEModel(), PopularModel())
    ]
    ranker = CatBoostRanker(
        loss_function="YetiRank", iterations=300, random_state=0, verbose=False, allow_writing_files=False
    )
    drawn = PerUserNegativeSampler(random_state=0)
    model = CandidateRankingModel(generators, LastNSplitter(1), CatBoostReranker(ranker), drawn).fit(dataset)
    return lists_of(model, dataset, asked)


def main(folder: Path, name: str, kind: str) -> None:
    """Train, rank for every user, write."""
    from rectools.dataset import Dataset

    warnings.filterwarnings("ignore")
    histories, asked = read_split(folder)
    rows, items, places = columns(histories)
    # The order of a history is all that counts of its times.
    day = pd.Timestamp(2020, 1, 1) + pd.to_timedelta(places, unit="min")
    events = pd.DataFrame({"user_id": rows, "item_id": items, "weight": 1.0, "datetime": day})
    dataset = Dataset.construct(events)
    begun = time.perf_counter()
    lists = two_stages(dataset, asked) if kind == "two stages" else sasrec(dataset, folder, asked)
    write_lists(folder, name, lists, time.perf_counter() - begun)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
