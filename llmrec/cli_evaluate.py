"""`llmrec evaluate`: leave-last-out with full ranking, on the user's own log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmrec.cli_show import print_table, say, training_bar
from llmrec.errors import RequestError

if TYPE_CHECKING:
    from llmrec.offline import Evaluation

MEASURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20")


def evaluate(
    items: Annotated[str, typer.Option(help="Items: .parquet, .csv(.gz), .tsv, .jsonl, .item.")],
    events: Annotated[str, typer.Option(help="Events: .parquet, .csv(.gz), .tsv, .jsonl, .inter.")],
    config: Annotated[Path | None, typer.Option(help="TOML file; the flags below win over it.")] = None,
    split: Annotated[str, typer.Option(help="leave-last: last event of each user is test.")] = "leave-last",
    core: Annotated[int | None, typer.Option(help="Keep the k-core of the log and its items.")] = None,
    ties: Annotated[str | None, typer.Option(help="Equal time stamps: input order, or item id.")] = None,
    clock: Annotated[str | None, typer.Option(help="time, or none: rows are in order.")] = None,
    policy: Annotated[str | None, typer.Option(help="Bad rows: raise, or drop and count.")] = None,
    encoder: Annotated[str | None, typer.Option(help="light, a known name, hub id or folder.")] = None,
    users: Annotated[int | None, typer.Option(help="Sample of users for the language model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    no_lm: Annotated[bool, typer.Option("--no-lm", help="Retrievers and merge only.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Time to train the language model.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of checkpoints; a killed run goes on.")] = None,
    result: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Measure every stage by full ranking; settings are chosen on validation, the table is on test."""
    from llmrec.config import Config
    from llmrec.offline import evaluate as evaluate_offline

    if split != "leave-last":
        raise RequestError(f"--split knows leave-last, got {split!r}")
    if users is not None and users < 1:
        raise RequestError(f"--users must be at least 1, got {users}")
    if minutes is not None and not minutes > 0:
        raise RequestError(f"--minutes must be above 0, got {minutes:g}")
    values = Config.of(config).with_flags(encoder=encoder, clock=clock, policy=policy, ties=ties)
    settings: dict[str, Any] = {"core": core, "users": users, "seed": seed, "lm": not no_lm}
    with training_bar() as on_step:
        found = evaluate_offline(
            items, events, values, **settings, minutes=minutes, folder=run, on_stage=say, on_step=on_step
        )
    if result is not None:
        found.write(result)
        say(f"written: {result}, and the rank of each user's target in {result.with_suffix('.ranks.npz')}")
    _show(found)


def _show(found: Evaluation) -> None:
    data, protocol = found.result["dataset"], found.result["protocol"]
    say(f"{data['users']:,} users, {data['items']:,} items, {data['events']:,} events")
    say(json.dumps(protocol))
    table = Table(title=f"{protocol['part']}, {protocol['users']:,} users, full ranking")
    for header in ("", *MEASURES):
        table.add_column(header, justify="right" if header else "left")
    for name, values in found.result["systems"].items():
        table.add_row(name, *(f"{values[measure]:.4f}" for measure in MEASURES))
    print_table(table)
    for comparison in found.comparisons:
        typer.echo(str(comparison))
