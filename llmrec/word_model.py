"""A tuned model of the word modes as one thing: made, saved, loaded, grown with the catalogue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrec.adapter import fresh_adapter, kept_adapter, on_device, write_adapter
from llmrec.card import Card
from llmrec.errors import ConfigError
from llmrec.families import Texts
from llmrec.lora import merge
from llmrec.persistence import Arrays, load_arrays, save_arrays
from llmrec.prompt import Prompt
from llmrec.protocols import Mask, Query
from llmrec.score.config import WordsConfig
from llmrec.score.labels import LettersScorer, YesNoScorer
from llmrec.score.likelihood import LikelihoodModel, LikelihoodScorer
from llmrec.score.lines import TokenLines
from llmrec.score.loading import body_dtype, load_causal, need_positions, shared_causal
from llmrec.score.packed import PackedReader
from llmrec.score.trie import ItemTrie
from llmrec.score.unseen import expected_counts, still_late
from llmrec.score.words import Layout, Vocabulary, WordsModel, WordsPrompt
from llmrec.score.wordwise import VocabularyScorer
from llmrec.text import changed_lines, typed_words

SLOTS = {"likelihood": None, "generate": None, "yes_no": "candidate", "letters": "candidates"}
"""What a mode's prompt needs beside the history."""

LINES, LINES_FORMAT = "lines.safetensors", 1
"""File of the lines in tokens and of their tree beside an adapter, and what its arrays mean."""

FIRST_SCALE = 0.3
"""Scale of the logits of `likelihood` before training: the prior over the lines leads at first."""


class WordLanguageModel:
    """A tuned model that reads items as words, with its settings and its card.

    Parameters
    ----------
    words
        With LoRA matrices in its body.
    config
        Its shape.
    lines
        The catalogue in words, by code.
    counts
        Weight of the training events of each item, shape (items,).
    card
        What it belongs to; None before it is trained.
    shape
        That of the trie of the lines (`ItemTrie.arrays`), if it is known; built where it is needed if not.
    late
        Whether an item came after training, shape (items,); None for none.
    """

    def __init__(
        self,
        words: WordsModel,
        config: WordsConfig,
        lines: Sequence[str],
        counts: NDArray[Any],
        card: Card | None = None,
        shape: Mapping[str, NDArray[Any]] | None = None,
        late: Mask | None = None,
    ) -> None:
        self.words, self.config, self.lines, self.counts, self.card = words, config, lines, counts, card
        self.late = np.zeros(len(counts), dtype=bool) if late is None else late
        self._shape = shape
        self.dtype = body_dtype(config.precision)
        self.scorer = self._scorer()
        self.scored: int | None = config.candidates
        self.scores_all = False
        self.judged: int | None = config.judged
        self.proposes = config.mode == "generate"
        # The tree of all lines is not grown for one request.
        self.reads_unlisted = SLOTS[config.mode] is not None

    def _scorer(self) -> LikelihoodScorer | VocabularyScorer | YesNoScorer | LettersScorer:
        reader = PackedReader(self.words.body, memory=self.config.memory_mb * 2**20)
        if self.config.mode == "yes_no":
            return YesNoScorer(self.words, reader)
        if self.config.mode == "letters":
            return LettersScorer(self.words, reader, window=self.config.listed, orders=self.config.orders)
        if self.config.normalise == "vocabulary":
            return VocabularyScorer(self.words, reader)
        end, smoothing = self.words.vocabulary.end, self.config.smoothing
        known, late = torch.from_numpy(np.asarray(self.counts)), torch.from_numpy(self.late)
        counts = expected_counts(known, late).numpy()
        if self._shape is None:
            trie = ItemTrie.of(self.words.lines, end, counts, smoothing)
        else:
            trie = ItemTrie(self._shape, counts, smoothing)
        self._shape = trie.arrays()
        return LikelihoodScorer(LikelihoodModel(self.words, trie), reader, self.config.beam)

    def typed(self, item: int, rng: np.random.Generator) -> Sequence[int]:
        """Tokens of what somebody might type who looks for an item; none for a line without words."""
        words = typed_words(self.lines[item], rng)
        return self.words.stem(Query(np.empty(0, np.int32), words)) if words else ()

    @classmethod
    def new(
        cls,
        config: WordsConfig,
        base: Path,
        lines: Sequence[str],
        counts: NDArray[Any],
        seed: int = 0,
        late: Mask | None = None,
    ) -> WordLanguageModel:
        """Make a model to train: fresh LoRA matrices, and the head as it was.

        Parameters
        ----------
        base
            Folder of the causal LM.
        lines
            The catalogue in words, by code.
        counts
            Weight of the training events of each item, shape (items,).
        late
            Whether an item comes after training, shape (items,); None for none.

        Raises
        ------
        ConfigError
            If it shall learn from wishes, and its prompt has no place for one, or if the base model cannot
            read prompts as long as they may be.
        """
        layout = layout_of(config)
        if config.wishes > 0 and not any("{wish}" in line for line in layout.between):
            raise ConfigError(f"lm.wishes needs a line with {{wish}} in the prompt {config.prompt_name!r}")
        torch.manual_seed(seed)
        body, head = load_causal(base, config.layers, body_dtype(config.precision))
        vocabulary = Vocabulary(base)
        tokens = vocabulary.lines(lines, config.line_tokens)
        adapted = fresh_adapter(body, config)
        words = WordsModel(adapted, head, vocabulary, layout, tokens, config.window)
        listed, label = (config.listed, len(vocabulary.tokens("A: "))) if config.mode == "letters" else (1, 0)
        longest = words.longest(listed, config.line_tokens, label)
        need_positions(body, longest, "lm.window, lm.line_tokens or lm.listed")
        if SLOTS[config.mode] is None:
            torch.nn.init.constant_(words.scale, FIRST_SCALE)
        return cls(words, config, lines, counts, late=late)

    def save(self, folder: Path) -> None:
        """Write adapter, scale, counts and card into a folder; only a trained model can be."""
        counts = torch.from_numpy(np.asarray(self.counts, dtype=np.float32))
        head = {"scale": self.words.scale, "counts": counts, "late": torch.from_numpy(self.late)}
        write_adapter(folder, self.words.body, head, self.config, self.card)
        lines = self.words.lines
        # Who loads it with the same lines maps them and their tree instead of making them again.
        key = _key(self.lines, self.config, self.words.vocabulary)
        arrays: dict[str, Arrays] = {
            "lines": {"tokens": lines.tokens, "offsets": lines.offsets},
            "key": {"sha256": key},
        }
        if self._shape is not None:
            arrays["trie"] = self._shape
        save_arrays(folder / LINES, arrays)

    @classmethod
    def restored(
        cls,
        folder: Path,
        base: Path,
        texts: Texts,
        config: WordsConfig,
        card: Card,
        head: dict[str, Tensor],
        *,
        trainable: bool = False,
        shares: bool = False,
    ) -> WordLanguageModel:
        """Put together what `read_adapter` read from a folder; see `load_language_model`."""
        load = shared_causal if shares else load_causal
        body, vectors = load(base, config.layers, body_dtype(config.precision))
        vocabulary = Vocabulary(base)
        lines, shape = lines_in(folder, texts.lines, config, vocabulary)
        adapted = kept_adapter(body, folder, trainable=trainable)
        words = WordsModel(adapted, vectors, vocabulary, layout_of(config), lines, config.window)
        with torch.no_grad():
            words.scale.copy_(head["scale"])
        on_device(words)
        if not shares:
            merge(words.body)
        known = head["counts"].numpy()
        late = padded(head["late"].numpy(), len(texts.lines), True)
        return cls(words, config, texts.lines, padded(known, len(texts.lines)), card, shape, late)

    def grown(self, texts: Texts) -> WordLanguageModel:
        """The same for a catalogue whose texts changed or grew: new items have no events."""
        old, lines = self.words, texts.lines
        tokens = tokens_of(old, self.lines, lines, self.config.line_tokens)
        words = WordsModel(old.body, old.head, old.vocabulary, old.layout, tokens, old.window)
        words.scale = old.scale
        same = self._shape if list(lines) == list(self.lines) else None
        counts, late = padded(self.counts, len(lines)), padded(self.late, len(lines), True)
        return WordLanguageModel(words.eval(), self.config, lines, counts, self.card, same, late)

    def fresh(self) -> WordLanguageModel:
        """The same with nothing read; who still asks the old one leaves nothing here."""
        return WordLanguageModel(
            self.words, self.config, self.lines, self.counts, self.card, self._shape, self.late
        )

    def recounted(self, counts: NDArray[Any]) -> WordLanguageModel:
        """The same model after other training events, whose weight for each item has shape (items,).

        For items that came after the earlier training see `still_late`.
        """
        late = still_late(self.late, self.counts, counts)
        return WordLanguageModel(self.words, self.config, self.lines, counts, self.card, self._shape, late)


