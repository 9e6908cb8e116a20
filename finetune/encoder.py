"""Fine-tune the text encoder on a purchase log, and measure similar items before and after.

    python finetune/encoder.py --items items.parquet --events events.parquet --out encoder/ --minutes 10

It trains on the training part of the configuration's protocol (by default all but the last two events of each
user), so an evaluation by the same protocol is not spoilt: llmrec.json beside the weights says what it was.
Validation judges: items near the one before the target, by text, are searched for the target. Use the result
by its folder: `llmrec fit --encoder encoder/`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from llmrec import LLMRecError
from llmrec.assembly import make_encoder, make_texts, read_catalog, read_log
from llmrec.config import Config
from llmrec.encode.config import EncoderTrainingConfig
from llmrec.encoder_training import finetune_encoder
from llmrec.environment import environment
from llmrec.evaluation.protocol import make_split
from llmrec.fetch import resolve
from llmrec.metrics import Ranks, compare_all, summary
from llmrec.offline import core_of
from llmrec.recipe import HeldOut, ranks_in
from llmrec.retrieve.dense import NearestConfig, NearestRetriever

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", required=True, help="items: parquet, csv(.gz), jsonl, .item")
    parser.add_argument("--events", required=True, help="events: parquet, csv(.gz), jsonl, .inter")
    parser.add_argument("--out", required=True, type=Path, help="folder of the tuned encoder; a new one")
    parser.add_argument("--config", help="TOML file: data, encoder, encoder.training, protocol")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, help="steps; without --minutes there is no other end")
    parser.add_argument(
        "--lora", action="store_true", default=None, help="LoRA matrices, merged, instead of all weights"
    )
    parser.add_argument("--users", type=int, default=2000, help="held-out users that judge")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent} for --json")

    # 1. Data; neither validation nor test events are trained on.
    config = Config.of(args.config)
    catalog = read_catalog(args.items, config.data)
    log = read_log(args.events, catalog, config.data)
    if config.protocol.core is not None:
        catalog, log = core_of(catalog, log, config.protocol.core)
    split = make_split(log, config.protocol)
    exclude_seen = not config.retrieval.has_repeats(log.select(split.fitted).repeat_share())
    held_out = split.validation.sample(args.users, 0).held_out(catalog.active, exclude_seen)

    # 2. Train.
    flags = {"minutes": args.minutes, "steps": args.steps, "lora": args.lora}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = EncoderTrainingConfig(**{**config.encoder.training.model_dump(exclude_unset=True), **given})

    def on_step(step: int, done: float, loss: float) -> None:
        if step % 20 == 0:
            console.print(f"{done:5.0%}  step {step}  loss {loss:.3f}")

    base = resolve(config.encoder.name, allow_hub=config.allow_hub)
    report = finetune_encoder(split.train, catalog.lines(), base, args.out, settings, on_step)
    print(report)

    # 3. Similar items before and after, by what was chosen next.
    ranks = {}
    for name, folder in (("before", base), ("after", args.out)):
        encoder = make_encoder(config.with_flags(encoder={"name": str(folder)}), [])
        texts = make_texts(catalog.lines(), encoder)
        similar = NearestRetriever(texts.vectors, texts.index, NearestConfig(last=1))
        ranks[name] = ranks_of(similar, held_out)
        print(f"{name}: " + ", ".join(f"{m} {v:.4f}" for m, v in summary(ranks[name]).items()))
    compared = compare_all(ranks, [("after", "before")])
    print(*compared, sep="\n")
    if args.json:
        result = {
            "users": len(held_out.targets),
            "part": "validation",
            "config": config.model_dump(include={"data", "encoder", "protocol"}),
            "training": {**settings.model_dump(), **asdict(report)},
            "systems": {name: summary(found) for name, found in ranks.items()},
            "comparisons": [comparison.as_dict() for comparison in compared],
            "environment": environment(),
        }
        draft = args.json.with_suffix(".tmp")
        draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
        draft.replace(args.json)


def ranks_of(similar: NearestRetriever, held_out: HeldOut) -> Ranks:
    """Rank of each held-out item among the hundred most like the last one."""
    return ranks_in((hits.items for hits in similar.retrieve(held_out.queries, 100)), held_out.targets)


if __name__ == "__main__":
    try:
        main()
    except (LLMRecError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
