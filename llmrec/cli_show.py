"""What the command line shows: tables and JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from llmrec.candidates import LM
from llmrec.fetch import Artifact
from llmrec.recipe import TOO_FEW, Recipe
from llmrec.types import Recommendation

if TYPE_CHECKING:
    from llmrec.progress import Progress

stderr = Console(stderr=True)
"""Progress, notes and errors."""

PIPED = 1_000
"""Width where standard output is no terminal: nothing is cut."""


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Return a text of the data with escapes in the place of what would steer a terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(message: str) -> None:
    """Print a line on standard error as it is: brackets are no markup."""
    stderr.print(harmless(message), markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table on standard output, as wide as it needs where that is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else PIPED, highlight=False)
    console.print(table)


def as_json(found: Sequence[Recommendation]) -> list[dict[str, Any]]:
    """Return recommendations as JSON values."""
    return [
        {
            "item_id": r.item_id,
            "title": r.title,
            "rank": r.rank,
            "score": r.score,
            "attributes": dict(r.item.attributes),
            "sources": [{"name": s.name, "rank": s.rank, "score": s.score} for s in r.sources],
            **({"reason": asdict(r.reason)} if r.reason is not None else {}),
        }
        for r in found
    ]


def show(found: Sequence[Recommendation] | Mapping[str, Sequence[Recommendation]], *, in_json: bool) -> None:
    """Print one list, or several by name, as tables or as one JSON value."""
    if isinstance(found, Mapping):
        if in_json:
            typer.echo(json.dumps({name: as_json(part) for name, part in found.items()}))
        else:
            for name, part in found.items():
                print_table(_table(part, name))
    elif in_json:
        typer.echo(json.dumps(as_json(found)))
    else:
        print_table(_table(found))


def _table(found: Sequence[Recommendation], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("item", no_wrap=True)
    table.add_column("title")
    table.add_column("score", justify="right")
    explained = any(r.reason for r in found)
    table.add_column("why" if explained else "what each source added")
    for r in found:
        sources = ", ".join(f"{s.name} +{s.score:.2f}" for s in r.sources)
        last = r.reason.sentence if r.reason else sources
        # `Text`, since in a plain string "[bold]" would be markup.
        table.add_row(str(r.rank), Text(harmless(r.item_id)), Text(r.title), f"{r.score:.3f}", Text(last))
    if not found:
        table.caption = "nothing was found"
    return table


def show_known(artifacts: Sequence[Artifact]) -> None:
    """Print what can be fetched by name."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("name", "size", "licence", "what"):
        table.add_column(name, justify="right" if name == "size" else "left", no_wrap=name == "name")
    for a in artifacts:
        size = f"{a.megabytes} MB" if a.megabytes else "?"
        table.add_row(Text(a.name), size, Text(a.licence), Text(a.summary))
    print_table(table)


def show_families(recipe: Recipe) -> None:
    """Print what each family finds alone, and which were added to the recipe."""
    added = [e["best"] for e in recipe.log if e["search"] == "forward selection" and e["added"]]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("family", "recall@10", "ndcg@10", "seconds", "in the recipe"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for entry in recipe.log:
        if entry["search"] != "family":
            continue
        name = entry["family"]
        if "left out" in entry:
            table.add_row(name, "", "", "", Text(entry["left out"]))
            continue
        place = f"added {added.index(name) + 1}." if name in added else ""
        measures = f"{entry['recall@10']:.4f}", f"{entry['ndcg@10']:.4f}", f"{entry['seconds']:.0f}"
        table.add_row(name, *measures, place)
    print_table(table)


def weights_of(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Return the weights that were chosen for each kind of request."""
    kinds = {"history": recipe.history, "typed words": recipe.query, "similar items": recipe.similar}
    if recipe.query.longer:
        kinds["typed words and history"] = recipe.query.for_history(1)
    return {
        kind: {**weights.retrievers, **({LM: weights.most_lm} if weights.most_lm else {})}
        for kind, weights in kinds.items()
    }


def say_weights(recipe: Recipe) -> None:
    """Print them."""
    few = [entry["users"] for entry in recipe.log if entry.get("search") == TOO_FEW]
    if few:
        say(f"held-out users: {few[-1]}, too few to choose by: settings and weights are the default")
    for kind, named in weights_of(recipe).items():
        say(f"weights by {kind}: " + ", ".join(f"{name} {weight:g}" for name, weight in named.items()))


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show the name of the stage that runs; where standard error is no terminal, each is a line."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    last = ""
    with Bars(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("starting", total=None)

        def on_stage(stage: str) -> None:
            nonlocal last
            bars.update(task, description=stage)
            if bars.disable and stage != last:
                say(stage)
            last = stage

        yield on_stage


@contextmanager
def training_bar() -> Iterator[Callable[[Progress, float], None]]:
    """Show share done, nats an item, speed, time left and the last validation of a training run.

    Where standard error is no terminal, that is a line every twentieth of the run.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[state]}", markup=False),
    )
    started, reached = False, -1
    with Bars(*columns, console=stderr, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("preparing", total=1.0, state="")

        def on_step(progress: Progress, done: float) -> None:
            nonlocal started, reached
            if not started and progress.step > 1:
                say(f"continuing from the checkpoint of step {progress.step - 1}")
            started = True
            done = min(1.0, done)
            left = progress.seconds * (1 - done) / done if done else 0.0
            state = (
                f"step {progress.step}, {progress.loss:.2f} nats an item, "
                f"{progress.events / max(progress.seconds, 1e-9):.0f} events/s, {_minutes(left)} left"
            )
            if progress.curve:
                state += f", NDCG@10 {progress.curve[-1]['ndcg@10']:.4f}"
            what = "training" if done < 1 else "choosing the weight"
            bars.update(task, completed=done, description=what, state=state)
            if bars.disable and int(done * 20) > reached:
                reached = int(done * 20)
                say(f"{done:4.0%} {state}")

        yield on_step


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
