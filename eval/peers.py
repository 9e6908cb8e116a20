"""Other libraries and ours on one split, judged by one evaluator on the same validation users.

    python eval/peers.py --data ../shared/data/ml-latest-small --config eval/configs/ml-latest-small.toml

Each library is installed into a virtual environment of its own, under runs/peers, and run in a process of its
own. Everything is trained on the training part. Held-out events of some users choose what is chosen and train
LightGBM; the others are asked. Full ranking, seen items excluded. Rerankers order the first candidates of our
merge. Answers are kept in runs/peers/NAME, and with the results, eval/results/NAME-peers.json and the ranks
beside it: what is there for the same users and merge is not made again, whatever else has changed. Remove
the answers of a system whose settings here have.

What is not the same for all: what learns by the clock is given --minutes, our sequence models as long as
Cornac's took or until the judging users stop them, as they stop RecTools' SASRec; Cornac has fixed epochs;
ALS and the CrossEncoder have the settings that stand here. The CrossEncoder learns from four negatives of a
choice, `yes_no` from the whole list, and its state that is best where it is judged is kept. Seconds are of a
system's own training: rerankers and blends need the merge besides. The defaults of ours were chosen on
validation events of amazon-beauty, so there the comparison is an upper estimate.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from gathering import write
from own_environment import python_in
from peer_cross import CrossScorer
from peer_split import write_split

from llmrec.assembly import read_catalog, read_log
from llmrec.blending import lm_weight
from llmrec.candidates import discount, gather
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.errors import ConfigError
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.protocol import make_split
from llmrec.evaluation.split import Split
from llmrec.features import Features
from llmrec.fetch import resolve
from llmrec.language_model import CachingScorer
from llmrec.lm_training import ranks_among, train_language_model, train_words_model
from llmrec.metrics import Comparison, Ranks, compare_all, summary
from llmrec.mining import mined_choices
from llmrec.offline import core_of
from llmrec.protocols import Hits
from llmrec.recipe import HeldOut, ranks_in, roles
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.sequence import SequenceRetriever
from llmrec.score.config import ItemTokensConfig, WordsConfig
from llmrec.search import quality
from llmrec.selection import choose_recipe
from llmrec.stages import cached_texts
from llmrec.state import State

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
TORCH = "torch==2.13.0"
CORNAC, RECTOOLS = ("cornac==3.0.1", TORCH), ("rectools[torch,catboost]==0.19.0", TORCH)
IMPLICIT, LIGHTGBM = ("implicit==0.7.3",), ("lightgbm==4.7.0",)
EPOCHS = {"gru4rec": 10, "sasrec": 20}
FIRST = 20
"""Candidates that a language model reads in words."""

WINDOW = 10
"""Items of the history that it reads beside them; a CrossEncoder reads them again for each candidate."""


@dataclass(frozen=True)
class Prepared:
    """Data, our retrievers, and who judges and who is asked."""

    config: Config
    split: Split
    state: State
    judging: HeldOut
    asked: HeldOut
    folder: Path
    published: Path
    minutes: float
    fitting: float

    @property
    def data(self) -> str:
        """Name of the data."""
        return self.folder.name

    @property
    def key(self) -> str:
        """Says of which users, and of which merge, an answer is."""
        recipe = self.state.recipe.as_dict()
        # Nobody types words here, so the weights for them decide nothing.
        merge = json.dumps([self.state.texts.lines, recipe["settings"], recipe["history"]])
        return " ".join([self.asked.sha256(), self.judging.sha256(), sha256(merge.encode()).hexdigest()])

    def timed(self, name: str) -> str:
        """Name of a system that learned for so many minutes."""
        return f"{name} ({self.minutes:g} min)"


@dataclass(frozen=True)
class Found:
    """What a system answers: the rank of each target, seconds of training, and what else there is to say."""

    ranks: Ranks
    seconds: float
    notes: Mapping[str, Any]


def prepare(data: Path, config: Config, users: int, minutes: float, out: Path) -> Prepared:
    """Read, split, choose our recipe on the judging users, and write the split for the others."""
    if config.protocol.split != "leave-last":
        raise ConfigError(
            "other libraries know only users that they were trained on: split must be leave-last"
        )
    catalog = read_catalog(data / "items.parquet", config.data)
    log = read_log(data / "events.parquet", catalog, config.data)
    if config.protocol.core is not None:
        catalog, log = core_of(catalog, log, config.protocol.core)
    split = make_split(log, config.protocol)
    texts = cached_texts(catalog, config, StageCache(RUNS / data.name), print)
    everyone = split.validation
    half = np.random.default_rng(0).permutation(len(everyone))
    cut = min(users, len(everyone) // 2)
    asked, judging = everyone.take(np.sort(half[:cut])), everyone.take(np.sort(half[cut:]))
    judging = judging.sample(config.retrieval.search_users, 0)
    judges = judging.held_out(catalog.active, exclude_seen=True)
    begun = time.perf_counter()
    recipe, retrievers = choose_recipe(split.training, judges, texts, config.retrieval, print)
    fitting = time.perf_counter() - begun
    state = State(catalog, texts, recipe, retrievers, repeats=False, depth=config.retrieval.depth)
    folder = RUNS / "peers" / data.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [user for user, history in enumerate(split.train) if len(history)]
    row_of = {user: row for row, user in enumerate(rows)}
    asked_rows, judging_rows = (
        np.array([row_of[user] for user in part.users.tolist()]) for part in (asked, judging)
    )
    write_split(folder, [split.train[user] for user in rows], asked_rows, judging_rows, judges.targets)
    held_out = asked.held_out(catalog.active, exclude_seen=True)
    published = out / f"{data.name}-peers.json"
    return Prepared(config, split, state, judges, held_out, folder, published, minutes, fitting)


def python_of(packages: tuple[str, ...], name: str) -> Path:
    """Python of a virtual environment with these packages; made if it is not there."""
    return python_in(RUNS / "peers" / name, packages)


def worked(p: Prepared, packages: tuple[str, ...], library: str, name: str, *more: str) -> dict[str, Any]:
    """What a worker of another library wrote."""
    worker = str(HERE / f"peer_{library}.py")
    subprocess.run(
        [str(python_of(packages, library)), worker, str(p.folder), f"worker {name}", *more], check=True
    )
    return dict(np.load(p.folder / f"worker {name}.npz"))


def listed(p: Prepared, packages: tuple[str, ...], library: str, name: str, *more: str) -> Found:
    """Lists of another library."""
    found = worked(p, packages, library, name, *more)
    return Found(ranks_in(found["lists"], p.asked.targets), float(found["seconds"]), {})


def sequence(p: Prepared, kind: Any, text: bool) -> Found:
    """One of our sequence models, for as long as Cornac's took at most."""
    given = getattr(p.config.retrieval, kind)
    rival = kept(p, f"cornac {kind}")
    if rival is None:
        raise ConfigError(f"ours is given the time that cornac {kind} took: run that first")
    seconds = rival.seconds
    # What few users say of one epoch is noise.
    limit = {"minutes": max(seconds / 60, 0.05), "text": text, "patience": 10}
    begun = time.perf_counter()
    model = SequenceRetriever.fit(
        kind,
        p.split.train,
        p.state.texts.vectors,
        given.model_copy(update=limit),
        validate=lambda model: quality(model, p.judging),
    )
    seconds = time.perf_counter() - begun
    hits = model.retrieve(p.asked.queries, 100)
    return Found(ranks_in((h.items for h in hits), p.asked.targets), seconds, {})


