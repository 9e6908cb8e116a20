"""What the design of the language model rests on: one change at a time, everything else the same.

    python eval/ablations.py --data ../shared/data/ml-latest-small --config eval/configs/ml-latest-small.toml
    python eval/ablations.py ... --part 1/4      # a quarter of the trials, for several processes at once
    python eval/ablations.py ... --gather        # the results file, from the trials that are there

Trials are described in eval/ablations/trials.toml. Each trains a model on the training part for a given
number of events, so that fast and slow machines learn the same, and is judged on validation events: a quarter
of the users choose the retrievers' recipe and the state that is kept, the others are reported. Test events
are not touched. A trial that is there is not repeated. Writes runs/ablations/NAME/TRIAL.json; --gather writes
eval/results/NAME-ablations.json from them, and keeps what is published of other trials.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gathering import description, gather, write
from latest_words import InWords, Latest, LatestTask
from rich.console import Console

from llmrec.assembly import read_catalog, read_log
from llmrec.blending import lm_weight
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.errors import ConfigError, LLMRecError
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.protocol import make_split
from llmrec.evaluation.split import Split
from llmrec.families import Texts
from llmrec.features import Features
from llmrec.fetch import resolve
from llmrec.language_model import LanguageModel, TunedModel
from llmrec.lm_training import (
    WORDS_VALIDATION_USERS,
    hash_words,
    measure,
    measure_words,
    ranks_among,
    run_training,
)
from llmrec.metrics import Ranks, summary
from llmrec.mining import mined_choices
from llmrec.offline import core_of
from llmrec.protocols import Codes, Floats, Query, Scorer
from llmrec.recipe import VALIDATION_USERS, HeldOut, ranks_in
from llmrec.retrieve.sequence import SequenceRetriever
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.item_tokens import ItemTokenScorer
from llmrec.score.likelihood import LikelihoodScorer
from llmrec.score.line_tasks import lines_task
from llmrec.score.tasks import Choice, ItemTokensTask, ListwiseTask, Task
from llmrec.score.wordwise import VocabularyScorer
from llmrec.search import known_item_queries, proposed, quality
from llmrec.several import Remembered
from llmrec.stages import cached_retrievers, cached_texts
from llmrec.state import State
from llmrec.word_model import WordLanguageModel

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs" / "ablations"
SHOWN = ("recall@10", "ndcg@10")
WINDOWS = (5, 10, 20, 50)
CANDIDATES = (20, 50, 100)
console = Console(stderr=True)


@dataclass(frozen=True)
class Prepared:
    """Data, retrievers and users of all trials.

    `judging` choose the recipe of the retrievers and the state of a training run that is kept; `asked` are
    reported, and `few` of them where candidates are ordered, which is slow for the modes that read words.
    """

    config: Config
    split: Split
    state: State
    judging: HeldOut
    asked: HeldOut
    few: HeldOut


def prepare(folder: Path, config: Config, users: int, few: int) -> Prepared:
    """Read, split and fit, or take up what an earlier run left."""
    catalog = read_catalog(folder / "items.parquet", config.data)
    log = read_log(folder / "events.parquet", catalog, config.data)
    if config.protocol.core is not None:
        catalog, log = core_of(catalog, log, config.protocol.core)
    split = make_split(log, config.protocol)
    cache = StageCache(HERE.parent / "runs" / folder.name)
    texts = cached_texts(catalog, config, cache, console.print)
    search = config.retrieval
    exclude_seen = not search.has_repeats(log.select(split.fitted).repeat_share())
    everyone = split.validation
    quarter = np.arange(len(everyone)) % 4 == 0
    judging, asked = (
        everyone.take(np.flatnonzero(rows)).held_out(catalog.active, exclude_seen)
        for rows in (quarter, ~quarter)
    )
    # A merge that was chosen on the users that are reported would look better than it is.
    chosen = judging.sample(search.search_users, search.seed)
    recipe, retrievers = cached_retrievers(
        catalog, split, chosen, texts, search, config.index, cache, console.print
    )
    state = State(catalog, texts, recipe, retrievers, not exclude_seen, search.depth)
    sample = asked.sample(users, 0)
    return Prepared(config, split, state, judging, sample, sample.sample(few, 0))


def shuffled(texts: Texts) -> Texts:
    """The same texts, each at another item."""
    order = np.random.default_rng(0).permutation(len(texts.lines))
    return replace(texts, lines=[texts.lines[i] for i in order], vectors=texts.vectors[order])


def random_base(base: Path, folder: Path) -> Path:
    """A causal LM of the same shape and tokenizer whose weights are drawn."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
        draft = folder.with_name(f".{folder.name}-{time.time_ns()}")
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(base).save_pretrained(draft)
        try:
            draft.replace(folder)
        except OSError:
            # Another process was faster; what it drew is the same.
            if not (folder / "config.json").is_file():
                raise
    return folder


