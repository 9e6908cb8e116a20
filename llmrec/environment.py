"""Versions and machine, as results files carry them."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Instructions that decide how fast matrices are multiplied, the widest first."""

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
        "instructions": _instructions(),
        "packages": versions,
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    return _told("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    """The widest instructions that the system tells of; empty if none of those that we know."""
    flags = _told("flags").split()
    return next((name for name in WIDEST if name in flags), "")


def _told(name: str) -> str:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
