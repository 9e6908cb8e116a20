"""The card of an adapter: what it was trained on and with, checked when it is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmrec.catalog import RENDERER_HASH
from llmrec.errors import ModelError
from llmrec.fetch import tokenizer_hash, weights_hash
from llmrec.prompt import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Card:
    """What an adapter belongs to. The first five must match when it is loaded, data and versions should.

    `training` holds what was done: counts of the data and its newest time stamp, settings, the curve, the
    measures, the licence of the base; `llmrec.model_card` makes a page of it.
    """

    base_sha256: str
    tokenizer_sha256: str
    prompt_sha256: str
    renderer_sha256: str
    encoder_sha256: str
    data_sha256: str
    versions: dict[str, str]
    training: dict[str, Any]

    def noting(self, **notes: Any) -> Card:
        """The same with more to say of the training; what a note names already is replaced."""
        return replace(self, training={**self.training, **notes})

    def check_items(self, ids: Sequence[str]) -> None:
        """Refuse a catalogue whose first items are not those that the adapter was trained on.

        Raises
        ------
        ModelError
            If it has fewer, or others; what a card does not say is not checked.
        """
        data = self.training.get("data", {})
        known = data.get("items", 0)
        if len(ids) < known:
            raise ModelError(
                f"the adapter was trained on {known:,} items, and the catalogue has {len(ids):,}"
            )
        if data.get("items_sha256") not in (None, hash_ids(ids[:known])):
            raise ModelError(
                "the adapter was trained on another catalogue: other items, or the same in another order"
            )

    def check(self, other: Card) -> None:
        """Refuse another base, tokenizer, prompt, renderer or encoder; warn of other data and versions.

        Raises
        ------
        ModelError
            Naming both hashes.
        """
        names = ("base", "tokenizer", "prompt", "renderer", "encoder")
        for name in names:
            mine, theirs = getattr(self, f"{name}_sha256"), getattr(other, f"{name}_sha256")
            if mine != theirs:
                raise ModelError(
                    f"the adapter belongs to another {name}: {mine[:12]}... then, {theirs[:12]}... now; "
                    f"use the {name} it was trained with, or fine-tune again"
                )
        if self.data_sha256 != other.data_sha256:
            logger.warning(
                "the adapter was trained on other events than the retrievers were fitted on; "
                "fine-tune again to bring it up to date"
            )
        changed = [
            f"{n} {v} -> {other.versions.get(n)}"
            for n, v in self.versions.items()
            if other.versions.get(n) != v
        ]
        if changed:
            logger.warning("the adapter was trained with other versions: %s", ", ".join(changed))


def hash_ids(ids: Sequence[str]) -> str:
    """Hash of the ids of a catalogue, in the order of their codes."""
    return hashlib.sha256("\0".join(ids).encode(errors="surrogatepass")).hexdigest()


def make_card(prompt: str, base: Path, encoder: str, data: str, report: Mapping[str, Any]) -> Card:
    """The card of an adapter trained here and now."""
    return Card(
        base_sha256=weights_hash(base),
        tokenizer_sha256=tokenizer_hash(base),
        prompt_sha256=Prompt.load(prompt).sha256,
        renderer_sha256=RENDERER_HASH,
        encoder_sha256=encoder,
        data_sha256=data,
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        training=dict(report),
    )
