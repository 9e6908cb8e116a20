"""Versions and machine, as results files carry them."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("llmrec", "torch", "transformers", "peft", "sentence-transformers", "numpy", "scipy", "faiss-cpu")


def environment() -> dict[str, Any]:
    """Versions and machine, as results files carry them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()}",
        "packages": versions,
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