def random_choices(p: Prepared, listed: int, limit: int, seed: int) -> list[Choice]:
    """What came next among items drawn at random."""
    rng, items, choices = np.random.default_rng(seed), len(p.state.catalog), []
    places = [(u, at) for u, h in enumerate(p.split.train) for at in range(1, len(h))]
    for row in rng.permutation(len(places))[:limit]:
        user, at = places[row]
        history = p.split.train[user]
        drawn = np.setdiff1d(rng.choice(items, 2 * listed), history[: at + 1])
        others = rng.permutation(drawn)[: listed - 1]
        candidates = rng.permutation(np.append(others, history[at])).astype(np.int32)
        truth = int(np.flatnonzero(candidates == history[at])[0])
        choices.append(Choice(Query(history[:at]), candidates, truth, 1.0))
    return choices


def trained(
    p: Prepared, name: str, trial: Mapping[str, Any], folder: Path
) -> tuple[TunedModel, dict[str, Any]]:
    """The model of a trial, and what its training says."""
    config = settings(p.config, trial)
    lm_config = config.lm
    texts = shuffled(p.state.texts) if trial.get("texts") == "shuffled" else p.state.texts
    base = resolve(lm_config.base)
    if trial.get("weights") == "random":
        base = random_base(base, RUNS / "random-base")
    log, seed = p.split.training, config.training.seed
    counts = log.counts(len(texts.lines))
    lm: LanguageModel | WordLanguageModel
    task: Task[Any]
    training = config.training
    if isinstance(lm_config, ItemTokensConfig):
        lm = LanguageModel.new(lm_config, base, texts.vectors, counts, seed)
        if trial.get("full"):
            lm.model.body.requires_grad_(True)
        typed = lm.typing(texts.lines)
        training = lasting(training, trial["events"])
        learned = lm.model, log.source(), lm_config.window, training
        sample = p.judging.sample(VALIDATION_USERS, 0)
        if trial.get("latest"):
            assert lm.wish is not None
            latest = Latest(lm.wish, p.state.catalog.titles, trial["latest"])
            task = LatestTask(latest, *learned)
            lm.scorer = cast(Any, InWords(lm.scorer, latest))
        else:
            latest = None
            task = ItemTokensTask(*learned, typed=typed, wishes=lm_config.wishes)
        validate: Any = partial(judged, lm, sample, latest)
    else:
        lm = WordLanguageModel.new(lm_config, base, texts.lines, counts, seed)
        training = lasting(training, trial["events"] * trial.get("tokens", 1))
        if isinstance(lm.scorer, LikelihoodScorer | VocabularyScorer):
            task = lines_task(lm.scorer, log.source(), training, lm.typed, lm_config.wishes)
        elif trial.get("negatives") == "random":
            task = ListwiseTask(
                lm.scorer, random_choices(p, lm_config.listed, lm_config.mined, seed), training
            )
        else:
            mined = lm_config.listed, lm_config.mined, seed
            choices = mined_choices(p.state, log, *mined, wishes=lm_config.wishes)
            task = ListwiseTask(lm.scorer, choices, training)
        sample = p.judging.sample(WORDS_VALIDATION_USERS, 0)
        merged = [found.items for found in p.state.pipeline().recommend(sample.queries, lm_config.candidates)]
        validate = partial(measure_words, lm, sample, merged)
    if not trial["events"]:
        return on_device(lm), {"events": 0}
    items = f"{name} {sorted(trial.items())} {hash_words(p.state)}"
    report = run_training(
        lm, task, training, validate, log=log, held_out=len(p.judging.queries),
        selected_on=p.judging.sha256(), items=items, base=base,
        encoder=texts.encoder.fingerprint, data=p.split.log.fingerprint, folder=folder, on_step=None,
    )  # fmt: skip
    lm.scorer.forget()
    if isinstance(lm, LanguageModel):
        lm.fit_unseen(p.judging)
    return lm, {
        "events": report.events,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "events_per_second": round(report.events_per_second, 1),
        "stopped": report.reason,
        "curve": report.curve,
    }


