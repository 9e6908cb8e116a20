"""Under which licence a model folder says that its weights are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llmrec.fetch.cache import MARKER

UNKNOWN = "unknown"

_FIELD = re.compile(r"^license(_name)?:\s*[\"']?([^\"'#\n]+)", re.MULTILINE)


def licence_of(folder: Path) -> str:
    """Name of the licence of a model, by the files in its folder; ``"unknown"`` where none says.

    What `llmrec fetch` left is asked first, then the head of ``README.md``, then ``LICENSE``.
    """
    return _fetched(folder / MARKER) or _page(folder / "README.md") or _text(folder) or UNKNOWN


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _fetched(path: Path) -> str:
    try:
        known = json.loads(_read(path) or "{}")
    except ValueError:
        return ""
    return str(known.get("licence") or "") if isinstance(known, dict) else ""


def _page(path: Path) -> str:
    """From the fields between the first two lines of dashes; a name says more than ``other``."""
    parts = _read(path).split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return ""
    fields = {bool(name): value.strip() for name, value in _FIELD.findall(parts[1])}
    return fields.get(True) or fields.get(False) or ""


def _text(folder: Path) -> str:
    names = ("LICENSE", "LICENSE.txt", "LICENSE.md")
    lines = (line.strip("# ") for name in names for line in _read(folder / name).splitlines())
    return next((line for line in lines if line), "")
