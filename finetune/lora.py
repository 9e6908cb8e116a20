"""Fine-tune the language model with LoRA on a purchase log: fit, train, choose the weight, save.

    python finetune/lora.py --items items.parquet --events events.parquet --out model/ \
        --config finetune/configs/laptop.toml

Interrupt it with Ctrl-C and give the same command again: it goes on from the last checkpoint. The steps
are those of `llmrec fit` and `llmrec finetune`; copy this file to change them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from llmrec import LLMRecError, Recommender

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", required=True, help="items: parquet, csv(.gz), jsonl, .item")
    parser.add_argument("--events", required=True, help="events: parquet, csv(.gz), jsonl, .inter")
    parser.add_argument("--out", required=True, help="directory of the recommender")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--minutes", type=float, help="time to train; the configuration's otherwise")
    args = parser.parse_args(argv)
    out = Path(args.out)

    # 1. Retrievers, once: an interrupted run finds them saved.
    if (out / "manifest.json").is_file():
        console.print(f"{out} is there; its retrievers are kept")
        rec = Recommender.load(out)
        if args.config:
            rec.configure(args.config)
    else:
        rec = Recommender.fit(args.items, args.events, args.config, on_stage=console.print)
        rec.save(out)

    # 2. LoRA on the histories; the last event of each user is held out and decides what is kept.
    def on_step(progress: object, done: float) -> None:
        if progress.step % 20 == 0:
            speed = progress.events / max(progress.seconds, 1e-9)
            console.print(
                f"{done:5.0%}  step {progress.step}  {speed:.0f} events/s  {progress.loss:.3f} nats"
            )

    report = rec.finetune(args.minutes, on_step=on_step)

    # 3. The report says what the model adds on held-out events; its weight may be 0.
    rec.save(out)
    print(report)


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
