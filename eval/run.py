"""Evaluate one data set by the protocol of a configuration, and write a results file.

    python eval/run.py --data ../shared/data/ml-latest-small --config eval/configs/ml-latest-small.toml \
        --minutes 10                                # chooses and reports on validation
    python eval/run.py ... --final                  # reads the test events, once; logged in eval/LOG.md

The data folder holds items.parquet and events.parquet. Fitted stages are kept in runs/NAME-OF-DATA, so a
run that was killed, or a second one with the same settings, takes up what is there. Results:
eval/results/NAME.json, with the ranks of each user (without ids) beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from llmrec.config import Config
from llmrec.errors import ConfigError, LLMRecError
from llmrec.fetch import resolve
from llmrec.offline import Evaluation, evaluate
from llmrec.progress import Progress

HERE = Path(__file__).resolve().parent
console = Console(stderr=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--core", type=int, help="keep the k-core of the log")
    parser.add_argument("--users", type=int, help="sample of users for systems with the language model")
    parser.add_argument("--seed", type=int, help="of the sample of users and of drawn splits")
    parser.add_argument("--fit-seed", type=int, help="of all that is fitted; the users stay the same")
    parser.add_argument("--minutes", type=float, help="training time of the language model")
    parser.add_argument("--no-lm", action="store_true", help="retrievers and merge only")
    parser.add_argument("--search", type=float, help="minutes to try all families for, keeping what pays")
    parser.add_argument("--final", action="store_true", help="report on test instead of validation")
    parser.add_argument("--name", help="of the results file; data set, part and minutes if not given")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of the results file")
    return parser.parse_args(argv)


def seeded(config: Config, seed: int) -> Config:
    """The same with this seed in everything that is chosen and fitted."""
    values = config.model_dump()
    retrieval = values["retrieval"]
    beside = [more["training"] for more in values["beside"]]
    for section in (values["training"], *beside, retrieval, *retrieval.values()):
        if isinstance(section, dict) and "seed" in section:
            section["seed"] = seed
    return Config.of(values)


def differs(one: Any, other: Any) -> bool:
    """Whether two dumps of configurations differ in a setting that both have, but where lists lie."""
    if isinstance(one, dict) and isinstance(other, dict):
        return any(differs(one[k], other[k]) for k in one.keys() & other.keys() if k != "candidates")
    return bool(one != other)


def other_result(path: Path, config: Config) -> None:
    """Refuse to replace the result of another configuration.

    Raises
    ------
    ConfigError
        If one is there under this name.
    """
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if differs(found["config"], config.model_dump(mode="json")):
        raise ConfigError(f"{path} is the result of another configuration: give this one a name by --name")


def git_sha() -> str:
    """Commit of the source tree, with a mark if code, prompts or settings have changes."""

    def git(*words: str) -> str:
        said = subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True)
        return said.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "llmrec", "prompts", "eval/*.py", "eval/configs")
    except OSError:
        return "unknown"
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


def log(words: str) -> None:
    """Append a dated line to LOG.md."""
    today = datetime.datetime.now(datetime.UTC).date()
    with (HERE / "LOG.md").open("a", encoding="utf-8") as opened:
        opened.write(f"- {today} {words}\n")


def show(evaluation: Evaluation) -> None:
    """Print protocol, table of systems, probabilities and comparisons."""
    protocol = evaluation.result["protocol"]
    print(
        f"{protocol['part']}, {protocol['split']}, {protocol['users']:,} users, {protocol['ranking']}, "
        f"seen items {protocol['seen_items']}, ties by {protocol['ties']}"
    )
    measures = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20")
    print(f"{'':14}" + "".join(f"{m:>11}" for m in measures))
    for name, values in evaluation.result["systems"].items():
        print(f"{name:14}" + "".join(f"{values[m]:11.4f}" for m in measures))
    for name, values in evaluation.result["probabilities"].items():
        print(f"{name}: " + ", ".join(f"{m} {v:.4f}" for m, v in values.items()))
    for comparison in evaluation.comparisons:
        print(comparison)


def main(argv: list[str] | None = None) -> None:
    """Run."""
    args = arguments(argv)
    folder = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    part = "test" if args.final else "validation"
    search = f"search{args.search:g}min-" if args.search else ""
    budget = (
        search + "no-lm"
        if args.no_lm
        else f"{search}{args.minutes:g}min"
        if args.minutes
        else f"{search}default"
    )

    def on_step(progress: Progress, done: float) -> None:
        if progress.step % 50 == 0:
            speed = progress.events / max(progress.seconds, 1e-9)
            console.print(f"  {done:4.0%}  {speed:.0f} events/s  {progress.loss:.3f} nats")

    config = Config.of(args.config).with_flags(
        protocol={"core": args.core, "users": args.users, "seed": args.seed},
        retrieval={"search_minutes": args.search},
    )
    if args.fit_seed is not None:
        config, budget = seeded(config, args.fit_seed), f"{budget}-seed{args.fit_seed}"
    listed = config.protocol.candidates
    if listed is not None and not listed.is_absolute():
        config = config.with_flags(protocol={"candidates": folder / listed})
    protocol = config.protocol
    what = "" if protocol.split == "leave-last" else f"-{protocol.split}"
    if protocol.candidates:
        what += "-candidates"
    if protocol.negatives:
        what += f"-{protocol.negatives}drawn"
    name = args.name or f"{folder.name}{what}-{part}-{budget}"
    path = Path(args.out) / f"{name}.json"
    other_result(path, config)
    # Before the log of readings changes the tree.
    commit = git_sha()
    if args.final:
        # Before they are read: a run that fails has read them too.
        log(f"test events read: `{path.name}`")
    evaluation = evaluate(
        folder / "items.parquet",
        folder / "events.parquet",
        config,
        lm=not args.no_lm,
        minutes=args.minutes,
        part=part,
        folder=HERE.parent / "runs" / folder.name,
        on_stage=lambda stage: console.print(stage),
        on_step=on_step,
    )
    command = "python eval/run.py " + shlex.join(argv if argv is not None else sys.argv[1:])
    registry = not Path(args.data).is_dir()
    evaluation.write(path, {"data": folder.name, "registry": registry, "command": command, "git": commit})
    ranks = path.with_suffix(".ranks.npz")
    if ranks.stat().st_size > 1_000_000:
        shutil.move(ranks, HERE.parent / "runs" / ranks.name)
        console.print(f"{ranks.name} is above 1 MB and lies in runs/")
    if args.final:
        served = evaluation.result["systems"]["default"]
        log(f"result: `{path.name}`, default NDCG@10 {served['ndcg@10']:.4f}")
    show(evaluation)


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
