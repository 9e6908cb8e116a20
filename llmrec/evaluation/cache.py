"""Fitted stages on disk, by a hash of everything that went into them: a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llmrec.errors import ConfigError, LLMRecError

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


class StageCache:
    """Keeps each stage in a folder of its own, ``NAME-HASH``; without a folder nothing is kept.

    Parameters
    ----------
    folder
        Where stages are kept; None makes everything anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found: dict[str, bool] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as refused:
                raise ConfigError(f"stages cannot be kept in {folder}: {refused.strerror}") from refused

    def get(
        self,
        name: str,
        inputs: Any,
        make: Callable[[], Made],
        write: Callable[[Made, Path], None],
        read: Callable[[Path], Made],
    ) -> Made:
        """Return what is kept for these inputs, or make and keep it.

        Parameters
        ----------
        inputs
            JSON values that decide the result: settings, hashes of data and of `sources`.
        """
        if self.folder is None:
            return make()
        target = self.place(name, inputs)
        self.found[name] = (target / "complete").is_file()
        if self.found[name]:
            try:
                return read(target)
            except (OSError, ValueError, KeyError, LLMRecError) as damaged:
                logger.warning("%s is damaged (%s) and is made anew", target, damaged)
                self.found[name] = False
        made = make()
        draft = self.folder / f".{name}-{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        try:
            write(made, draft)
            (draft / "complete").touch()
            shutil.rmtree(target, ignore_errors=True)
            draft.replace(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return made

    def place(self, name: str, inputs: Any) -> Path:
        """The folder of a stage with these inputs."""
        assert self.folder is not None
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{key}"


def sources(*names: str) -> str:
    """SHA-256 of the source of modules and packages of llmrec, so that a stage is made anew with new code."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in names:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