def settings(config: Config, trial: Mapping[str, Any]) -> Config:
    """The configuration of a trial; another mode of the language model has settings of its own."""
    values, given = config.model_dump(), dict(trial.get("lm", {}))
    if "prompt" in given:
        given["prompt"] = str(HERE / "ablations" / given["prompt"])
    other = given.get("mode", config.lm.mode) != config.lm.mode
    values["lm"] = {"base": config.lm.base, **given} if other else {**values["lm"], **given}
    values["training"] |= trial.get("training", {})
    return Config.of(values)


def lasting(training: TrainingConfig, units: int) -> TrainingConfig:
    """The same for so many items or words."""
    steps = max(1, units // (training.tokens_per_step * training.accumulate))
    return TrainingConfig(**{**training.model_dump(), "minutes": None, "steps": steps})


def judged(lm: LanguageModel, held_out: HeldOut, latest: Latest | None) -> dict[str, float]:
    """Measures of a state of the model."""
    scorer: Any = lm.scorer_of(lm.model)
    if latest is not None:
        scorer = InWords(scorer, latest)
    return measure(scorer, held_out)


def on_device(lm: Any) -> Any:
    """An untrained model where a trained one would be."""
    model = lm.model if isinstance(lm, LanguageModel) else lm.words
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return lm


def run(
    p: Prepared, name: str, trial: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Ranks]]:
    """Train and measure one trial."""
    ranks: dict[str, Ranks] = {}
    if "retriever" in trial:
        return sequence(p, trial)
    lm, training = trained(p, name, trial, folder)
    found: dict[str, Any] = {"training": training}
    merged = [c.items for c in p.state.pipeline().recommend(p.few.queries, max(CANDIDATES))]
    # The blend asks for the merge's first items again.
    once = Remembered(lm)
    for n in CANDIDATES if trial.get("detail") else CANDIDATES[:1]:
        listed = [items[:n] for items in merged]
        begun = time.perf_counter()
        scores = once.score(p.few.queries, listed)
        seconds = time.perf_counter() - begun
        found.setdefault("milliseconds_a_user_of_20", round(seconds * 1000 / len(listed), 2))
        ranks[f"first {n}"] = ranks_among(listed, scores, p.few.targets)
        lm.scorer.forget()
    if isinstance(lm, LanguageModel):
        found["nats"] = nats(lm.scorer, p.asked)
        ranks["alone"] = alone(lm.scorer, p.asked)
        if trial.get("detail"):
            for window in WINDOWS:
                scorer = ItemTokenScorer(lm.model, window, lm.dtype)
                ranks[f"last {window}"] = alone(scorer, p.asked)
        found["blend"] = blended(p, lm, lm.scorer, p.asked, "history")
        if trial.get("typed"):
            typed = known_item_queries(p.asked, p.state.texts.lines, 1)
            ranks["typed"] = alone(lm.scorer, typed)
            found["blend_typed"] = blended(p, lm, lm.scorer, typed, "query")
    else:
        found["blend"] = blended(p, lm, once, p.few, "history")
    return found, ranks


def sequence(p: Prepared, trial: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Ranks]]:
    """A sequence model of the usual kind, trained until validation says stop."""
    kind = trial["retriever"]
    settings = getattr(p.config.retrieval, kind).model_copy(update={"patience": 10})
    sample = p.judging.sample(VALIDATION_USERS, 0)
    begun = time.perf_counter()
    model = SequenceRetriever.fit(
        kind, p.split.train, p.state.texts.vectors, settings, validate=lambda model: quality(model, sample)
    )
    training = {"seconds": round(time.perf_counter() - begun, 1)}
    return {"training": training}, {"alone": alone(model, p.asked)}


def alone(scorer: Any, held_out: HeldOut) -> Ranks:
    """Rank of each target in the model's own first hundred."""
    return ranks_in((hits.items for hits in scorer.retrieve(held_out.queries, 100)), held_out.targets)


def nats(scorer: ItemTokenScorer, held_out: HeldOut) -> float:
    """Nats of the held-out item over the catalogue."""
    own: list[Codes] = [held_out.targets[i : i + 1] for i in range(len(held_out.targets))]
    scores: list[Floats] = scorer.score(held_out.queries, own)
    return float(-np.mean([values[0] for values in scores]))


