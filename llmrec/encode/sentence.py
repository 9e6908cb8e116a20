"""BERT-style text encoder, built on sentence-transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.protocols import Floats
from llmrec.quiet import quiet_transformers

READ = (
    "config.json",
    "config_sentence_transformers.json",
    "merges.txt",
    "modules.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of a model that decide, beside its weights, what vectors it makes, in whatever folder of it."""


class SentenceEncoder:
    """Unit vectors from a sentence-transformers model in a local folder.

    Parameters
    ----------
    folder
        A sentence-transformers model with safetensors weights.
    batch
        Texts encoded at once.
    on_progress
        Called with (texts done, texts in all) while many texts are encoded.
    """

    def __init__(
        self, folder: Path, *, batch: int = 256, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as missing:
            raise ImportError('the sentence encoder needs: pip install "llmrec[lm]"') from missing
        self.folder, self.batch, self.on_progress = folder, batch, on_progress
        with quiet_transformers():
            self._model: Any = SentenceTransformer(
                str(folder), trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        self.dim = int(self._model.encode(["a"], show_progress_bar=False).shape[1])
        self.fingerprint = _hash(folder)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return float32 vectors of length 1, shape (len(texts), dim)."""
        # Texts of like length together, so that little of a batch is padding.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            vectors[rows] = self._model.encode(
                [texts[i] for i in rows],
                batch_size=self.batch,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if self.on_progress is not None:
                self.on_progress(start + len(rows), len(order))
        return vectors


def _hash(folder: Path) -> str:
    """Hash of the weights, and of the files that say how texts are cut up, read and pooled."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Folders whose names begin with a dot are of programs that download.
        hidden = any(part.startswith(".") for part in name.parts)
        if (path.name in READ or path.suffix == ".safetensors") and not hidden and path.is_file():
            digest.update(f"{name.as_posix()}\n".encode())
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
