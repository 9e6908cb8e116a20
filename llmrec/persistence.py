"""A saved recommender: one directory, replaced as a whole, no pickle.

model/
  manifest.json        names the state and the event store; replacing it is the moment of saving
  state-<id>/          items.parquet, vectors.npy, encoder.safetensors, retrievers.safetensors, adapter/
  events-<id>.sqlite   all events, those observed after `fit` included, and the items that changed since the
                       state was written; or both are in a database, and the manifest names the tables
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llmrec.errors import ModelError

FORMAT = 5
"""Version of the directory; raised when an older llmrec could not read it."""

MANIFEST = "manifest.json"
SAVING_SECONDS = 300
"""How long to wait for another process that saves into the same directory."""

RUN_LOG = "log.jsonl"
"""Name of the log of a training run, in its folder and then beside the adapter."""

OWN_EVENTS = r"events-[0-9a-f]{12}\.sqlite(-\w+)?"
STATE = "state-[0-9a-f]{12}"
OWN = re.compile(rf"{STATE}|{OWN_EVENTS}")
"""Names of the states and event stores that we write."""

KEYS = {"state", "events", "config", "recipe", "repeats", "encoder", "catalog", "log", "language_model"}

Arrays = Mapping[str, NDArray[Any]]

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Of numpy, by their names in a safetensors file."""


def may_write(path: Path) -> bool:
    """Whether this user may write to a path, or make it where it is to be."""
    there = next(known for known in (path.absolute(), *path.absolute().parents) if known.exists())
    return os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0))


def check_place(folder: Path) -> None:
    """Make sure that nothing of others is replaced or removed by saving into a directory.

    Raises
    ------
    ModelError
        If it, or what it should lie in, is a file, or if it holds anything and is no saved recommender.
    """
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ModelError(f"{path} is a file; a recommender is saved into a directory")
            break
    if not may_write(folder):
        raise ModelError(f"nothing can be written to {folder}; save into a directory of your own")
    if not folder.is_dir() or manifest_of(folder):
        return
    manifest = folder / MANIFEST
    if manifest.is_file() and not _of_llmrec(manifest):
        raise ModelError(
            f"{manifest} is not that of a recommender: save into another directory, or remove it"
        )
    # What a kill may leave, the run of a training, and what a volume has.
    own = re.compile(rf"\..*|{OWN.pattern}|training|lost\+found")
    others = [path.name for path in folder.iterdir() if not own.fullmatch(path.name)]
    if others and not manifest.is_file():
        shown = ", ".join(sorted(others)[:3]) + ", ..." * (len(others) > 3)
        raise ModelError(f"{folder} holds {shown} and no recommender: save into a new or empty directory")


