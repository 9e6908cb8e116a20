"""Fine-tuning the language model of a recommender: what is held out, what is trained, what it brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmrec.config import Config
from llmrec.evaluation.split import tail
from llmrec.events import EventLog
from llmrec.language_model import TunedModel
from llmrec.lm_training import fine_tune
from llmrec.metrics import Comparison, compare
from llmrec.progress import Progress, TrainingReport
from llmrec.recipe import Recipe, fit_retrievers, ranks_in
from llmrec.state import State


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning did, and the language model's weight in the blend (0: it is left out).

    `gain` compares the blend with the merge on the held-out users that chose the weight.
    """

    training: TrainingReport
    weight: float
    query_weight: float
    gain: Comparison

    def __str__(self) -> str:
        if self.weight or self.query_weight:
            used = f"weight in the blend {self.weight:g}, with typed words {self.query_weight:g}"
        else:
            used = "weight 0: on held-out events the language model adds nothing beyond noise, it is left out"
        return f"{self.training}\n{used}\n{self.gain} (held-out users that chose the weight)"


def tune(
    state: State,
    log: EventLog,
    config: Config,
    minutes: float | None,
    folder: Path | None,
    on_step: Callable[[Progress, float], None] | None,
) -> tuple[TunedModel, Recipe, FinetuneReport]:
    """Train on a log without the last event of each user, which decides what is kept and its weight."""
    train, part = tail(log)
    search = config.retrieval
    held_out = part.sample(search.lm_users, search.seed).held_out(state.catalog.active, not state.repeats)
    state = replace(state, retrievers=fit_retrievers(train, state.texts, state.recipe))
    lm, report, recipe = fine_tune(
        state,
        train,
        held_out,
        config,
        config.training.lasting(minutes),
        data=log.fingerprint,
        folder=folder,
        on_step=on_step,
    )
    judged = held_out.sample(lm.judged or search.lm_users, search.seed)
    tuned = replace(state, recipe=recipe, lm=lm).pipeline()
    plain = replace(tuned, history=tuned.history.with_lm(0.0))
    ranks = {
        name: ranks_in((c.items for c in system.recommend(judged.queries, 100)), judged.targets)
        for name, system in (("blend", tuned), ("merge", plain))
    }
    gain = compare(ranks, "blend", "merge")
    return lm, recipe, FinetuneReport(report, recipe.history.most_lm, recipe.query.most_lm, gain)
