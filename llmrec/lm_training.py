"""Training a language model of any mode, and fitting its weight in the recipe."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmrec.card import Card, make_card
from llmrec.config import Config, one_base
from llmrec.families import Texts, TrainingLog
from llmrec.fetch import licence_of, resolve
from llmrec.language_model import LanguageModel, TunedModel
from llmrec.lora import merge
from llmrec.metrics import Ranks, summary
from llmrec.mining import mined_choices
from llmrec.persistence import BESIDE
from llmrec.processes import Processes
from llmrec.progress import Progress, TrainingReport
from llmrec.protocols import Codes, Floats, Mask
from llmrec.recipe import VALIDATION_USERS, HeldOut, Recipe, ranks_in, roles
from llmrec.score.config import ItemTokensConfig, TrainingConfig, WordsConfig
from llmrec.score.item_tokens import ItemTokenScorer
from llmrec.score.labels import LettersScorer
from llmrec.score.likelihood import LikelihoodScorer
from llmrec.score.line_tasks import lines_task
from llmrec.score.tasks import ItemTokensTask, ListwiseTask, Task
from llmrec.score.wordwise import VocabularyScorer
from llmrec.search import with_language_model
from llmrec.sequences import Portions
from llmrec.several import beside
from llmrec.state import State
from llmrec.training import LoRATrainer
from llmrec.word_model import WordLanguageModel

OnStep = Callable[[Progress, float], None]

WORDS_VALIDATION_USERS = 100
"""Of these, for the modes that read words, which take far longer a user."""

BATCHES = 3
"""Number of the way that batches and loss are made; a run with others is not continued."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How a model was trained, and for a further one what joining it to those before gains (`beside`)."""

    mode: str
    report: TrainingReport
    entry: dict[str, Any]
    card: Card | None

    def __str__(self) -> str:
        if not self.entry:
            return str(self.report)
        error = self.entry["standard_error"]
        said = "left out" if self.entry["chosen"] == "earlier" else f"taken ({self.entry['chosen']})"
        return (
            f"{self.mode}: {self.report}\n{self.mode} {said}: NDCG@10 {self.entry['gain']:+.4f}, standard "
            f"error {'unknown' if error is None else format(error, '.4f')}, over what was there"
        )


class LearnedLog(Protocol):
    """What a language model learns from: a `TrainingLog`, or a log that is read as a stream."""

    @property
    def users(self) -> int:
        """Users with events."""
        ...

    @property
    def events(self) -> int:
        """Events of all users."""
        ...

    def counts(self, items: int) -> NDArray[Any]:
        """Weight of the events of each item, shape (items,)."""
        ...

    def sha256(self) -> str:
        """Hash of the histories."""
        ...

    def source(self) -> Portions:
        """What a training run draws its windows from."""
        ...


def fine_tune(
    state: State,
    log: LearnedLog,
    held_out: HeldOut,
    config: Config,
    training: TrainingConfig,
    *,
    data: str,
    folder: Path | None = None,
    minutes: float | None = None,
    late: Mask | None = None,
    on_step: OnStep | None = None,
) -> tuple[TunedModel, list[Trained], Recipe]:
    """Train on a log, then fit the model's weights in the recipe on what was held out.

    Neither the log nor the fitted retrievers of the state may hold the held-out events. Who chooses the state
    of a model does not judge it: see `roles`. What is configured beside the first model is trained after it,
    in a folder of its own, and joins it where that pays.

    Parameters
    ----------
    training
        Of the first model.
    minutes
        Of each further one; those that its configuration says if None.
    late
        Whether an item comes after training, shape (items,): it counts as one that is added later. None for
        none.
    """
    one_base(config)
    base = resolve(config.lm.base, allow_hub=config.allow_hub)
    wanted = [(config.lm, training), *((more.lm, more.training.lasting(minutes)) for more in config.beside)]
    made: list[Trained] = []
    lm: TunedModel | None = None
    choosing, judging = roles(held_out, training.seed)
    with tempfile.TemporaryDirectory(prefix="llmrec-") as temporary:
        place = folder or Path(temporary)
        for number, (shape, how) in enumerate(wanted):
            own = place / f"{BESIDE}{number}" if number else place
            where: dict[str, Any] = {"data": data, "folder": own, "late": late, "on_step": on_step}
            new: TunedModel
            if isinstance(shape, ItemTokensConfig):
                new, report = train_language_model(log, choosing, state.texts, base, shape, how, **where)
                new.fit_unseen(choosing)
            else:
                new, report = train_words_model(state, log, choosing, base, shape, how, **where)
            assert new.card is not None
            held = {**new.card.training["data"], "held_out": len(held_out.queries)}
            new.card = new.card.noting(data=held)
            entry: dict[str, Any] = {}
            if lm is None:
                lm = new
            else:
                lm, entry = beside(lm, new, state.recipe, state.retrievers, judging, config.retrieval)
            made.append(Trained(shape.mode, report, entry, new.card))
    assert lm is not None
    recipe = with_language_model(
        state.recipe,
        state.retrievers,
        lm.scorer,
        judging,
        state.texts.lines,
        config.retrieval,
        proposes=lm.proposes,
        scored=lm.scored,
        scores_all=lm.scores_all,
        judged=lm.judged,
    )
    return lm, made, replace(recipe, log=[*recipe.log, *(one.entry for one in made if one.entry)])