def _of_llmrec(manifest: Path) -> bool:
    """Whether a file is the manifest of a saved recommender, of whatever format."""
    try:
        return {"format", "state"} <= set(json.loads(manifest.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return False


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Hold others back who want to save into the same directory.

    Raises
    ------
    ModelError
        If another process has been at it for `SAVING_SECONDS`, or as `check_place` says.
    """
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".saving.lock", timeout=SAVING_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ModelError(f"another process has been saving into {folder} for {SAVING_SECONDS} s") from None
    try:
        yield
    finally:
        lock.release()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a saved recommender.

    Raises
    ------
    ModelError
        If the directory is no saved recommender, is damaged, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a saved recommender: it has no {MANIFEST}; make one with Recommender.save"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as broken:
        raise ModelError(f"{path} is damaged: {broken}") from broken
    if found != FORMAT:
        raise ModelError(
            f"{folder} has format {found}, this llmrec reads format {FORMAT}; it was written by llmrec "
            f"{manifest.get('llmrec', 'of an unknown version')}: use that one, or fit again"
        )
    missing = KEYS - set(manifest)
    if missing:
        raise ModelError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    _check_places(path, manifest)
    return manifest


def _check_places(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse what `save` never writes: another place for state, events or vectors, or the URL of a server."""
    vectors = "(llmrec_vectors_[0-9a-f]+)?"
    for key, own in (
        ("state", STATE),
        ("events", rf"{OWN_EVENTS}|postgresql:llmrec_[0-9a-f]+"),
        ("index", vectors),
        ("index_before", vectors),
    ):
        if not re.fullmatch(own, str(manifest.get(key) or "")):
            raise ModelError(f"{path} is damaged: its {key} is {manifest.get(key)!r:.100}")
    if not isinstance(manifest["config"], Mapping):
        raise ModelError(f"{path} is damaged: its config is {manifest['config']!r:.100}")
    for section, values in manifest["config"].items():
        if isinstance(values, Mapping) and values.get("url") is not None:
            raise ModelError(
                f"{path} names a server in {section}.url, which is never saved: give it when you load, or by "
                "the environment variable"
            )


def replace_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest in one step."""
    temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex}"
    with temporary.open("w", encoding="utf-8") as opened:
        json.dump({"format": FORMAT, **manifest}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(folder / MANIFEST)


def write_state(folder: Path, write: Callable[[Path], None]) -> str:
    """Let `write` fill a new state directory, flush it to disk, and return its name."""
    name = f"state-{uuid.uuid4().hex[:12]}"
    target = folder / name
    target.mkdir(parents=True)
    try:
        write(target)
        for path in target.rglob("*"):
            if path.is_file():
                # Who may read the folder may read the file: safetensors leaves it to its owner alone.
                path.chmod(0o600 | target.stat().st_mode & 0o044)
                with path.open("rb") as opened:
                    os.fsync(opened.fileno())
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return name


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest that a directory has now; empty if it is no saved recommender."""
    try:
        return read_manifest(folder)
    except ModelError:
        return {}


BESIDE = "beside-"
"""Begins the names of folders, in that of a training run, in which models beside the first are trained."""


def clear_run(folder: Path) -> None:
    """Remove what a training run wrote but its curves, and its folder if nothing else is in it."""
    for further in folder.glob(f"{BESIDE}*"):
        clear_run(further)
    for name in ("checkpoint.safetensors", "best.safetensors", RUN_LOG):
        for path in (folder / name, folder / f"{name}.tmp"):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def keep_log(sources: Sequence[Path | None], adapter: Path) -> None:
    """Copy the log of a run beside the adapter that came of it, from the first folder that has one."""
    for folder in sources:
        if folder is not None and (folder / RUN_LOG).is_file():
            shutil.copyfile(folder / RUN_LOG, adapter / RUN_LOG)
            return


def remove_stale(folder: Path, keep: Sequence[str]) -> None:
    """Remove states and stores that are not named: what was replaced earlier, and what a kill left."""
    for path in folder.iterdir():
        if not OWN.fullmatch(path.name) or any(path.name.startswith(name) for name in keep):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in [*folder.glob(f".{MANIFEST}.*"), *folder.glob(".tmp-events-*")]:
        path.unlink(missing_ok=True)


def remove_stray_events(folder: Path) -> None:
    """Remove event stores of ours that the manifest does not name, if there are any."""
    ours = re.compile(rf"(?:{OWN_EVENTS})|\.tmp-(?:{OWN_EVENTS})-.*")
    there = [path for path in folder.iterdir() if ours.fullmatch(path.name) and path.is_file()]
    named = read_manifest(folder)["events"]
    if all(path.name.startswith(named) for path in there):
        return
    with saving(folder):
        named = read_manifest(folder)["events"]
        for path in there:
            if not path.name.startswith(named):
                path.unlink(missing_ok=True)


def save_arrays(path: Path, groups: Mapping[str, Arrays]) -> None:
    """Write named groups of arrays of numbers to one safetensors file."""
    flat = {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}
    save_file({name: np.asarray(array, order="C") for name, array in flat.items()}, path)


def load_arrays(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """Read what `save_arrays` wrote.

    The arrays are mapped from the file: processes that read the same one share it. What is written to them is
    the process's own.
    """
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = path.stat().st_size - 8 - length
            if length == 0 or size < 0:
                raise ValueError("it is cut off")
            header = json.loads(opened.read(length))
        for key, found in header.items():
            if key == "__metadata__":
                continue
            start, end = found["data_offsets"]
            if end > size:
                raise ValueError("it is cut off")
            group, _, name = key.partition("/")
            kind, shape = _TYPES[found["dtype"]], tuple(found["shape"])
            # A map of its own each: scipy copies what is a view of something much larger.
            groups.setdefault(group, {})[name] = (
                np.asarray(np.memmap(path, kind, "c", 8 + length + start, shape))
                if end > start
                else np.empty(shape, kind)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as broken:
        raise ModelError(f"{path} is missing or damaged: {broken}") from broken
    return groups


def map_array(path: Path) -> NDArray[Any]:
    """Map an npy file into memory, as `load_arrays` does.

    Raises
    ------
    ModelError
        If it is missing or damaged.
    """
    try:
        mapped: NDArray[Any] = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError) as broken:
        raise ModelError(f"{path} is missing or damaged: {broken}") from broken
    return mapped