def merged(p: Prepared) -> Found:
    """Our merge: the default recipe without a language model."""
    found = p.state.pipeline().recommend(p.asked.queries, 100)
    return Found(ranks_in((c.items for c in found), p.asked.targets), p.fitting, {})


def hits_of(p: Prepared, held_out: HeldOut) -> dict[str, Sequence[Hits]]:
    """What our retrievers propose."""
    used = [name for name in p.state.recipe.settings if p.state.recipe.history.ever_uses(name)]
    return {n: p.state.retrievers[n].retrieve(held_out.queries, p.state.depth) for n in used}


def boosted(p: Prepared) -> Found:
    """LambdaMART on all that our retrievers propose: scores, ranks, popularity, length of history."""

    def rows(held_out: HeldOut) -> tuple[Features, np.ndarray]:
        hits = hits_of(p, held_out)
        features = Features.of(hits, held_out)
        items = [gather({n: found[i] for n, found in hits.items()})[0] for i in range(len(held_out.targets))]
        popularity = p.state.retrievers["popularity"]
        assert isinstance(popularity, PopularityRetriever)
        sizes = [len(own) for own in items]
        more = [
            features.total(p.state.recipe.history),
            np.log(popularity.shares()[np.concatenate(items)]),
            np.repeat(np.log1p(features.lengths), sizes),
        ]
        x = np.concatenate([features.scores, discount(features.ranks), np.stack(more, axis=1)], axis=1)
        return features, x.astype(np.float32)

    judging, x = rows(p.judging)
    asked, wanted = rows(p.asked)
    label = np.zeros(len(x), np.int32)
    label[judging.truth[judging.truth >= 0]] = 1
    sizes = np.diff(np.append(judging.starts, len(x)))
    np.savez(p.folder / "features.npz", x=x, label=label, sizes=sizes, asked=wanted)
    found = worked(p, LIGHTGBM, "lightgbm", "boosted")
    ranks = asked.targets_in(found["scores"].astype(np.float32))
    return Found(ranks, float(found["seconds"]), {"trees": int(found["trees"])})