def blended(p: Prepared, lm: TunedModel, scorer: Scorer, held_out: HeldOut, kind: str) -> dict[str, float]:
    """What the model adds to the merge in NDCG@10, its weight cross-fitted over users."""
    recipe, retrievers = p.state.recipe, p.state.retrievers
    weights = (recipe.history if kind == "history" else recipe.query).with_lm(0.0)
    used = [name for name in recipe.settings if weights.ever_uses(name)]
    depth = p.config.retrieval.depth
    hits = proposed(used, retrievers, held_out, depth)
    own = lm.proposes and kind == "history"
    best = cast(Any, lm.scorer).retrieve(held_out.queries, depth) if own else None
    features = Features.with_lm(hits, best, scorer, held_out, weights, lm.scored)
    log: list[dict[str, Any]] = []
    weight = lm_weight(features, weights, log, kind, 0)
    merge = summary(features.of_targets(weights), SHOWN)["ndcg@10"]
    return {
        "merge": merge,
        "gain": log[0]["gain"],
        "standard_error": log[0]["standard_error"],
        "weight": weight,
    }


def described(path: Path, events: int, words: int) -> dict[str, dict[str, Any]]:
    """Trials by name, each with the number of events that it learns from."""
    with path.open("rb") as opened:
        stored: dict[str, dict[str, Any]] = tomllib.load(opened)
    for name, trial in stored.items():
        known = ("lm", "training", "weights", "full", "texts", "events", "against", "detail", "typed")
        unknown = set(trial) - {*known, "negatives", "retriever", "says", "tokens", "latest"}
        if unknown:
            raise ConfigError(f"{path}, trial {name}: unknown {', '.join(sorted(unknown))}")
        lm = trial.get("lm", {})
        reads_words = lm.get("mode", "item_tokens") != "item_tokens"
        if trial.get("latest") and (reads_words or not lm.get("wishes") or {"typed", "detail"} & set(trial)):
            raise ConfigError(
                f"{path}, trial {name}: latest is for item_tokens with lm.wishes, without typed and detail"
            )
        trial["events"] = int(trial.get("events", 1) * (words if reads_words else events))
    return stored


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--trials", type=Path, default=HERE / "ablations" / "trials.toml")
    parser.add_argument("--only", nargs="+", help="names of trials")
    parser.add_argument("--events", type=int, default=500_000, help="that an item_tokens trial learns from")
    parser.add_argument(
        "--words", type=int, default=20_000, help="that a trial of the word modes learns from"
    )
    parser.add_argument("--users", type=int, default=5000, help="reported users, at most")
    parser.add_argument("--few", type=int, default=500, help="of these, users whose candidates are ordered")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th trial, from the K-th")
    parser.add_argument("--gather", action="store_true", help="write the results file and end")
    parser.add_argument("--drop", nargs="+", default=[], help="published trials that --gather leaves out")
    parser.add_argument("--name", help="of the results file; that of the data if not given")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    given = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    name = args.name or given.name
    trials = described(args.trials, args.events, args.words)
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    if args.gather:
        gather(folder, trials, args.out, name, dropped=args.drop)
        return
    k, n = map(int, args.part.split("/"))
    config = Config.of(args.config)
    p = prepare(given, config, args.users, args.few)
    wanted = [t for t in trials if not args.only or t in args.only][k - 1 :: n]
    for trial in wanted:
        path = folder / f"{trial}.json"
        whose = {
            "users": {"asked": len(p.asked.targets), "few": len(p.few.targets)},
            "users_sha256": p.asked.sha256(),
            "merge_sha256": hash_words(p.state),
            "log_sha256": p.split.log.fingerprint,
            "settings": settings(config, trials[trial]).model_dump(mode="json", include={"lm", "training"}),
        }
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            same = description(there["trial"]) == description(trials[trial])
            if same and {k: there.get(k) for k in whose} == whose:
                continue
        begun = time.perf_counter()
        found, ranks = run(p, trial, trials[trial], folder / f"{trial}.run")
        measures = {kind: summary(r, SHOWN) for kind, r in ranks.items()}
        columns: dict[str, Any] = {kind: r.astype(np.int32) for kind, r in ranks.items()}
        np.savez_compressed(folder / f"{trial}.npz", **columns)
        write(
            path,
            json.dumps(
                {
                    "says": trials[trial].get("says", ""),
                    "trial": description(trials[trial]),
                    **whose,
                    **found,
                    "systems": measures,
                    "seconds": round(time.perf_counter() - begun, 1),
                    "environment": environment(),
                },
                indent=1,
            ),
        )
        console.print(trial, {k: round(m["ndcg@10"], 4) for k, m in measures.items()}, found.get("blend"))


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
