"""RecTools' SASRec and two-stage model on a split that `peers.py` has written; runs where RecTools is.

    python eval/peer_rectools.py FOLDER NAME sasrec|"two stages"

SASRec with softmax loss and the library's defaults, stopped by the loss of the last event of 500 users, and
then trained anew on everything for as many epochs. The two-stage model has ALS, EASE and popularity as
candidate generators and CatBoost's YetiRank as reranker, on the last event of each user.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peer_split import LISTED, columns, read_split, write_lists

EPOCHS, PATIENCE, JUDGES = 60, 10, 500


def sasrec(dataset: Any) -> Any:
    """A fitted SASRec."""
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import EarlyStopping
    from rectools.models import SASRecModel

    def last_events(interactions: pd.DataFrame, **_: Any) -> np.ndarray:
        users = interactions["user_id"].to_numpy()
        some = np.random.default_rng(0).permutation(np.unique(users))[:JUDGES]
        last = interactions.groupby("user_id")["datetime"].transform("max") == interactions["datetime"]
        return np.isin(users, some) & last.to_numpy()

    def trainer(epochs: int, watched: bool) -> Any:
        stop = [EarlyStopping(SASRecModel.val_loss_name, patience=PATIENCE)] if watched else []
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=stop,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    same = {"deterministic": True, "recommend_torch_device": "cpu"}
    trial = SASRecModel(
        **same, get_val_mask_func=last_events, get_trainer_func=lambda: trainer(EPOCHS, True)
    ).fit(dataset)
    epochs = max(1, trial.fit_trainer.current_epoch - PATIENCE)
    print(f"SASRec: {epochs} epochs")
    return SASRecModel(**same, get_trainer_func=lambda: trainer(epochs, False)).fit(dataset)


def two_stages(dataset: Any) -> Any:
    """A fitted CandidateRankingModel."""
    from catboost import CatBoostRanker
    from implicit.als import AlternatingLeastSquares
    from rectools.model_selection import LastNSplitter
    from rectools.models import EASEModel, ImplicitALSWrapperModel, PopularModel
    from rectools.models.ranking import CandidateGenerator, CandidateRankingModel, CatBoostReranker

    als = AlternatingLeastSquares(factors=64, regularization=0.05, alpha=2.0, iterations=20, random_state=0)
    generators = [
        CandidateGenerator(
            model, 100, keep_ranks=True, keep_scores=True, scores_fillna_value=-1.0, ranks_fillna_value=101
        )
        for model in (ImplicitALSWrapperModel(als), EASEModel(), PopularModel())
    ]
    ranker = CatBoostRanker(loss_function="YetiRank", iterations=300, random_state=0, verbose=False)
    return CandidateRankingModel(generators, LastNSplitter(1), CatBoostReranker(ranker)).fit(dataset)


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
    model = {"sasrec": sasrec, "two stages": two_stages}[kind](dataset)
    seconds = time.perf_counter() - begun
    found = model.recommend(asked, dataset, k=LISTED, filter_viewed=True)
    by_user = {user: own["item_id"].to_numpy() for user, own in found.groupby("user_id", sort=False)}
    nothing = np.empty(0, np.int64)
    write_lists(folder, name, [by_user.get(row, nothing) for row in asked.tolist()], seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
