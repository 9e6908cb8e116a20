"""Virtual environments for what needs versions of its own."""

from __future__ import annotations

import hashlib
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path


def python_in(
    folder: Path, packages: Sequence[str], *, options: Sequence[str] = (), unwanted: Sequence[str] = ()
) -> Path:
    """Python of an environment with these packages; made, beside those of other versions, if it is not there.

    `options` are pip's; `unwanted` comes with the packages and is removed.

    Raises
    ------
    CalledProcessError
        If they do not install.
    """
    pinned = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    folder = folder.with_name(f"{folder.name}-{pinned}")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, *packages], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
        (folder / "ready").touch()
    return python
