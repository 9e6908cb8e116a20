"""Fetching with something to look at: what `llmrec fetch` shows on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from llmrec.fetch.cache import resolve


def fetch_with_progress(
    names: Sequence[str],
    *,
    allow_hub: bool = False,
    cache: Path | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Resolve names one after the other, showing stage and elapsed time of each.

    Parameters
    ----------
    names, allow_hub, cache
        As `llmrec.fetch.resolve` takes them.
    console
        Where to show; standard error by default. Where it is not a terminal, each stage is a line.

    Returns
    -------
    list of Path
        One local folder for each name, in the order given.

    Raises
    ------
    FetchError, ImportError
        As `llmrec.fetch.resolve`.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        return [
            resolve(name, cache=cache, allow_hub=allow_hub, progress=partial(_say, console, name))
            for name in names
        ]
    text = TextColumn("{task.description}", markup=False)
    folders = []
    with Bars(SpinnerColumn(finished_text="+"), text, TimeElapsedColumn(), console=console) as bars:
        for name in names:
            show = partial(_show, bars, bars.add_task(name, total=1), name)
            folders.append(resolve(name, cache=cache, allow_hub=allow_hub, progress=show))
            show("ready", done=1)
    return folders


def _say(console: Console, name: str, stage: str) -> None:
    console.print(f"{name}: {stage}", highlight=False, markup=False, soft_wrap=True)


def _show(bars: Bars, task: TaskID, name: str, stage: str, done: int = 0) -> None:
    bars.update(task, description=f"{name}: {stage}", completed=done)
