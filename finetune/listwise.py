"""Teach a language model that reads words which of some hard candidates came next: from log to adapter.

    python finetune/listwise.py --items items.parquet --events events.parquet --out runs/listwise \
        --config finetune/configs/listwise.toml --mode yes_no

Every step stands here, to be copied and changed; `llmrec finetune` with the same configuration does them for
a recommender that is served. `yes_no` and `letters` learn from lists of candidates, `likelihood` and
`generate` from the lines of the items. Interrupt it and give the same command again: it goes on from its
checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from llmrec import LLMRecError
from llmrec.assembly import encode, read_catalog, read_log
from llmrec.card import hash_ids
from llmrec.cli_show import say, training_bar
from llmrec.config import Config
from llmrec.errors import ConfigError
from llmrec.evaluation.split import tail
from llmrec.fetch import resolve
from llmrec.lm_training import hash_words, measure_words, ranks_among, run_training
from llmrec.metrics import compare
from llmrec.mining import mined_choices
from llmrec.persistence import keep_log
from llmrec.processes import Processes
from llmrec.recipe import ranks_in
from llmrec.score.config import WORDS, WordsConfig
from llmrec.score.likelihood import LikelihoodScorer
from llmrec.score.line_tasks import lines_task
from llmrec.score.tasks import ListwiseTask, Task
from llmrec.score.wordwise import VocabularyScorer
from llmrec.selection import choose_recipe
from llmrec.state import State
from llmrec.word_model import WordLanguageModel

CONFIG = Path(__file__).parent / "configs" / "listwise.toml"


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", required=True, help="items: parquet, csv(.gz), jsonl, .item")
    parser.add_argument("--events", required=True, help="events: parquet, csv(.gz), jsonl, .inter")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run and the adapter")
    parser.add_argument("--config", default=CONFIG, help="TOML file with lm.mode; configs/listwise.toml")
    parser.add_argument("--mode", choices=WORDS, help="the configuration's otherwise")
    parser.add_argument("--minutes", type=float, help="time to train; the configuration's otherwise")
    args = parser.parse_args(argv)
    config = Config.of(args.config)
    if not isinstance(config.lm, WordsConfig):
        raise ConfigError(
            f"{args.config} has no lm.mode of {', '.join(WORDS)}; finetune/lora.py trains item_tokens"
        )
    config = config.with_flags(lm={"mode": args.mode})
    shape, search, training = config.lm, config.retrieval, config.training.lasting(args.minutes)
    team = Processes()
    tell = say if team.main else lambda stage: None

    # 1. Data. The last event of each user is held out: nothing below is fitted on it.
    catalog = read_catalog(args.items, config.data)
    log = read_log(args.events, catalog, config.data)
    texts = encode(catalog.lines(), config, tell)
    train, part = tail(log)
    repeats = search.has_repeats(log.repeat_share())
    held_out = part.sample(search.search_users, search.seed).held_out(catalog.active, not repeats)

    # 2. Retrievers, which propose what the model is to tell apart.
    recipe, retrievers = choose_recipe(train, held_out, texts, search.for_repeats(repeats), tell)
    state = State(catalog, texts, recipe, retrievers, repeats, search.depth)

    # 3. What is learned. To mine, retrievers are fitted once more, on the first part of each history alone,
    # and asked for the rest: candidates of retrievers that know the answer would be too easy.
    base = resolve(shape.base, allow_hub=config.allow_hub)
    lm = WordLanguageModel.new(shape, base, texts.lines, train.counts(len(catalog)), training.seed)
    task: Task[Any]
    if isinstance(lm.scorer, LikelihoodScorer | VocabularyScorer):
        task = lines_task(lm.scorer, train.source(), training, lm.typed, shape.wishes)
    else:
        mined = shape.listed, shape.mined, training.seed
        choices = mined_choices(state, train, *mined, wishes=shape.wishes)
        task = ListwiseTask(lm.scorer, choices, training)
        tell(
            f"mined {len(choices):,} lists of {np.mean([len(c.candidates) for c in choices]):.1f} candidates"
        )

    # 4. What judges: the model's order of the merge's first candidates, for held-out users.
    judges = held_out.sample(shape.judged, training.seed)
    merged = [found.items for found in state.pipeline().recommend(judges.queries, shape.candidates)]
    if team.main:
        say(f"untrained: {shown(measure_words(lm, judges, merged))}")

    # 5. Train.
    with training_bar() if team.main else nullcontext() as on_step:
        report = run_training(
            lm,
            task,
            training,
            lambda: measure_words(lm, judges, merged),
            log=train,
            held_out=len(judges.queries),
            selected_on=judges.sha256(),
            items=hash_words(state),
            base=base,
            encoder=texts.encoder.fingerprint,
            data=log.fingerprint,
            folder=args.out / "training",
            on_step=on_step,
        )

    # 6. Does it pay? Its order of the same candidates against that of the merge, then the adapter.
    if team.main:
        lm.scorer.forget()
        scores = lm.scorer.score(judges.queries, merged)
        ranks = {
            "lm": ranks_among(merged, scores, judges.targets),
            "merge": ranks_in(merged, judges.targets),
        }
        print(report)
        print(f"{compare(ranks, 'lm', 'merge')} (held-out users that chose the state)")
        # Who loads it over other items is refused.
        data = {**lm.card.training["data"], "items_sha256": hash_ids(catalog.ids)}
        lm.card = lm.card.noting(data=data)
        print(save(lm, args.out))
    team.end()


def shown(measures: dict[str, float]) -> str:
    """Measures in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items())


def save(lm: WordLanguageModel, out: Path) -> Path:
    """Write adapter, card and log whole, and return their folder."""
    draft, adapter = out / ".adapter", out / "adapter"
    shutil.rmtree(draft, ignore_errors=True)
    lm.save(draft)
    keep_log([out / "training"], draft)
    shutil.rmtree(adapter, ignore_errors=True)
    return draft.rename(adapter)


if __name__ == "__main__":
    try:
        main()
    except (LLMRecError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
