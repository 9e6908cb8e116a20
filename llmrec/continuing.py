"""Continuing a tuned language model on newer events, with some older ones so that it forgets little.

What is new are the events after those that the model's card names. Of half the users who have new events
the last one is held out: neither model has seen it. Some of these users choose which state of the run is
kept, the others judge whether it takes the place of the earlier model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from llmrec.adapter import adapter_hash
from llmrec.config import Config
from llmrec.errors import ConfigError, DataError, ModelError
from llmrec.evaluation.split import Part, training_log
from llmrec.events import EventLog
from llmrec.families import TrainingLog
from llmrec.fetch import resolve
from llmrec.language_model import LanguageModel, TunedModel, load_language_model
from llmrec.lm_training import (
    WORDS_VALIDATION_USERS,
    hash_items,
    hash_words,
    measure,
    measure_words,
    ranks_among,
    run_training,
)
from llmrec.metrics import Ranks, compare
from llmrec.mining import first_parts, mined_choices
from llmrec.progress import Progress, TrainingReport
from llmrec.protocols import Codes
from llmrec.recipe import VALIDATION_USERS, HeldOut, fit_retrievers, ranks_in
from llmrec.score.config import TrainingConfig
from llmrec.score.labels import LettersScorer, YesNoScorer
from llmrec.score.line_tasks import lines_task
from llmrec.score.tasks import ItemTokensTask, ListwiseTask, Task
from llmrec.sequences import Replay, Source
from llmrec.several import SeveralModels
from llmrec.state import State
from llmrec.tuning import JUDGED, Continued, FinetuneReport, gain_of, note
from llmrec.word_model import WordLanguageModel

Since = Literal["last"] | int
"""``"last"``: after the events that the card of the tuned model names; else seconds since 1970."""

HELD_OUT = 0.5
"""Share of the users with new events whose last one is held out."""

FEWEST = 4
"""Held-out users without whom nothing can be chosen and judged."""


@dataclass(frozen=True, slots=True)
class News:
    """A log in which some events are new, and some of these held out.

    Parameters
    ----------
    log
        All events but the held-out ones.
    old
        Events of each history of `log` that are not new, shape (users,).
    chosen_on, judged_on
        Held-out users that choose the state which is kept, and that judge it.
    """

    log: TrainingLog
    old: NDArray[np.int64]
    chosen_on: Part
    judged_on: Part

    @property
    def fresh(self) -> int:
        """New events that are learned."""
        return self.log.events - int(self.old.sum())

    @classmethod
    def of(cls, log: EventLog, since: int, most: int, seed: int) -> News:
        """Hold out the last event of half the users with new ones, of at most `most`.

        Raises
        ------
        DataError
            If the log has no clock, or too few users have new events.
        """
        stamps = log.require_clock("continuing a tuned model")
        new = stamps > since
        ends = log.offsets[1:][np.diff(log.offsets) >= 2] - 1
        ends = ends[new[ends]]
        rng = np.random.default_rng(seed)
        held = rng.permutation(ends)[: min(most, int(HELD_OUT * len(ends)))]
        keep = np.ones(len(log), dtype=np.bool_)
        keep[held] = False
        if len(held) < FEWEST or not (new & keep).any():
            raise DataError(
                f"too little is new to continue: {int(new.sum())} events of {len(np.unique(log.user[new]))} "
                f"users are later than {since}; at least {int(FEWEST / HELD_OUT)} users with 2 events "
                "or more are needed. Store more events, or fine-tune anew"
            )
        old = np.bincount(log.user[keep & ~new], minlength=log.n_users)
        half = len(held) // 2
        parts = (Part.of(log, np.sort(part)) for part in (held[:half], held[half:]))
        return cls(training_log(log, keep), old, *parts)


def continue_tuning(
    state: State,
    log: EventLog,
    config: Config,
    minutes: float | None,
    folder: Path | None,
    on_step: Callable[[Progress, float], None] | None,
    since: Since,
) -> tuple[TunedModel, FinetuneReport]:
    """Continue the language model of a state; the one of the two that is kept, and a report.

    Weights of the blend stay as they are: the users with new events are few, and the continued model has the
    place of the earlier one.

    Raises
    ------
    ModelError
        If the state has no tuned model.
    ConfigError
        If the configuration describes a model of another shape.
    DataError
        If too little is new.
    """
    before = state.lm
    if before is None or before.card is None:
        raise ModelError("there is no tuned language model to continue; fine-tune without `since` first")
    if isinstance(before, SeveralModels):
        raise ModelError("several language models are in the blend, and one is continued; fine-tune anew")
    after = _since(before, since)
    search, training = config.retrieval, _training(before, config).lasting(minutes)
    news = News.of(log, after, search.lm_users, search.seed)
    state = replace(state, retrievers=fit_retrievers(news.log, state.texts, state.recipe))
    base = resolve(config.lm.base, allow_hub=config.allow_hub)
    # As many validate as in the earlier training.
    most = VALIDATION_USERS if isinstance(before, LanguageModel) else WORDS_VALIDATION_USERS
    chosen_on, judged_on = (
        part.sample(users, search.seed).held_out(state.catalog.active, not state.repeats)
        for part, users in ((news.chosen_on, most), (news.judged_on, before.judged or search.lm_users))
    )
    with tempfile.TemporaryDirectory(prefix="llmrec-") as temporary:
        # The earlier model goes on serving: a copy of it is trained.
        place = Path(temporary)
        before.save(place / "adapter")
        data = before.card.data_sha256
        lm = load_language_model(place / "adapter", base, state.texts, data, trainable=True)
        lm = lm.recounted(news.log.counts(len(state.texts.lines)))
        report, learned = _train(
            cast(LanguageModel | WordLanguageModel, lm),
            state,
            news,
            chosen_on,
            training,
            base=base,
            data=log.fingerprint,
            parent=adapter_hash(place / "adapter"),
            folder=folder or place,
            on_step=on_step,
        )
    candidates = _candidates(lm, state, judged_on)
    ranks = {name: _ranks(m, judged_on, candidates) for name, m in (("continued", lm), ("earlier", before))}
    continued = Continued(after, *learned, compare(ranks, "continued", "earlier"))
    kept = replace(state, lm=lm if continued.kept else before)
    gain = gain_of(kept, judged_on)
    if continued.kept:
        story = {"since": after, "summary": str(continued), "comparison": continued.comparison.as_dict()}
        note(kept, log, gain, JUDGED, continued=story)
    weights = state.recipe.history.most_lm, state.recipe.query.most_lm
    return cast(TunedModel, kept.lm), FinetuneReport(report, *weights, gain, continued)


def _training(before: TunedModel, config: Config) -> TrainingConfig:
    """How the tuned model is trained; refuses settings of `lm` that it was not made with."""
    for more in config.beside:
        # One that took the place of the first.
        if more.lm == before.config:
            return more.training
    now, then = config.lm.model_dump(), before.config.model_dump()
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in names)
        raise ConfigError(f"the tuned model has other settings of lm: {changed}; fine-tune anew to use these")
    return config.training


def _since(before: TunedModel, since: Since) -> int:
    """The time after which events are new, in seconds since 1970."""
    assert before.card is not None
    known = before.card.training.get("data", {}).get("until")
    if since == "last":
        if known is None:
            raise DataError(
                "the card of the tuned model does not say how new its events are: give `since` in seconds "
                "since 1970, or fine-tune anew"
            )
        return int(known)
    # Numbers of numpy and pandas have it as well.
    if isinstance(since, bool) or not hasattr(since, "__index__"):
        raise DataError(f"`since` is 'last' or whole seconds since 1970, got {since!r}")
    since = index(since)
    if known is not None and since < known:
        raise DataError(
            f"the tuned model has learned events up to {known}, so since={since} would judge it on some of "
            f"them; give {known} or later, or 'last'"
        )
    return since


def _train(
    lm: LanguageModel | WordLanguageModel,
    state: State,
    news: News,
    held_out: HeldOut,
    training: TrainingConfig,
    *,
    base: Path,
    data: str,
    parent: str,
    folder: Path,
    on_step: Callable[[Progress, float], None] | None,
) -> tuple[TrainingReport, tuple[int, int]]:
    """Train, and say how many new events an epoch had, and about how many old ones."""
    candidates = _candidates(lm, state, held_out)
    task, learned = _task(lm, state, news, training)
    if isinstance(lm, LanguageModel):
        items = hash_items(state.texts, lm.config)

        def validate() -> dict[str, float]:
            return measure(lm.scorer_of(lm.model), held_out)
    else:
        items = hash_words(state)

        def validate() -> dict[str, float]:
            return measure_words(lm, held_out, candidates)

    report = run_training(
        lm,
        task,
        training,
        validate,
        log=news.log,
        held_out=len(news.chosen_on) + len(news.judged_on),
        selected_on=held_out.sha256(),
        # What it goes on from decides what comes out.
        # Whom it is judged on may not have been learned from by an earlier part of the run.
        items=f"{items} {parent} {news.old.tolist()} {news.judged_on.events.tolist()}",
        base=base,
        encoder=state.texts.encoder.fingerprint,
        data=data,
        folder=folder,
        on_step=on_step,
    )
    lm.scorer.forget()
    if isinstance(lm, LanguageModel):
        lm.fit_unseen(held_out)
    return report, learned


def _task(
    lm: LanguageModel | WordLanguageModel, state: State, news: News, training: TrainingConfig
) -> tuple[Task[Any], tuple[int, int]]:
    """New events in the context of the old ones, old ones drawn anew in each epoch, and how many of each."""
    log, ends = news.log, news.old.tolist()
    old = first_parts(log, ends)
    if isinstance(lm.scorer, YesNoScorer | LettersScorer):
        mined = lm.config.listed, lm.config.mined, training.seed
        wishes = lm.config.wishes
        # Those alone that retrievers find can be learned from.
        choices = mined_choices(state, log, *mined, ends, wishes)
        known = mined_choices(state, old, *mined, wishes=wishes)
        listwise = ListwiseTask(lm.scorer, choices, training, known, _replayed(len(choices), training))
        return listwise, (len(choices), listwise.replayed)
    replayed = _replayed(news.fresh, training)
    users = [user for user, end in enumerate(ends) if len(log.histories[user]) > end]
    histories = [log.histories[user] for user in users]
    weights = [np.ones(len(h), np.float32) for h in histories]
    if log.weights is not None:
        weights = [np.array(log.weights[user], np.float32) for user in users]
    for weight, user in zip(weights, users, strict=True):
        weight[: ends[user]] = 0.0
    source = Source(histories, weights, Replay(old.histories, old.weights, replayed))
    if isinstance(lm, LanguageModel):
        typed, wishes = lm.typing(state.texts.lines), lm.config.wishes
        task: Task[Any] = ItemTokensTask(
            lm.model, source, lm.config.window, training, typed=typed, wishes=wishes
        )
    else:
        task = lines_task(lm.scorer, source, training, lm.typed, lm.config.wishes)
    return task, (news.fresh, replayed)


def _replayed(fresh: int, training: TrainingConfig) -> int:
    """How many old events stand beside so many new ones."""
    return round(fresh * training.replay / (1 - training.replay))


def _candidates(lm: TunedModel, state: State, held_out: HeldOut) -> list[Codes]:
    """The first candidates of the merge, which models that read words order; none for the others."""
    if lm.scored is None:
        return []
    found = state.without_language_model().pipeline().recommend(held_out.queries, lm.scored)
    return [one.items for one in found]


def _ranks(lm: TunedModel, held_out: HeldOut, candidates: Sequence[Codes]) -> Ranks:
    """Rank of each target in what the model alone makes of the catalogue, or of the candidates."""
    lm.scorer.forget()
    if isinstance(lm, LanguageModel):
        hits = lm.scorer.retrieve(held_out.queries, 10)
        return ranks_in((one.items for one in hits), held_out.targets)
    scores = lm.scorer.score(held_out.queries, candidates)
    return ranks_among(candidates, scores, held_out.targets)