def train_language_model(
    log: LearnedLog,
    held_out: HeldOut,
    texts: Texts,
    base: Path,
    config: ItemTokensConfig,
    training: TrainingConfig,
    *,
    data: str,
    folder: Path,
    late: Mask | None = None,
    on_step: OnStep | None = None,
) -> tuple[LanguageModel, TrainingReport]:
    """Fine-tune an `item_tokens` model; a run of the same data and settings in `folder` is continued.

    `held_out` decides which state is kept; it is not trained on.
    """
    lm = LanguageModel.new(config, base, texts.vectors, log.counts(len(texts.lines)), training.seed, late)
    task = ItemTokensTask(
        lm.model,
        log.source(),
        config.window,
        training,
        typed=lm.typing(texts.lines),
        wishes=config.wishes,
    )
    sample = held_out.sample(VALIDATION_USERS, training.seed)
    report = run_training(
        lm,
        task,
        training,
        (lambda: measure(lm.scorer_of(lm.model), sample)) if len(sample.queries) else None,
        log=log,
        held_out=len(held_out.queries),
        selected_on=held_out.sha256(),
        items=hash_items(texts, config),
        base=base,
        encoder=texts.encoder.fingerprint,
        data=data,
        folder=folder,
        on_step=on_step,
    )
    lm.scorer.forget()
    return lm, report


def train_words_model(
    state: State,
    log: LearnedLog,
    held_out: HeldOut,
    base: Path,
    config: WordsConfig,
    training: TrainingConfig,
    *,
    data: str,
    folder: Path,
    late: Mask | None = None,
    on_step: OnStep | None = None,
) -> tuple[WordLanguageModel, TrainingReport]:
    """The same for a model that reads words; the retrievers give the candidates that judge its states."""
    texts = state.texts
    lm = WordLanguageModel.new(config, base, texts.lines, log.counts(len(texts.lines)), training.seed, late)
    task: Task[Any]
    if isinstance(lm.scorer, LikelihoodScorer | VocabularyScorer):
        task = lines_task(lm.scorer, log.source(), training, lm.typed, config.wishes)
    else:
        assert isinstance(log, TrainingLog), "streams are for the modes that learn without candidates"
        choices = mined_choices(state, log, config.listed, config.mined, training.seed, wishes=config.wishes)
        task = ListwiseTask(lm.scorer, choices, training)
    sample = held_out.sample(WORDS_VALIDATION_USERS, training.seed)
    merged = state.without_language_model().pipeline().recommend(sample.queries, config.candidates)
    # Where all validate together, they have to read the same.
    candidates = Processes().agreed([found.items for found in merged])
    report = run_training(
        lm,
        task,
        training,
        (lambda: measure_words(lm, sample, candidates)) if len(sample.queries) else None,
        log=log,
        held_out=len(held_out.queries),
        selected_on=held_out.sha256(),
        items=hash_words(state),
        base=base,
        encoder=texts.encoder.fingerprint,
        data=data,
        folder=folder,
        on_step=on_step,
    )
    lm.scorer.forget()
    return lm, report


def hash_items(texts: Texts, config: ItemTokensConfig) -> str:
    """Hash of what a model that reads vectors knows of the items; their lines too, if wishes are drawn."""
    digest = hashlib.sha256(texts.vectors.tobytes())
    if config.wishes > 0:
        digest.update("\n".join(texts.lines).encode())
    return digest.hexdigest()


