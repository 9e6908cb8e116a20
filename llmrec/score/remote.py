"""Scorers whose language model runs on an inference server: the same prompts, the same numbers.

`yes_no` asks vLLM's ``/generative_scoring``, which reads what all candidates share once. `likelihood`,
normalised over the vocabulary, sums the log-probabilities of the prompt's own words (``prompt_logprobs``).
Both send tokens, so that nothing depends on how the server would tokenise.
"""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from llmrec.errors import EngineError
from llmrec.protocols import Codes, Floats, Query
from llmrec.score.engine import Engine
from llmrec.score.labels import yes_no_labels
from llmrec.score.packed import in_turn
from llmrec.score.words import WordsPrompt

SURE = 1e-12
"""A probability that is nearer to 0 or 1 is taken for this much."""


class RemoteScorer(ABC):
    """What both share.

    Parameters
    ----------
    model
        Name that the server gives to the adapter.
    scale
        Learned scale of the logits.
    """

    name = "lm"
    path: ClassVar[str]
    """Where the server answers."""

    def __init__(self, prompt: WordsPrompt, engine: Engine, model: str, scale: float = 1.0) -> None:
        self.prompt, self.engine, self.model, self.scale = prompt, engine, model, scale
        self._salt = secrets.token_urlsafe(32)

    def forget(self) -> None:
        """Nobody finds what the server keeps of histories any more; it goes when its place is needed."""
        self._salt = secrets.token_urlsafe(32)

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Score of each candidate of each query; see the class.

        Raises
        ------
        EngineError
            If the server gives none in time.
        """
        # Those that are asked at once have the whole time.
        return in_turn(self._of_items, queries, candidates)

    def _of_items(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        return self._scores(queries, [[self.prompt.lines[code] for code in own] for own in candidates])

    def _scores(self, queries: Sequence[Query], lines: Sequence[Sequence[Sequence[int]]]) -> list[Floats]:
        asked = [i for i, own in enumerate(lines) if own]
        starts = [self.prompt.beginning(queries[i].history) + self.prompt.stem(queries[i]) for i in asked]
        bodies = [self._body(start, lines[i]) for start, i in zip(starts, asked, strict=True)]
        scores = [np.empty(0, np.float32) for _ in lines]
        for i, start, answer in zip(asked, starts, self.engine.ask(self.path, bodies), strict=True):
            try:
                values = self._read(answer, len(start))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as unknown:
                raise EngineError(
                    f"the inference server on {self.engine.where} gave an answer to {self.path} that is not "
                    f"vLLM's: {type(unknown).__name__}: {unknown}"
                ) from unknown
            if len(values) != len(lines[i]):
                raise EngineError(f"asked {self.path} for {len(lines[i])} scores, got {len(values)}")
            scores[i] = np.array(values, np.float32)
        return scores

    @abstractmethod
    def _body(self, start: Sequence[int], lines: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What is sent for one query: its prompt in tokens, and the lines of its candidates."""

    @abstractmethod
    def _read(self, answer: dict[str, Any], start: int) -> list[float]:
        """The scores in what came back; `start` is the number of tokens before the candidates."""


class RemoteYesNoScorer(RemoteScorer):
    """Log-odds of yes after each candidate's line, as `YesNoScorer` has them."""

    path = "/generative_scoring"

    def __init__(self, prompt: WordsPrompt, engine: Engine, model: str, scale: float = 1.0) -> None:
        super().__init__(prompt, engine, model, scale)
        self._labels = list(yes_no_labels(prompt.vocabulary))

    def score_texts(self, query: Query, texts: Sequence[str], limit: int) -> Floats:
        """The same for texts that need not be items, of which the first `limit` tokens are read."""
        return self._scores([query], [self.prompt.vocabulary.lines(texts, limit)])[0]

    def _body(self, start: Sequence[int], lines: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {
            "model": self.model,
            "query": list(start),
            "items": [[*line, self.prompt.vocabulary.end, *self.prompt.last] for line in lines],
            "label_token_ids": self._labels,
            "add_special_tokens": False,
            "cache_salt": self._salt,
        }

    def _read(self, answer: dict[str, Any], start: int) -> list[float]:
        found = sorted(answer["data"], key=lambda one: one["index"])
        sure = [min(max(float(one["score"]), SURE), 1.0 - SURE) for one in found]
        return [self.scale * (math.log(p) - math.log1p(-p)) for p in sure]


class RemoteVocabularyScorer(RemoteScorer):
    """Log-probability of the line of each candidate, as `VocabularyScorer` has it."""

    path = "/v1/completions"

    def _body(self, start: Sequence[int], lines: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": [[*start, *line, self.prompt.vocabulary.end] for line in lines],
            "prompt_logprobs": 0,
            "max_tokens": 1,
            "temperature": 0,
            "cache_salt": self._salt,
        }

    def _read(self, answer: dict[str, Any], start: int) -> list[float]:
        found = sorted(answer["choices"], key=lambda one: one["index"])
        return [
            math.fsum(next(iter(word.values()))["logprob"] for word in one["prompt_logprobs"][start:])
            for one in found
        ]
