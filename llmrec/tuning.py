"""Fine-tuning the language model of a recommender: what is held out, what is trained, what it brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmrec.card import hash_ids
from llmrec.config import Config, one_base
from llmrec.errors import ConfigError
from llmrec.evaluation.split import tail
from llmrec.events import EventLog
from llmrec.language_model import TunedModel
from llmrec.lm_training import LearnedLog, Trained, fine_tune
from llmrec.metrics import Comparison, compare
from llmrec.progress import Progress, TrainingReport
from llmrec.recipe import HeldOut, Recipe, fit_retrievers, ranks_in, roles
from llmrec.retrieve.popularity import newest
from llmrec.state import State
from llmrec.streaming import StreamedLog

CHOSEN = "held-out users that chose the weight"
JUDGED = "held-out users with new events, which decided what is kept"


@dataclass(frozen=True)
class Continued:
    """How a tuned model was continued on newer events, and whether the result was kept.

    `since` is in seconds since 1970: events after it were new. In each epoch `fresh` of them were learned,
    and about `replayed` older ones. `comparison` sets the continued model against the earlier one, each
    alone, on new events that neither has seen.
    """

    since: int
    fresh: int
    replayed: int
    comparison: Comparison

    @property
    def kept(self) -> bool:
        """Whether the continued model took the place of the earlier one: not if it is shown to be worse."""
        return not self.comparison.high < 0

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = f"continued on {self.fresh:,} events after {since}, with about {self.replayed:,} older ones"
        why = (
            "kept: on new held-out events it is not shown to be worse than the earlier model"
            if self.kept
            else "not kept, the earlier model stays: on new held-out events it is worse"
        )
        return f"{what}\n{why}\n{self.comparison}"


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning did, and the language model's weight in the blend (0: it is left out).

    `gain` compares the blend with the merge on the held-out users that chose the weight. `continued` says
    what a tuned model was continued on, and which of the two was kept; None where it was trained anew.
    `beside` are the models that were trained after the first, and whether they joined it.
    """

    training: TrainingReport
    weight: float
    query_weight: float
    gain: Comparison
    continued: Continued | None = None
    beside: tuple[Trained, ...] = ()

    def __str__(self) -> str:
        if self.weight or self.query_weight:
            used = f"weight in the blend {self.weight:g}, with typed words {self.query_weight:g}"
        else:
            used = "weight 0: on held-out events the language model adds nothing beyond noise, it is left out"
        if self.continued is not None:
            return f"{self.training}\n{self.continued}\n{used}\n{self.gain} ({JUDGED})"
        trained = "\n".join(map(str, (self.training, *self.beside)))
        return f"{trained}\n{used}\n{self.gain} ({CHOSEN})"


def tune(
    state: State,
    log: EventLog,
    config: Config,
    minutes: float | None,
    folder: Path | None,
    on_step: Callable[[Progress, float], None] | None,
    stream: Any = None,
) -> tuple[TunedModel, Recipe, FinetuneReport]:
    """Train on a log without the last event of each user, which decides what is kept and its weight.

    With a `stream` (see `StreamedLog`) the language model learns from that instead, without the users who
    decide.

    Raises
    ------
    ConfigError
        If models beside each other have several bases, or there is a stream, and the mode learns from
        candidates for each event, which needs the log.
    """
    one_base(config)
    modes = [config.lm.mode, *(more.lm.mode for more in config.beside)]
    listwise = [mode for mode in modes if mode in ("yes_no", "letters")]
    if stream is not None and listwise:
        raise ConfigError(
            f"lm.mode {listwise[0]!r} learns from candidates that retrievers give for each event, which "
            f"needs the log in memory; a stream is for item_tokens, likelihood and generate"
        )
    train, part = tail(log)
    search = config.retrieval
    part = part.sample(search.lm_users, search.seed)
    held_out = part.held_out(state.catalog.active, not state.repeats)
    learned: LearnedLog = train
    if stream is not None:
        judges = [log.users[user] for user in part.users.tolist()]
        learned = StreamedLog(stream, state.catalog, config.data, judges)
    state = replace(state, retrievers=fit_retrievers(train, state.texts, state.recipe))
    lm, (first, *others), recipe = fine_tune(
        state,
        learned,
        held_out,
        config,
        config.training.lasting(minutes),
        data=log.fingerprint,
        folder=folder,
        minutes=minutes,
        on_step=on_step,
    )
    judged = roles(held_out, config.training.seed)[1].sample(lm.judged or search.lm_users, search.seed)
    tuned = replace(state, recipe=recipe, lm=lm)
    gain = gain_of(tuned, judged)
    note(tuned, log, gain, CHOSEN)
    if isinstance(learned, StreamedLog) and learned.until is not None:
        assert lm.card is not None
        lm.card = lm.card.noting(data={**lm.card.training["data"], "until": learned.until})
    weights = recipe.history.most_lm, recipe.query.most_lm
    return lm, recipe, FinetuneReport(first.report, *weights, gain, beside=tuple(others))


def gain_of(state: State, judged: HeldOut) -> Comparison:
    """The blend with the language model against the blend without it."""
    tuned = state.pipeline()
    plain = replace(tuned, history=tuned.history.with_lm(0.0))
    ranks = {
        name: ranks_in((c.items for c in system.recommend(judged.queries, 100)), judged.targets)
        for name, system in (("blend", tuned), ("merge", plain))
    }
    return compare(ranks, "blend", "merge")


def note(state: State, log: EventLog, gain: Comparison, where: str, **more: Any) -> None:
    """Write on the card of a state's language model how new its data is, and what it brings."""
    lm = state.lm
    assert lm is not None and lm.card is not None
    until = None if log.timestamp is None or not len(log) else newest(log.timestamp)
    weights = {"weight": state.recipe.history.most_lm, "query_weight": state.recipe.query.most_lm}
    data = lm.card.training["data"]
    items = hash_ids(state.catalog.ids[: data["items"]])
    lm.card = lm.card.noting(
        data={**data, "items_sha256": items, "until": until},
        blend={**gain.as_dict(), **weights, "where": where},
        **more,
    )