def hash_words(state: State) -> str:
    """Hash of what a model that reads words knows of the items, and of what decides its candidates."""
    chosen = json.dumps([{**state.recipe.as_dict(), "log": None}, state.repeats])
    digest = hashlib.sha256("\n".join([*state.texts.lines, chosen]).encode())
    digest.update(state.catalog.active.tobytes())
    return digest.hexdigest()


def run_training(
    lm: LanguageModel | WordLanguageModel,
    task: Task[Any],
    training: TrainingConfig,
    validate: Callable[[], Mapping[str, float]] | None,
    *,
    log: LearnedLog,
    held_out: int,
    selected_on: str,
    items: str,
    base: Path,
    encoder: str,
    data: str,
    folder: Path,
    on_step: OnStep | None,
) -> TrainingReport:
    """Train, and give the model its card; what it learned is merged into its weights.

    Parameters
    ----------
    task
        Made of the model.
    validate
        Measures the model on held-out events, of which there are `held_out`; None where there are none.
    selected_on, items
        Hashes of the held-out events, and of what is read of the items: the same log over other items is
        another run.
    """
    prompt = lm.config.prompt_name
    card = make_card(prompt, base, encoder, data, {})
    parts = [BATCHES, lm.config.model_dump(), training.learned, asdict(card), items, selected_on]
    parts.append(log.sha256())
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    report = LoRATrainer(task, training, folder, fingerprint, dtype=lm.dtype).run(validate, on_step)
    merge(lm.words.body if isinstance(lm, WordLanguageModel) else lm.model.body)
    made = {
        **asdict(report),
        "settings": training.model_dump(),
        "histories_sha256": log.sha256(),
        "selected_on_sha256": selected_on,
        "data": {
            "users": log.users,
            "events": log.events,
            "items": len(lm.counts),
            "held_out": held_out,
        },
        "licence": licence_of(base),
    }
    lm.card = make_card(prompt, base, encoder, data, made)
    return report


def measure(scorer: ItemTokenScorer, held_out: HeldOut) -> dict[str, float]:
    """NDCG@10 and Recall@10 of the language model alone over the catalogue, and nats per held-out item."""
    found = scorer.retrieve(held_out.queries, 10)
    ranks = ranks_in((hits.items for hits in found), held_out.targets)
    scores = scorer.score(held_out.queries, [held_out.targets[i : i + 1] for i in range(len(found))])
    nats = [-float(values[0]) for values in scores]
    return {**summary(ranks, ["ndcg@10", "recall@10"]), "nats": float(np.mean(nats))}


def ranks_among(candidates: Sequence[Codes], scores: Sequence[Floats], targets: Codes) -> Ranks:
    """Rank of each target among its candidates by score, shape (targets,); 0 where it is not one of them.

    Behind all others of its score, and behind all where it has none: a model that tells nothing apart is
    not given the order that its candidates came in.
    """
    ranks = np.zeros(len(targets), np.int64)
    for row, (items, own, target) in enumerate(zip(candidates, scores, targets, strict=True)):
        at = np.flatnonzero(items == target)
        if len(at):
            ranks[row] = len(items) - int((own < own[at[0]]).sum())
    return ranks


def measure_words(lm: WordLanguageModel, held_out: HeldOut, candidates: Sequence[Codes]) -> dict[str, float]:
    """NDCG@10 and Recall@10 of the model's own order of each user's candidates, and nats per held-out item.

    Nats are over the whole catalogue for `likelihood` on the trie, and elsewhere over the candidates, where
    the item is among them; not there if it never is, or if there are no probabilities: `letters` has ranks
    alone of more candidates than it reads at once.
    """
    lm.scorer.forget()
    scores = lm.scorer.score(held_out.queries, candidates)
    ranks = ranks_among(candidates, scores, held_out.targets)
    measured = summary(ranks, ["ndcg@10", "recall@10"])
    if isinstance(lm.scorer, LikelihoodScorer):
        own = lm.scorer.score(held_out.queries, [held_out.targets[i : i + 1] for i in range(len(scores))])
        nats = [-float(values[0]) for values in own]
    elif isinstance(lm.scorer, LettersScorer) and lm.config.candidates > lm.scorer.window:
        nats = []
    else:
        nats = [
            float(np.logaddexp.reduce(s) - s[items == target][0])
            for items, s, target in zip(candidates, scores, held_out.targets, strict=True)
            if target in items
        ]
    return {**measured, "nats": float(np.mean(nats))} if nats else measured
