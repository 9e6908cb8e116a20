"""Fine-tune the language model with LoRA on a purchase log: fit, train, choose the weight, save.

    python finetune/lora.py --items items.parquet --events events.parquet --out model/ \
        --config finetune/configs/laptop.toml

Interrupt it with Ctrl-C and give the same command again: it goes on from the last checkpoint. The steps
are those of `llmrec fit` and `llmrec finetune`; copy this file to change them. Several GPUs share a step with

    accelerate launch --config_file finetune/configs/eight-gpus.accelerate.yaml finetune/lora.py ...
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from llmrec import LLMRecError, Recommender
from llmrec.assembly import read_catalog, read_log
from llmrec.cli_show import say, training_bar
from llmrec.config import Config, located
from llmrec.errors import ConfigError
from llmrec.processes import Processes


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", required=True, help="items: parquet, csv(.gz), jsonl, .item")
    parser.add_argument("--events", required=True, help="events: parquet, csv(.gz), jsonl, .inter")
    parser.add_argument("--out", required=True, help="directory of the recommender")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--minutes", type=float, help="time to train; the configuration's otherwise")
    parser.add_argument("--stream", help="files of events sorted by user, to learn from instead of --events")
    args = parser.parse_args(argv)
    out, team = Path(args.out), Processes()

    # 1. Retrievers, once: an interrupted run, and every process but the first, finds them saved.
    with team.main_first():
        if (out / "manifest.json").is_file():
            rec = Recommender.load(out)
            if args.config:
                rec.configure(args.config)
            check_same(rec, args.items, args.events, args.config)
            if team.main:
                say(f"{out} is there; its retrievers are kept")
        else:
            rec = Recommender.fit(args.items, args.events, args.config, on_stage=say)
            rec.save(out)

    # 2. LoRA on the histories; the last event of each user is held out and decides what is kept.
    with training_bar() if team.main else nullcontext() as on_step:
        report = rec.finetune(args.minutes, on_step=on_step, stream=args.stream)

    # 3. The report says what the model adds on held-out events; its weight may be 0.
    if team.main:
        rec.save(out)
        print(report)
    team.end()


def check_same(rec: Recommender, items: str, events: str, config: str | None) -> None:
    """Refuse to train on what was fitted before when other data or settings are asked for.

    Raises
    ------
    ConfigError
        If the saved recommender is of another log or other settings.
    """
    asked = located(Config.of(config))
    sections = {"data", "encoder", "retrieval"}
    if asked.model_dump(include=sections) != rec.config.model_dump(include=sections):
        raise ConfigError("--out was fitted with other data, encoder or retrieval settings: name another")
    log = read_log(events, read_catalog(items, asked.data), asked.data)
    if rec.fitted_on != log.fingerprint:
        raise ConfigError(
            "--out was fitted on other events: name another folder, or go on with `llmrec finetune`"
        )


if __name__ == "__main__":
    try:
        main()
    except (LLMRecError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
