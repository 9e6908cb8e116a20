"""Ask the base model, before any tuning, whether it knows the rows of a data set by heart.

    python eval/memory.py --data movielens --config eval/configs/movielens.toml

Writes eval/results/NAME-memory.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmrec.assembly import read_catalog, read_log
from llmrec.config import Config
from llmrec.errors import LLMRecError
from llmrec.evaluation.memory import remembered
from llmrec.fetch import resolve
from llmrec.offline import environment

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    folder = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    config = Config.of(args.config)
    catalog = read_catalog(folder / "items.parquet", config.data)
    log = read_log(folder / "events.parquet", catalog, config.data)
    base = resolve(config.lm.base, allow_hub=config.allow_hub)
    found = remembered(log, catalog, base, users=args.users, seed=args.seed)
    result = {
        "base": config.lm.base,
        "log_sha256": log.fingerprint,
        "seed": args.seed,
        **found.as_dict(),
        "environment": environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draft = args.out / f".{Path(args.data).name}-memory.json"
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out / f"{Path(args.data).name}-memory.json")
    print(found)


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
