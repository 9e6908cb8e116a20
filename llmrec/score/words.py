"""What the word modes share: the vocabulary, the prompt in tokens, and a causal LM with its word head.

The prompt is an instruction, one line for each item of the history, the typed wish if there is one, and
what the mode asks. Each piece is tokenised by itself and ends in a line end, so that a history has the same
tokens whatever follows it, in training and in serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.errors import ConfigError, ModelError
from llmrec.prompt import Prompt
from llmrec.protocols import Codes, Query
from llmrec.quiet import loading_from
from llmrec.score.lines import TokenLines

STEP = 10
"""The window of a history moves by so many items, so that what was read of it can mostly be extended."""

ROWS = 256
"""States whose logits of all words are computed at once; in training all are kept for the gradients."""

CHUNK = 1000
"""Lines that are tokenised at once."""

WISH_TOKENS = 32
"""Tokens of a typed wish that are read, at most."""

LINE_ENDS = ("\n", " ")
"""What may end a line; the end-of-text token where a tokenizer has neither."""


class Vocabulary:
    """The tokenizer of a causal LM, as prompts of pieces need it. Words never become control tokens.

    Attributes
    ----------
    end
        The token that ends a line.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        with loading_from(folder):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = self.label(*LINE_ENDS)
        end = self._tokenizer.eos_token_id if found is None else found
        if end is None:
            raise ModelError(f"the tokenizer in {folder} has no line end and no end-of-text token")
        self.end: int = end

    def tokens(self, words: str) -> list[int]:
        """Tokens of words, without any that the tokenizer would add."""
        encoded = self._tokenizer(words, add_special_tokens=False, split_special_tokens=True)
        found: list[int] = encoded["input_ids"]
        return found

    def cut(self, words: str, limit: int) -> str:
        """A beginning of words that has at most `limit` tokens."""
        while (found := len(self.tokens(words))) > limit and len(words) > 1:
            words = words[: max(1, len(words) * limit // found)]
        return words

    def first(self, words: str) -> list[int]:
        """Tokens of the words that a prompt begins with, and the begin-of-text token where there is one."""
        begin = self._tokenizer.bos_token_id
        return ([] if begin is None else [begin]) + self.tokens(words)

    def lines(self, texts: Sequence[str], limit: int) -> TokenLines:
        """Tokens of the lines of items, at most `limit` each, without the line end."""
        return TokenLines.of(self._lines(texts, limit))

    def _lines(self, texts: Sequence[str], limit: int) -> Iterator[list[int]]:
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            encoded = self._tokenizer(chunk, add_special_tokens=False, split_special_tokens=True)
            for tokens in encoded["input_ids"]:
                yield [token for token in tokens[:limit] if token != self.end]

    def label(self, *words: str) -> int | None:
        """The token of the first of these that is one known token."""
        single = (tokens[0] for tokens in map(self.tokens, words) if len(tokens) == 1)
        return next((token for token in single if token != self._tokenizer.unk_token_id), None)


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt of the word modes in pieces: text files with one piece a line.

    Parameters
    ----------
    first
        Words before the history.
    between
        Lines after the history; one with ``{wish}`` is left out where no wish was typed.
    last
        Words after the candidates, empty where the prompt has none.
    """

    first: str
    between: tuple[str, ...]
    last: str

    @classmethod
    def of(cls, prompt: Prompt, slot: str | None) -> Layout:
        """Split a prompt at ``{history}`` and at the slot of the candidates, each a line of its own.

        Raises
        ------
        ConfigError
            If a slot is missing, unknown, not alone on its line, or where it is not filled; or if words
            follow the history where titles are to follow it.
        """
        lines = prompt.text.splitlines()
        wanted = ["{history}"] if slot is None else ["{history}", f"{{{slot}}}"]
        known = {line.strip("{}") for line in wanted} | {"wish"}
        if [line for line in lines if line in wanted] != wanted or not set(prompt.slots) <= known:
            raise ConfigError(
                f"prompt {prompt.name!r} needs the lines {' and '.join(wanted)}, in this order, and knows no "
                f"other slot than {{wish}}; it has {prompt.slots}"
            )
        places = [lines.index(line) for line in wanted]
        if places[0] == 0:
            raise ConfigError(f"prompt {prompt.name!r} must begin with words before {{history}}")
        after = len(lines) if slot is None else places[1]
        between = range(places[0] + 1, after)
        if any("{wish}" in line and at not in between for at, line in enumerate(lines)):
            where = "after {history}" if slot is None else f"between {' and '.join(wanted)}"
            raise ConfigError(f"prompt {prompt.name!r}: a line with {{wish}} stands {where}")
        if slot is None and any("{wish}" not in lines[at] for at in between):
            raise ConfigError(
                f"prompt {prompt.name!r}: only lines with {{wish}} may follow {{history}}, which goes on "
                "with the next title"
            )
        return cls(
            "\n".join(lines[: places[0]]),
            tuple(lines[places[0] + 1 : after]),
            "\n".join(lines[after + 1 :]),
        )


class WordsPrompt:
    """Histories, wishes and candidates in tokens.

    Parameters
    ----------
    vocabulary, layout
        Tokenizer and prompt.
    lines
        Tokens of each item's line by code.
    window
        Latest items of a history that are read, at most.
    """

    def __init__(self, vocabulary: Vocabulary, layout: Layout, lines: TokenLines, window: int) -> None:
        self.vocabulary, self.layout, self.lines, self.window = vocabulary, layout, lines, window
        self.start = [*vocabulary.first(layout.first), vocabulary.end]
        self.last = vocabulary.tokens(layout.last) if layout.last else []

    def beginning(self, history: Codes) -> list[int]:
        """Instruction and history in tokens."""
        return self.start + self.chain(read(history, self.window))

    def chain(self, items: Codes | Sequence[int]) -> list[int]:
        """The lines of items in tokens, one after another, each with its end."""
        tokens: list[int] = []
        for code in items:
            tokens += self.lines[code]
            tokens.append(self.vocabulary.end)
        return tokens

    def stem(self, query: Query) -> list[int]:
        """What stands between history and candidates: the wish, and what the mode asks."""
        tokens = []
        for line in self.layout.between:
            if "{wish}" in line:
                if not query.text:
                    continue
                line = line.replace("{wish}", self.vocabulary.cut(query.text, WISH_TOKENS))
            tokens += [*self.vocabulary.tokens(line), self.vocabulary.end]
        return tokens

    def longest(self, candidates: int, line_tokens: int, label: int = 0) -> int:
        """Tokens of the longest prompt that there may be, whatever items are added: about.

        Parameters
        ----------
        candidates
            In the prompt at once.
        line_tokens
            Of an item, at most.
        label
            Tokens before each candidate.
        """
        wish = Query(np.empty(0, np.int32), "wish")
        lines = (self.window + candidates) * (line_tokens + 1) + candidates * label
        return len(self.start) + lines + len(self.stem(wish)) + WISH_TOKENS + len(self.last)


class WordsModel(nn.Module, WordsPrompt):
    """A causal LM that reads items as lines of words.

    Parameters
    ----------
    body
        Inner transformer.
    head
        Output vectors of the vocabulary, shape (words, hidden), frozen.
    vocabulary, layout, lines, window
        As in `WordsPrompt`.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Parameter,
        vocabulary: Vocabulary,
        layout: Layout,
        lines: TokenLines,
        window: int,
    ) -> None:
        nn.Module.__init__(self)
        WordsPrompt.__init__(self, vocabulary, layout, lines, window)
        self.body = body
        self.head = head
        # Scale of the logits: the learned one of `likelihood`, 1 to begin with elsewhere.
        self.scale = nn.Parameter(torch.tensor(1.0))

    def logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Scaled logits of some words: (n, hidden) and (m,) -> (n, m), in float32."""
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ self.head[tokens].float().T * self.scale

    def log_probs(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one word a state among all words: (n, hidden) and (n,) -> (n,), in float32."""
        with torch.autocast(states.device.type, enabled=False):
            head = self.head.float()
            parts = [
                torch.log_softmax(part @ head.T, dim=-1).gather(1, own[:, None])[:, 0]
                for part, own in zip(
                    torch.split(states.float(), ROWS), torch.split(tokens, ROWS), strict=True
                )
            ]
        return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)

    @property
    def head_names(self) -> list[str]:
        """Names of the parameters that are trained in full and saved beside the adapter."""
        return ["scale"]


def read(history: Codes, window: int) -> Codes:
    """The latest items of a history, at most `window`; the first of them moves in steps."""
    if len(history) <= window:
        return history
    step = min(STEP, max(1, window // 2))
    return history[-(-(len(history) - window) // step) * step :]
