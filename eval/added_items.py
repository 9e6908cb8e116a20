"""Items that are added after training: how a model ranks them, against one that learned their events.

    python eval/added_items.py --data ../shared/data/ml-latest-small \
        --config eval/configs/ml-latest-small.toml

A seeded share of the items is taken out of catalogue and log. One model learns what is left, and its
catalogue then grows by them, as that of a shop does; another learns everything. Both order the same lists of
each validation user, ten of the added items and ten of the others, all unseen, the chosen one among them.
In which share of the pairs of an added and another item, without the chosen one, is the added one ahead? In
half of them where neither kind is preferred.
Users who choose the state that is kept are not reported. Writes eval/results/NAME-added-items.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ablations import lasting
from gathering import write
from numpy.typing import NDArray
from rich.console import Console

from llmrec.assembly import grown_texts, read_catalog, read_log
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.errors import DataError, LLMRecError
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.protocol import make_split
from llmrec.evaluation.split import Part
from llmrec.families import Texts, TrainingLog
from llmrec.fetch import resolve
from llmrec.language_model import TunedModel
from llmrec.lm_training import ranks_among, train_language_model, train_words_model
from llmrec.metrics import Comparison, compare_values, holm, per_user
from llmrec.offline import core_of
from llmrec.protocols import Codes
from llmrec.recipe import HeldOut
from llmrec.score.config import ItemTokensConfig, TrainingConfig, WordsConfig
from llmrec.selection import choose_recipe
from llmrec.stages import cached_texts
from llmrec.state import State

HERE = Path(__file__).resolve().parent
MODES = ("item_tokens", "likelihood", "yes_no", "letters")
LISTED = 10
"""Items of either kind in a list."""

Values = NDArray[np.float64]
console = Console(stderr=True)


@dataclass(frozen=True)
class Side:
    """What one of the two models learns from."""

    state: State
    log: TrainingLog
    judging: HeldOut


@dataclass(frozen=True)
class Prepared:
    """Both sides, and who is asked: codes below `known` are the items that were there first.

    `texts` are those of the whole catalogue as the first side has them once the items are added: a text
    encoder that is fitted to a catalogue stays the one of the first.
    """

    before: Side
    after: Side
    texts: Texts
    known: int
    asked: HeldOut
    lists: Sequence[Codes]


def of_codes(log: TrainingLog, number: Codes, known: int) -> TrainingLog:
    """The log in the codes of another catalogue, of the items below `known`."""
    histories = [number[history] for history in log.histories]
    kept = [history < known for history in histories]

    def only(columns: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]] | None:
        return None if columns is None else [c[keep] for c, keep in zip(columns, kept, strict=True)]

    short = [history[keep] for history, keep in zip(histories, kept, strict=True)]
    return TrainingLog(short, only(log.weights), only(log.stamps))


def held_out_of(part: Part, number: Codes, known: int) -> HeldOut:
    """Held-out users whose target is below `known`, with that part of their histories."""
    rows = np.flatnonzero(number[part.targets] < known)
    histories = [number[part.histories[row]] for row in rows.tolist()]
    short = [history[history < known] for history in histories]
    return Part(part.users[rows], short, number[part.targets[rows]], part.events[rows]).held_out(
        np.ones(known, dtype=np.bool_), exclude_seen=True
    )


def side(catalog: Catalog, texts: Texts, log: TrainingLog, judging: HeldOut, config: Config) -> Side:
    """Retrievers of one side; their recipe is chosen on its judging users."""
    recipe, retrievers = choose_recipe(log, judging, texts, config.retrieval)
    state = State(catalog, texts, recipe, retrievers, repeats=False, depth=config.retrieval.depth)
    return Side(state, log, judging)


def drawn_lists(held_out: HeldOut, items: int, known: int, seed: int) -> list[Codes]:
    """For each user `LISTED` added and as many other items that were not seen, the target among them."""
    rng, lists = np.random.default_rng(seed), []
    for query, target in zip(held_out.queries, held_out.targets, strict=True):
        unseen = np.setdiff1d(np.arange(items), [*query.history, target])
        kinds = []
        for added in (True, False):
            own = [target] if (target >= known) == added else []
            others = rng.permutation(unseen[(unseen >= known) == added])[: LISTED - len(own)]
            if len(others) + len(own) < LISTED:
                raise DataError(f"a user has seen all but {len(others) + len(own)} items of one kind")
            kinds.append(np.append(others, own))
        lists.append(rng.permutation(np.concatenate(kinds)).astype(np.int32))
    return lists


def prepare(folder: Path, config: Config, share: float, users: int, seed: int) -> Prepared:
    """Read and split, take the items out, and fit the retrievers of both sides."""
    catalog = read_catalog(folder / "items.parquet", config.data)
    log = read_log(folder / "events.parquet", catalog, config.data)
    if config.protocol.core is not None:
        catalog, log = core_of(catalog, log, config.protocol.core)
    split = make_split(log, config.protocol)
    if config.retrieval.has_repeats(log.select(split.fitted).repeat_share()):
        raise DataError(
            "items come back in this log, and lists of unseen ones would not hold what was chosen"
        )
    out = np.zeros(len(catalog), dtype=np.bool_)
    count = max(1, round(share * len(catalog)))
    out[np.random.default_rng(seed).choice(len(catalog), count, replace=False)] = True
    order = np.argsort(out, kind="stable").astype(np.int32)
    known = len(catalog) - count
    first, grown = catalog.only(order[:known]), catalog.only(order)
    number = np.argsort(order).astype(np.int32)
    cache = StageCache(HERE.parent / "runs" / folder.name)
    few, texts = (cached_texts(c, config, cache, console.print) for c in (first, grown))
    everyone = split.validation
    judges = np.arange(len(everyone)) % 4 == 0
    judging, others = (everyone.take(np.flatnonzero(rows)) for rows in (judges, ~judges))
    before, after = (
        side(
            catalogue,
            words,
            of_codes(split.training, number, limit),
            held_out_of(judging, number, limit),
            config,
        )
        for catalogue, words, limit in ((first, few, known), (grown, texts, len(grown)))
    )
    asked = held_out_of(others, number, len(grown)).sample(users, seed)
    chose = int((asked.targets >= known).sum())
    if not 0 < chose < len(asked.targets):
        raise DataError(f"of {len(asked.targets)} users {chose} chose an added item: nothing to compare")
    return Prepared(
        before,
        after,
        grown_texts(few, grown.lines()),
        known,
        asked,
        drawn_lists(asked, len(grown), known, seed),
    )


def trained(own: Side, shape: ItemTokensConfig | WordsConfig, training: TrainingConfig) -> TunedModel:
    """The model of a mode, of one side."""
    base = resolve(shape.base)
    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"data": "", "folder": Path(folder)}
        if isinstance(shape, ItemTokensConfig):
            lm, _ = train_language_model(
                own.log, own.judging, own.state.texts, base, shape, training, **where
            )
            lm.fit_unseen(own.judging)
            return lm
        return train_words_model(own.state, own.log, own.judging, base, shape, training, **where)[0]


@dataclass(frozen=True)
class Measured:
    """What a model does with the lists: one value a user, and its own first ten where it searches."""

    ahead: Values
    ranks: NDArray[np.int64]
    first_ten: float | None


def measured(p: Prepared, lm: TunedModel) -> Measured:
    """How often added items are ahead, where the target is, and the added share of the first ten of all."""
    scorer: Any = lm.scorer
    scores = scorer.score(p.asked.queries, p.lists)
    ahead = np.empty(len(scores))
    for row, (items, own, target) in enumerate(zip(p.lists, scores, p.asked.targets, strict=True)):
        added, other = items >= p.known, items < p.known
        apart = own[added & (items != target), None] - own[other & (items != target)]
        ahead[row] = (apart > 0).mean() + (apart == 0).mean() / 2
    share = None
    if hasattr(scorer, "retrieve"):
        hits = scorer.retrieve(p.asked.queries, 10)
        share = float(np.mean([(found.items >= p.known).mean() for found in hits if len(found.items)]))
    return Measured(ahead, ranks_among(p.lists, scores, p.asked.targets), share)


def compared(
    p: Prepared, mode: str, grown: Measured, retrained: Measured
) -> tuple[dict[str, Any], list[Comparison]]:
    """Both models and their differences, of all users and of those who chose an added item."""
    chose = p.asked.targets >= p.known
    ndcg = [per_user(m.ranks, "ndcg@10") for m in (grown, retrained)]
    values = {
        "ahead": (grown.ahead, retrained.ahead),
        "ndcg@10 of an added item": (ndcg[0][chose], ndcg[1][chose]),
        "ndcg@10 of another": (ndcg[0][~chose], ndcg[1][~chose]),
    }
    found = {
        "grown": {name: float(a.mean()) for name, (a, _) in values.items()} | {"first ten": grown.first_ten},
        "retrained": {name: float(b.mean()) for name, (_, b) in values.items()}
        | {"first ten": retrained.first_ten},
    }
    pair = f"{mode}, grown", f"{mode}, retrained"
    return found, [compare_values(a - b, *pair, name) for name, (a, b) in values.items()]


def run_mode(p: Prepared, config: Config, mode: str, units: int) -> tuple[dict[str, Any], list[Comparison]]:
    """Train both models of a mode and compare them; what is configured for another mode is left out."""
    shape: ItemTokensConfig | WordsConfig
    if config.lm.mode == mode:
        shape = config.lm
    elif mode == "item_tokens":
        shape = ItemTokensConfig(base=config.lm.base)
    else:
        shape = WordsConfig(mode=mode, base=config.lm.base)
    training = lasting(config.training, units)
    begun = time.perf_counter()
    grown = measured(p, trained(p.before, shape, training).grown(p.texts))
    found, differences = compared(p, mode, grown, measured(p, trained(p.after, shape, training)))
    found |= {"lm": shape.model_dump(), "training": training.model_dump()}
    return {**found, "seconds": round(time.perf_counter() - begun, 1)}, differences


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--share", type=float, default=0.2, help="of the items that are added later")
    parser.add_argument("--users", type=int, default=300, help="reported users, at most")
    parser.add_argument("--events", type=int, default=200_000, help="that item_tokens learns from")
    parser.add_argument("--words", type=int, default=120_000, help="tokens that the others learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    given = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    config = Config.of(args.config)
    p = prepare(given, config, args.share, args.users, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{given.name}-added-items.json"
    whose = {
        "data": given.name,
        "items": len(p.after.state.catalog),
        "added": len(p.after.state.catalog) - p.known,
        "users": len(p.asked.targets),
        "who chose an added item": int((p.asked.targets >= p.known).sum()),
        "users_sha256": p.asked.sha256(),
        "log_sha256": p.after.log.sha256(),
        "seed": args.seed,
    }
    modes: dict[str, Any] = {}
    differences: list[Comparison] = []
    if path.is_file():
        # Modes of an earlier run on the same users.
        there = json.loads(path.read_text(encoding="utf-8"))
        if {k: there.get(k) for k in whose} == whose:
            modes = {mode: own for mode, own in there["modes"].items() if mode not in args.modes}
            rows = [Comparison.of(row) for row in there["comparisons"]]
            differences = [c for c in rows if c.a.split(",")[0] in modes]
    for mode in args.modes:
        units = args.events if mode == "item_tokens" else args.words
        modes[mode], new = run_mode(p, config, mode, units)
        differences = holm([*differences, *new])
        result = {
            "command": " ".join(["python eval/added_items.py", *(sys.argv[1:] if argv is None else argv)]),
            **whose,
            "modes": modes,
            "comparisons": [c.as_dict() for c in differences],
            "environment": environment(),
        }
        write(path, json.dumps(result, indent=1))
        console.print(mode, modes[mode]["grown"], modes[mode]["retrained"])


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
