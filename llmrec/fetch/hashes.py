"""Hashes that tell whether two model folders hold the same weights and the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from llmrec.errors import ModelError


def weights_hash(folder: Path) -> str:
    """Return the sha256 over all ``*.safetensors`` of a model folder: sorted relative names, sizes and bytes.

    Raises
    ------
    ModelError
        If the folder holds none.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.safetensors"), key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors: pass the folder of a model saved as safetensors")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """Return the sha256 of what decides which text becomes which token ids.

    That is ``tokenizer.json`` without its padding and truncation, which callers change in passing; where
    there is none, the vocabulary files.

    Raises
    ------
    ModelError
        If the folder holds no tokenizer.
    """
    fast = Path(folder) / "tokenizer.json"
    if fast.is_file():
        content = json.loads(fast.read_text(encoding="utf-8"))
        content.update(padding=None, truncation=None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    total = hashlib.sha256()
    names = ("added_tokens.json", "merges.txt", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
    files = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not files:
        raise ModelError(f"{folder} holds no tokenizer: pass a folder with tokenizer.json in it")
    for file in files:
        total.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return total.hexdigest()