def lines_in(
    folder: Path, lines: Sequence[str], config: WordsConfig, vocabulary: Vocabulary
) -> tuple[TokenLines, Mapping[str, NDArray[Any]] | None]:
    """Tokens of the lines of a catalogue, and the shape of their trie if the folder has it.

    They are mapped from the file that `WordLanguageModel.save` wrote, if that is of the same lines.
    """
    path = folder / LINES
    kept = load_arrays(path) if path.is_file() else {}
    if kept and np.array_equal(kept["key"]["sha256"], _key(lines, config, vocabulary)):
        return TokenLines(**kept["lines"]), kept.get("trie")
    return vocabulary.lines(lines, config.line_tokens), None


def _key(lines: Sequence[str], config: WordsConfig, vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """Hash of what the tokens of lines depend on; that the tokenizer is the same one, the card says."""
    said = json.dumps([LINES_FORMAT, config.line_tokens, vocabulary.end])
    digest = hashlib.sha256(said.encode())
    for line in lines:
        digest.update(f"\n{len(line)} {line}".encode(errors="surrogatepass"))
    return np.frombuffer(digest.digest(), np.uint8)


def layout_of(config: WordsConfig) -> Layout:
    """The prompt of a mode in pieces."""
    return Layout.of(Prompt.load(config.prompt_name), SLOTS[config.mode])


def tokens_of(old: WordsPrompt, lines: Sequence[str], grown: Sequence[str], limit: int) -> TokenLines:
    """Tokens of the lines of a catalogue that changed or grew; the others' are those there were."""
    changed = changed_lines(lines, grown)
    fresh = old.vocabulary.lines([grown[code] for code in changed], limit)
    return old.lines.changed(changed, fresh, len(grown))


def padded(values: NDArray[Any], items: int, new: float = 0) -> NDArray[Any]:
    """Values of the items of a catalogue that has grown: what new ones have is the same for all."""
    return np.pad(values, (0, items - len(values)), constant_values=new)
