"""The main job on real data: fit, fine-tune, recommend, and measure what the language model adds.

    python eval/demo.py --minutes 5

Takes MovieLens (671 users, 9,061 films), holds out each user's last film, fits the retrievers on the
rest, fine-tunes a 135-million-parameter language model with LoRA, and shows for three users and one
typed query what retrieval proposes and what the language model makes of it. A second run reuses what
is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmrec import LLMRecError, Recommendation, Recommender, Request
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.events import EventLog
from llmrec.fetch import fetch_with_progress
from llmrec.metrics import REPORTED

console = Console()
NAMES = ("movielens", "all-minilm-l6-v2", "smollm2-135m-instruct-q41")
WISH = "a space adventure with robots"


def fitted(folder: Path, items: Path, events: Path, minutes: float) -> tuple[Recommender, EventLog, str]:
    """Fit and fine-tune, or load what an earlier run left; the recommender, the full log, and a report."""
    config = Config()
    catalog = Catalog.load(items)
    log = EventLog.load(events, catalog)
    note = folder / "demo.json"
    done = json.loads(note.read_text()) if note.is_file() else {}
    if done.get("log") == log.fingerprint and done.get("minutes", 0) >= minutes:
        console.print(
            f"Reusing {folder} (fine-tuned for {done['minutes']:g} minutes); delete it to start anew."
        )
        return Recommender.load(folder), log, done["report"]
    if done.get("log") == log.fingerprint:
        rec = Recommender.load(folder)
    else:
        with console.status("fitting") as status:
            rec = Recommender.fit(
                catalog, log.drop_last(1), config, on_stage=lambda stage: status.update(f"Fitting: {stage}")
            )
        rec.save(folder)
        remember(note, {"log": log.fingerprint, "minutes": 0})
    bar = Progress(
        TextColumn("Fine-tuning"),
        BarColumn(),
        TextColumn(
            "{task.percentage:3.0f} %  {task.fields[speed]:.0f} events/s  {task.fields[nats]:.2f} nats"
        ),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=1.0, speed=0.0, nats=0.0)
        report = rec.finetune(
            minutes,
            on_step=lambda p, share: bar.update(
                task, completed=share, speed=p.events / max(p.seconds, 1e-9), nats=p.loss
            ),
        )
    rec.save(folder)
    remember(note, {"log": log.fingerprint, "minutes": minutes, "report": str(report)})
    return rec, log, str(report)


def remember(note: Path, values: dict[str, object]) -> None:
    """Write what was done, to a temporary name first."""
    draft = note.with_name(f".{note.name}")
    draft.write_text(json.dumps(values))
    draft.replace(note)


def lists(title: str, stages: dict[str, list[Recommendation]], used: bool) -> None:
    """Show the stages of one request side by side, and where the items of the served list came from."""
    console.print(f"\n[bold]{escape(title)}[/bold]")
    shown = ["retrieval", "language model"] if "language model" in stages else ["retrieval"]
    if used:
        shown.append("default")
    before = {r.item_id: r.rank for r in stages["retrieval"]}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", justify="right")
    for name in shown:
        table.add_column({"default": "after the language model (served)"}.get(name, name))
    for row in range(10):
        cells = []
        for name in shown:
            found = stages[name][row : row + 1]
            cells.append(describe(found[0], None if name == "retrieval" else before) if found else "")
        table.add_row(str(row + 1), *cells)
    console.print(table)
    sources: dict[str, float] = {}
    for r in stages["default"]:
        for s in r.sources:
            sources[s.name] = sources.get(s.name, 0.0) + s.score
    total = sum(sources.values()) or 1.0
    parts = ", ".join(f"{n} {v / total:.0%}" for n, v in sorted(sources.items(), key=lambda x: -x[1]))
    console.print(f"  the served ten owe their score to: {parts}")


def describe(r: Recommendation, before: dict[str, int] | None) -> str:
    """A title, its year, and how it moved against retrieval."""
    year = r.item.attributes.get("year")
    text = escape(r.title[:34]) + (f" ({year})" if year else "")
    if r.sources:
        # What added most to the score of this item.
        text += f" [dim]{r.sources[0].name}[/dim]"
    if before is None:
        return text
    if r.item_id not in before:
        return text + " [green]new[/green]"
    moved = before[r.item_id] - r.rank
    return text + (f" [green]+{moved}[/green]" if moved > 0 else f" [red]{moved}[/red]" if moved < 0 else "")


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="to fine-tune")
    parser.add_argument("--model", default="demo-model", help="directory of the recommender")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    data, _, _ = fetch_with_progress(NAMES, console=console)
    rec, log, report = fitted(Path(args.model), data / "items.parquet", data / "events.parquet", args.minutes)
    console.print(escape(report))
    weight, typed = rec.recipe.history.most_lm, rec.recipe.query.most_lm

    catalog = rec.catalog
    users = [u for u in range(log.n_users) if 20 <= log.offsets[u + 1] - log.offsets[u] <= 60][:3]
    for user in users:
        name = log.users[user]
        seen = [catalog.titles[code] for code in log.history(user)[:-1][-5:]]
        lists(f"User {name}, last watched: {'; '.join(seen)}", rec.stages(user=name), weight > 0)
        console.print(f"  what the user watched next: {escape(catalog.titles[log.history(user)[-1]])}")
    name = log.users[users[0]]
    lists(f'Typed by user {name}: "{WISH}"', rec.stages(Request(user=name, query=WISH)), typed > 0)

    systems = rec.evaluate(log.only_last(1))
    table = Table(
        title=f"Held-out last films of {len(next(iter(systems.ranks.values())))} users, full ranking",
        box=None,
    )
    measures = [m for m in REPORTED if m.startswith(("recall", "ndcg")) and not m.endswith("20")]
    for header in ("", *measures):
        table.add_column(header, justify="right" if header else "left")
    names = {"merge": "retrieval", "lm": "language model alone", "default": "blend (served)"}
    for system, values in systems.as_dict().items():
        if system in names:
            table.add_row(names[system], *(f"{values[m]:.4f}" for m in measures))
    console.print()
    console.print(table)
    for c in systems.comparisons:
        if (c.a, c.b) == ("default", "merge"):
            console.print(f"  {c}".replace("default - merge", "blend - retrieval"))
    for kind, chosen in (("requests by history", weight), ("typed words", typed)):
        if chosen == 0:
            console.print(
                f"For {kind} the language model's weight came out as 0: after {args.minutes:g} minutes it "
                "adds nothing beyond noise on the held-out events that choose it, and is left out."
            )
    if min(weight, typed) == 0:
        console.print(f"For a longer run: llmrec finetune {args.model} --minutes 60")
    console.print(f"Done in {(time.monotonic() - begun) / 60:.1f} minutes. Ask it yourself:")
    console.print(f"  llmrec recommend {args.model} --user {name} --stages")
    console.print(f'  llmrec search {args.model} "{WISH}"')


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
