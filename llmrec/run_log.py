"""The log of a training run: one JSON object a line, written as it happens, and TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrec.persistence import RUN_LOG

BOARDS = "tensorboard"
"""Folder of the curves, in the folder of a run; each run has a folder of its own in it."""


def need_tensorboard() -> Any:
    """The class that writes TensorBoard's files.

    Raises
    ------
    ImportError
        If the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise ImportError('training.tensorboard needs: pip install "llmrec[tensorboard]"') from missing
    return SummaryWriter


class RunLog:
    """Lines of one run, in order of step; each is on disk when `add` returns.

    Every line has ``run`` (which run it is of), ``kind`` (``step`` or ``validation``) and ``step``.

    Parameters
    ----------
    folder
        Of the run.
    run
        Tells runs apart. Lines of another one are dropped.
    lines, step
        Lines that were there at the checkpoint from which the run goes on, and its step: what a killed
        process wrote later is dropped, since it comes again.
    tensorboard
        Write the numbers for TensorBoard too.

    Raises
    ------
    ImportError
        If `tensorboard` is wanted and not installed.
    """

    def __init__(
        self, folder: Path, run: str, lines: int = 0, step: int = 0, *, tensorboard: bool = False
    ) -> None:
        self.path, self.run = folder / RUN_LOG, run
        _keep(self.path, run, lines)
        self._file = self.path.open("a", encoding="utf-8")
        # Events of later steps, which a killed process wrote, are hidden.
        board = need_tensorboard() if tensorboard else None
        self._board: Any = board and board(str(folder / BOARDS / run), purge_step=step + 1)

    def add(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write a line. What is not a finite number becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"run": self.run, "kind": kind, "step": step, **finite}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in finite.items():
                if value is not None:
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, up to one that a kill cut short; none where there is no log."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _keep(path: Path, run: str, lines: int) -> None:
    """Leave only the first lines of a log, and only those of this run."""
    kept = [line for line in read_lines(path)[:lines] if line.get("run") == run]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in kept)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(path)