def reranked(p: Prepared, scorer: CachingScorer, seconds: float, **notes: Any) -> Found:
    """A language model's own order of the merge's first candidates."""
    listed = [found.items for found in p.state.pipeline().recommend(p.asked.queries, FIRST)]
    scorer.forget()
    begun = time.perf_counter()
    scores = scorer.score(p.asked.queries, listed)
    asking = (time.perf_counter() - begun) / len(listed)
    ranks = ranks_among(listed, scores, p.asked.targets)
    return Found(ranks, seconds, {**notes, "milliseconds_a_user": round(1000 * asking, 1)})


def item_tokens(p: Prepared) -> dict[str, Found]:
    """Our language model that reads an item as a vector: alone, and in the blend."""
    base, training = resolve(p.config.lm.base), p.config.training.lasting(p.minutes)
    shape = ItemTokensConfig(base=p.config.lm.base)
    # To who chose the state it looks better than it is.
    choosing, judging = roles(p.judging, training.seed)
    with tempfile.TemporaryDirectory() as temporary:
        lm, report = train_language_model(
            p.split.training,
            choosing,
            p.state.texts,
            base,
            shape,
            training,
            data=p.split.log.fingerprint,
            folder=Path(temporary),
        )
    lm.fit_unseen(choosing)
    plain = p.state.recipe.history.with_lm(0.0)

    def features(held_out: HeldOut) -> Features:
        proposed = lm.scorer.retrieve(held_out.queries, p.state.depth)
        return Features.with_lm(hits_of(p, held_out), proposed, lm.scorer, held_out, plain)

    weight = lm_weight(features(judging), plain, [], "history", 0)
    blend = features(p.asked).of_targets(plain.with_lm(weight))
    notes = {"events": report.events}
    alone = ranks_in((h.items for h in lm.scorer.retrieve(p.asked.queries, 100)), p.asked.targets)
    return {
        p.timed("item_tokens"): Found(alone, report.seconds, notes),
        p.timed(f"item_tokens on the merge's first {FIRST}"): reranked(p, lm.scorer, report.seconds, **notes),
        p.timed("blend with item_tokens"): Found(blend, report.seconds, {**notes, "weight": weight}),
    }


def yes_no(p: Prepared) -> Found:
    """Our language model that reads the candidates in words, all in one forward."""
    shape = WordsConfig(mode="yes_no", base=p.config.lm.base, window=WINDOW)
    training = p.config.training.lasting(p.minutes).model_copy(update={"tokens_per_step": 1200})
    with tempfile.TemporaryDirectory() as temporary:
        lm, report = train_words_model(
            p.state,
            p.split.training,
            p.judging,
            resolve(shape.base),
            shape,
            training,
            data=p.split.log.fingerprint,
            folder=Path(temporary),
        )
    return reranked(p, lm.scorer, report.seconds, choices=report.events)


def crossed(p: Prepared) -> Found:
    """A CrossEncoder over the same base and prompt, trained on the same choices for the same minutes."""
    shape = WordsConfig(mode="yes_no", base=p.config.lm.base, window=WINDOW)
    choices = mined_choices(p.state, p.split.training, shape.listed, shape.mined, p.config.training.seed)
    scorer = CrossScorer(resolve(shape.base), p.state.texts.lines, shape)
    key = f"{p.key} {p.minutes:g} {json.dumps(shape.model_dump(), sort_keys=True)}"
    seconds, pairs = scorer.train(choices, p.minutes, p.folder / "crossed", key)
    found = reranked(p, scorer, seconds, pairs=pairs)
    # Of all runs that it took.
    asking = round(1000 * scorer.asking / len(p.asked.queries), 1)
    return replace(found, notes={**found.notes, "milliseconds_a_user": asking})


def kept(p: Prepared, name: str) -> Found | None:
    """What an earlier run found for the same users and merge, here or in the results."""
    path, ranks = p.folder / f"{name}.npz", p.published.with_suffix(".ranks.npz")
    if path.is_file():
        with np.load(path) as there:
            if str(there["key"]) == p.key:
                return Found(there["ranks"], float(there["seconds"]), json.loads(str(there["notes"])))
    if p.published.is_file() and ranks.is_file():
        told = json.loads(p.published.read_text(encoding="utf-8"))
        if told.get("key") == p.key and name in told["systems"]:
            with np.load(ranks) as there:
                return Found(there[name], told["training_seconds"][name], told["notes"].get(name, {}))
    return None


