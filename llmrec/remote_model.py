"""A tuned model of the word modes whose language model runs on an inference server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrec.adapter import CARD, HEAD, LORA, PAGE, SETTINGS
from llmrec.card import Card
from llmrec.errors import ModelError
from llmrec.families import Texts
from llmrec.score.config import LMConfig, WordsConfig
from llmrec.score.engine import Engine
from llmrec.score.remote import RemoteScorer, RemoteVocabularyScorer, RemoteYesNoScorer
from llmrec.score.words import Vocabulary, WordsPrompt
from llmrec.word_model import layout_of, lines_in, padded, tokens_of

KINDS = {("yes_no", "trie"): RemoteYesNoScorer, ("likelihood", "vocabulary"): RemoteVocabularyScorer}
"""Modes that a server can run, with their normalisation."""

FILES = (CARD, PAGE, HEAD, LORA, SETTINGS)
"""Of an adapter's folder."""


class RemoteLanguageModel:
    """The adapter's settings and prompts here, its weights on the server. To train it, load it locally.

    Parameters
    ----------
    files
        Of the adapter's folder, by name: it may be gone when the model is saved.
    model
        Name that the server gives to it.
    lines
        The catalogue in words, by code.
    counts
        Weight of the training events of each item, shape (items,).
    """

    scorer: RemoteScorer
    proposes = False

    def __init__(
        self,
        prompt: WordsPrompt,
        config: WordsConfig,
        engine: Engine,
        model: str,
        scale: float,
        files: Mapping[str, bytes],
        lines: Sequence[str],
        counts: NDArray[Any],
        card: Card,
    ) -> None:
        self.config: LMConfig = config
        self._words, self._prompt, self._files = config, prompt, files
        self._served = engine, model, scale
        self.lines, self.counts = lines, counts
        self.card: Card | None = card
        self.scored: int | None = config.candidates
        self.scores_all = False
        self.judged: int | None = config.judged
        self.reads_unlisted = config.mode == "yes_no"
        self.scorer = KINDS[config.mode, config.normalise](prompt, engine, model, scale)

    def close(self) -> None:
        """Let go of the connections to the server."""
        self._served[0].close()

    @classmethod
    def restored(
        cls,
        folder: Path,
        base: Path,
        texts: Texts,
        config: LMConfig,
        card: Card,
        head: Mapping[str, Any],
        engine: Engine,
        model: str,
    ) -> RemoteLanguageModel:
        """Put together what `read_adapter` read from a folder; see `load_language_model`.

        Raises
        ------
        ModelError
            If a server cannot run it.
        """
        if not isinstance(config, WordsConfig) or (config.mode, config.normalise) not in KINDS:
            raise ModelError(
                f"an inference server cannot run the mode {config.mode}, which needs hidden states or the "
                f"tree of the catalogue: unset engine.url and LLMREC_ENGINE_URL, or tune yes_no, or "
                f"likelihood with normalise = 'vocabulary'"
            )
        if config.layers is not None:
            raise ModelError(
                f"{folder} was tuned on the first {config.layers} layers, and an inference server runs them "
                f"all; tune it with layers not set"
            )
        vocabulary = Vocabulary(base)
        lines, _ = lines_in(folder, texts.lines, config, vocabulary)
        prompt = WordsPrompt(vocabulary, layout_of(config), lines, config.window)
        counts = padded(head["counts"].numpy(), len(texts.lines))
        scale = float(head["scale"])
        files = {name: (folder / name).read_bytes() for name in FILES}
        return cls(prompt, config, engine, model, scale, files, texts.lines, counts, card)

    def save(self, folder: Path) -> None:
        """Write the adapter as it was read into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def grown(self, texts: Texts) -> RemoteLanguageModel:
        """The same for a catalogue whose texts changed or grew: new items have no events."""
        old = self._prompt
        tokens = tokens_of(old, self.lines, texts.lines, self._words.line_tokens)
        return self._with(
            WordsPrompt(old.vocabulary, old.layout, tokens, old.window),
            texts.lines,
            padded(self.counts, len(texts.lines)),
        )

    def fresh(self) -> RemoteLanguageModel:
        """The same under another salt: what the server has read is found by nobody."""
        return self._with(self._prompt, self.lines, self.counts)

    def recounted(self, counts: NDArray[Any]) -> RemoteLanguageModel:
        """The same model after other training events, whose weight for each item has shape (items,)."""
        return self._with(self._prompt, self.lines, np.asarray(counts))

    def _with(self, prompt: WordsPrompt, lines: Sequence[str], counts: NDArray[Any]) -> RemoteLanguageModel:
        assert self.card is not None
        return RemoteLanguageModel(prompt, self._words, *self._served, self._files, lines, counts, self.card)
