"""`llmrec evaluate`: every stage measured on held-out events of the user's own log."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmrec.cli_show import print_table, say, training_bar
from llmrec.errors import RequestError

if TYPE_CHECKING:
    from llmrec.offline import Evaluation

MEASURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20")
SEARCHES = {
    "known_item": ("a known item is sought", ("recall@10", "ndcg@10", "mrr@10")),
    "anybody": ("a known item is sought without a history", ("recall@10", "ndcg@10", "mrr@10")),
    "attribute": ("an attribute value is typed", ("recall@10", "ndcg@10", "map@10")),
}
"""Kinds of typed words: a title, and measures."""


def evaluate(
    items: Annotated[str, typer.Option(help="Items: .parquet, .csv(.gz), .tsv(.gz), .jsonl(.gz), .item.")],
    events: Annotated[str, typer.Option(help="Events: .parquet, .csv(.gz), .tsv(.gz), .jsonl(.gz), .inter.")],
    config: Annotated[Path | None, typer.Option(help="TOML file; the flags below win over it.")] = None,
    split: Annotated[str | None, typer.Option(help="leave-last, time, cold-item or cold-user.")] = None,
    validation_from: Annotated[
        str | None, typer.Option(help="With --split time: end of training, ISO time or seconds.")
    ] = None,
    test_from: Annotated[str | None, typer.Option(help="With --split time: end of validation.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Of events, items or users held out for each part.")
    ] = None,
    core: Annotated[int | None, typer.Option(help="Keep the k-core of the log and its items.")] = None,
    negatives: Annotated[
        int | None, typer.Option(help="Rank among drawn items only; not comparable with full ranking.")
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="Table user_id, candidates: rank only these.")
    ] = None,
    candidate_source: Annotated[str | None, typer.Option(help="Its rows of this source.")] = None,
    candidate_count: Annotated[
        int | None, typer.Option(help="So many a user, with the target among them.")
    ] = None,
    ties: Annotated[str | None, typer.Option(help="Equal time stamps: input order, or item id.")] = None,
    clock: Annotated[str | None, typer.Option(help="time, or none: rows are in order.")] = None,
    policy: Annotated[str | None, typer.Option(help="Bad rows: raise, or drop and count.")] = None,
    encoder: Annotated[str | None, typer.Option(help="light, a known name, hub id or folder.")] = None,
    users: Annotated[int | None, typer.Option(help="Sample of users for the language model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of samples and drawn splits.")] = None,
    no_lm: Annotated[bool, typer.Option("--no-lm", help="Retrievers and merge only.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Time to train the language model.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of fitted stages; a killed run goes on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report, one HTML page, and the results.")
    ] = None,
    result: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Measure every stage on held-out events; settings are chosen on validation, the table is on test."""
    from llmrec.config import Config
    from llmrec.offline import evaluate as evaluate_offline
    from llmrec.persistence import may_write

    if no_lm and minutes is not None:
        raise RequestError("--minutes is the time of a language model, and --no-lm leaves it out")
    if minutes is not None and not minutes > 0:
        raise RequestError(f"--minutes must be above 0, got {minutes:g}")
    for flag, path, right in (("--json", result, Path.is_file), ("--out", out, Path.is_dir)):
        if path is not None and path.exists() and not right(path):
            raise RequestError(f"{flag}: {path} is a {'folder' if path.is_dir() else 'file'}")
        if path is not None and not may_write(path):
            raise RequestError(f"{flag}: nothing can be written to {path}")
    protocol = {
        "split": split,
        "validation_from": validation_from,
        "test_from": test_from,
        "share": share,
        "core": core,
        "negatives": negatives,
        "candidates": candidates,
        "candidate_source": candidate_source,
        "candidate_count": candidate_count,
        "users": users,
        "seed": seed,
    }
    values = Config.of(config).with_flags(
        data={"clock": clock, "policy": policy, "ties": ties}, encoder={"name": encoder}, protocol=protocol
    )
    with training_bar() as on_step:
        found = evaluate_offline(
            items, events, values, lm=not no_lm, minutes=minutes, folder=run, on_stage=say, on_step=on_step
        )
    # First, so that nothing is lost where a file cannot be written.
    _show(found)
    if result is not None:
        found.write(result)
        say(f"written: {result}, and the rank of each user's target in {result.with_suffix('.ranks.npz')}")
    if out is not None:
        command = shlex.join(["llmrec", *sys.argv[1:]])
        say(f"written: {found.report(out, command)}")


def _show(found: Evaluation) -> None:
    result = found.result
    data, protocol = result["dataset"], result["protocol"]
    say(f"{data['users']:,} users, {data['items']:,} items, {data['events']:,} events")
    say(json.dumps(protocol))
    title = f"{protocol['part']}, {protocol['split']}, {protocol['users']:,} users, {protocol['ranking']}"
    print_table(_table(title, MEASURES, result["systems"]))
    beyond = result["beyond"]
    print_table(_table(f"the first ten: {protocol['ranking']}", list(next(iter(beyond.values()))), beyond))
    for kind, (title, measures) in SEARCHES.items():
        typed = result["search"][kind]
        if typed["queries"]:
            print_table(_table(f"search: {title}", measures, typed["systems"]))
    for name, values in result["probabilities"].items():
        typer.echo(f"{name}: " + ", ".join(f"{measure} {value:.4f}" for measure, value in values.items()))
    leaks = result["leaks"]
    typer.echo(
        f"checked for leaks: {', '.join(leaks['checked'])}"
        + (f"; not checked: {', '.join(leaks['unchecked'])}" if leaks["unchecked"] else "")
        + f"; {leaks['repeated_pairs']} repeated pairs of user and item, {leaks['near_duplicate_items']} "
        f"near-duplicate items, {leaks['targets_near_history']} targets like an item in the history"
    )
    from llmrec.metrics import Comparison

    for comparison in found.comparisons:
        typer.echo(str(comparison))
    for kind, typed in result["search"].items():
        for stored in typed["comparisons"]:
            typer.echo(f"search, {kind.replace('_', ' ')}: {Comparison.of(stored)}")


def _table(title: str, measures: Sequence[str], systems: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=title)
    for header in ("", *measures):
        table.add_column(header, justify="right" if header else "left")
    for name, values in systems.items():
        table.add_row(name, *(f"{values[measure]:.4f}" for measure in measures))
    return table