def keep(p: Prepared, name: str, found: Found) -> None:
    """Keep what a system answers."""
    # Under another name than the workers' own files.
    np.savez(
        p.folder / f"{name}.npz",
        ranks=found.ranks,
        seconds=found.seconds,
        notes=json.dumps(dict(found.notes)),
        key=p.key,
    )


Make = Callable[[], Mapping[str, Found] | Found]


def systems(p: Prepared) -> dict[tuple[str, ...], Make]:
    """All systems by the names that they answer for, those first that others depend on."""
    made: dict[tuple[str, ...], Make] = {}
    for kind, epochs in EPOCHS.items():
        name = f"cornac {kind}"
        made[name,] = partial(listed, p, CORNAC, "cornac", name, kind, str(epochs))
        made[kind,] = partial(sequence, p, kind, True)
        made[f"{kind} without texts",] = partial(sequence, p, kind, False)
    for kind in ("sasrec", "two stages"):
        name = f"rectools {kind}"
        made[name,] = partial(listed, p, RECTOOLS, "rectools", name, kind)
    made["implicit als",] = partial(listed, p, IMPLICIT, "implicit", "implicit als")
    made["merge",] = partial(merged, p)
    made["merge, LightGBM on top",] = partial(boosted, p)
    first = f"on the merge's first {FIRST}"
    names = "item_tokens", f"item_tokens {first}", "blend with item_tokens"
    made[tuple(map(p.timed, names))] = partial(item_tokens, p)
    made[p.timed(f"yes_no {first}"),] = partial(yes_no, p)
    made[p.timed(f"CrossEncoder {first}"),] = partial(crossed, p)
    return made


def pairs(p: Prepared) -> list[tuple[str, str]]:
    """Systems that are compared, user by user."""
    others = "rectools sasrec", "rectools two stages", "implicit als"
    first = f"on the merge's first {FIRST}"
    models = "blend with item_tokens", *(f"{name} {first}" for name in ("yes_no", "CrossEncoder"))
    return [
        *((own, f"cornac {kind}") for kind in EPOCHS for own in (kind, f"{kind} without texts")),
        ("sasrec", "rectools sasrec"),
        *(("merge", other) for other in others),
        *((name, "merge") for name in ("merge, LightGBM on top", *map(p.timed, models))),
        (p.timed(f"yes_no {first}"), p.timed(f"CrossEncoder {first}")),
    ]


def publish(p: Prepared, found: Mapping[str, Found]) -> list[Comparison]:
    """Write the results and the ranks beside them, and return the comparisons."""
    ranks = {name: own.ranks for name, own in found.items()}
    compared = compare_all(ranks, [(a, b) for a, b in pairs(p) if a in ranks and b in ranks])
    result = {
        "data": p.data,
        "part": "validation",
        "users": len(p.asked.targets),
        "users_sha256": p.asked.sha256(),
        "judging users": len(p.judging.targets),
        "key": p.key,
        "minutes": p.minutes,
        "epochs of cornac": EPOCHS,
        "systems": {name: summary(own) for name, own in ranks.items()},
        "training_seconds": {name: round(own.seconds, 1) for name, own in found.items()},
        "notes": {name: dict(own.notes) for name, own in found.items() if own.notes},
        "comparisons": [c.as_dict() for c in compared],
        "environment": {**environment(), "peers": [*CORNAC, *RECTOOLS, *IMPLICIT, *LIGHTGBM]},
    }
    p.published.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: own.astype(np.int32) for name, own in ranks.items()})  # type: ignore[arg-type]
    write(p.published.with_suffix(".ranks.npz"), packed.getvalue())
    write(p.published, json.dumps(result, indent=1))
    return compared


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--only", nargs="+", help="words in the names of the systems to run")
    parser.add_argument("--users", type=int, default=1000, help="users asked, at most; the others judge")
    parser.add_argument("--minutes", type=float, default=10.0, help="training of each language model")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    p = prepare(args.data, Config.of(args.config), args.users, args.minutes, args.out)
    about = environment()
    machine = f"{about['machine']}, {about['instructions']}"
    found: dict[str, Found] = {}
    for names, make in systems(p).items():
        there = {name: kept(p, name) for name in names}
        if None not in there.values():
            found |= {name: own for name, own in there.items() if own is not None}
            continue
        if args.only and not any(word in name for word in args.only for name in names):
            continue
        made = make()
        for name, one in made.items() if isinstance(made, Mapping) else [(names[0], made)]:
            # What is kept may be published by another machine.
            own = replace(one, notes={**one.notes, "machine": machine})
            keep(p, name, own)
            found[name] = own
            print(name, {m: round(v, 4) for m, v in summary(own.ranks).items()}, flush=True)
    for comparison in publish(p, found):
        print(comparison)


if __name__ == "__main__":
    main()
