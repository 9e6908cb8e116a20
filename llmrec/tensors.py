"""Tensors in safetensors files that are whole or not there, and the state of the random generators."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to a temporary name and rename it, so that no half file is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata)
    )
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors and metadata."""
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118


def random_state(device: torch.device) -> Tensor:
    """State of the generators that a run on this device draws from, bytes of shape (n,) on the device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).to(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Put the generators back to what `random_state` returned for a device of the same kind."""
    own = len(torch.get_rng_state())
    # Copies: of a part of a tensor torch reads the wrong bytes.
    torch.set_rng_state(state[:own].cpu().clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[own:].cpu().clone(), device)
