"""Training on the lines of items: on the choices that lead to them, or word by word among all words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import DataError
from llmrec.score.config import TrainingConfig
from llmrec.score.likelihood import LikelihoodModel, LikelihoodScorer
from llmrec.score.packed import Row, forward, row_of
from llmrec.score.tasks import ROW, Typed, asking
from llmrec.score.trie import ROOT, Tree
from llmrec.score.words import WordsModel
from llmrec.score.wordwise import VocabularyScorer
from llmrec.sequences import Portions, Window, packs, rows_of, shares, weight_of, weighted_mean


class LinesTask(ABC):
    """The line of the next item at each place of a history, word by word.

    All is learned from one forward over the history's own tokens. Histories lie side by side behind one
    instruction.

    Parameters
    ----------
    source
        Windows of histories; an event of weight 0 is read and not learned.
    typed, wishes
        What draws a wish for an item, and the share of windows whose last item is asked for by one.
    """

    def __init__(
        self,
        model: WordsModel,
        source: Portions,
        config: TrainingConfig,
        typed: Typed | None = None,
        wishes: float = 0.0,
    ) -> None:
        self.model, self.config, self.source = model, config, source
        self.typed, self.wishes = typed, wishes
        self._sizes = model.lines.lengths() + 1

    def epoch(self, rng: np.random.Generator, parts: int = 1) -> Iterator[list[Window]]:
        """Windows that hold every event once, grouped at random."""
        for pieces in self.source.portions(rng, self.model.window):
            pieces = asking(pieces, self.typed, self.wishes, rng)
            for group in packs(self._lengths(pieces), parts * self.config.tokens_per_step, rng):
                yield [pieces[i] for i in group]

    def split(self, batch: Sequence[Window], parts: int) -> list[list[Window]]:
        """Parts with about as many words each."""
        return [[batch[i] for i in part] for part in shares(self._lengths(batch), parts)]

    def weight(self, batch: Sequence[Window]) -> float:
        """Weight of the events of a batch."""
        return weight_of(batch)

    def _lengths(self, batch: Sequence[Window]) -> list[int]:
        """Words of each window."""
        return [int(self._sizes[window.items].sum()) + len(window.typed) for window in batch]

    def _chain(self, window: Window) -> list[int]:
        """The lines of a window, the wish before the last one."""
        words = self.model
        return [*words.chain(window.items[:-1]), *window.typed, *words.chain(window.items[-1:])]

    def loss(self, batch: Sequence[Window]) -> Tensor:
        """Mean nats an item, each with the weight of its event."""
        words, lead = self.model, len(self.model.start)
        rows: list[Row] = []
        lines: list[Line] = []
        in_order: list[Window] = []
        for number, row in enumerate(rows_of(self._lengths(batch), ROW)):
            windows = [batch[i] for i in row]
            in_order += windows
            tree, starts = Tree.beside([self._chain(window) for window in windows])
            rows.append(row_of(words.start, tree))
            for window, start in zip(windows, starts.tolist(), strict=True):
                place = start
                for nth, code in enumerate(window.items.tolist(), start=1):
                    if nth == len(window):
                        place += len(window.typed)
                    # The state before a chain's first word is that of the instruction's last.
                    lines.append(
                        Line(code, number, lead - 1 if place == start else lead + place - 1, lead + place)
                    )
                    place += int(self._sizes[code])
        hidden, _ = forward(words.body, rows, keep=False)
        return weighted_mean(self._nats(hidden, lines), in_order)

    @abstractmethod
    def _nats(self, hidden: Tensor, lines: Sequence[Line]) -> Tensor:
        """Nats of each line, from the states of all rows: shape (lines,)."""

    def events(self, batch: Sequence[Window]) -> int:
        """Items of a batch."""
        return sum(map(len, batch))


@dataclass(frozen=True, slots=True)
class Line:
    """Where the line of an item stands: its row, the place before its first word, and that of its first."""

    code: int
    row: int
    before: int
    first: int

    def state(self, depth: int) -> int:
        """Place of the state before the word number `depth` of the line."""
        return self.before if depth == 0 else self.first + depth - 1


class LikelihoodTask(LinesTask):
    """Lines as `likelihood` scores them: the choices on the trie. Forced words cost and give no loss."""

    def __init__(
        self,
        model: LikelihoodModel,
        source: Portions,
        config: TrainingConfig,
        typed: Typed | None = None,
        wishes: float = 0.0,
    ) -> None:
        super().__init__(model.words, source, config, typed, wishes)
        if not (model.trie.last - model.trie.first > 1).any():
            raise DataError("nothing to learn: all items have the same title, so that no word is a choice")
        self.likelihood = model

    def _nats(self, hidden: Tensor, lines: Sequence[Line]) -> Tensor:
        codes = np.array([line.code for line in lines], np.int32)
        # By node: row, place of the state before the choice, child taken, and line that it belongs to.
        asked: dict[int, list[tuple[int, int, int, int]]] = {}
        for number, line in enumerate(lines):
            for depth, node, child in self._on_the_way(line.code):
                asked.setdefault(node, []).append((line.row, line.state(depth), child, number))
        nats = -torch.from_numpy(np.log(self.likelihood.trie.share(codes))).float().to(hidden.device)
        for node, places in asked.items():
            row, place, child, of = torch.tensor(places, device=hidden.device).T
            values = self.likelihood.children(hidden[row, place], node)
            nats = nats.index_add(0, of, -values.gather(1, child[:, None])[:, 0])
        return nats

    def _on_the_way(self, code: int) -> list[tuple[int, int, int]]:
        """Choices on the way to an item: words before it, the node, and the number of the child taken."""
        trie = self.likelihood.trie
        path = trie.path(int(trie.leaf[code]))
        steps = enumerate(zip([ROOT, *path[:-1]], path, strict=True))
        return [
            (depth, node, int(child - trie.first[node]))
            for depth, (node, child) in steps
            if trie.last[node] - trie.first[node] > 1
        ]


class NextTokenTask(LinesTask):
    """Lines by the usual loss: every word is one among all words, as `VocabularyScorer` scores them."""

    def _nats(self, hidden: Tensor, lines: Sequence[Line]) -> Tensor:
        asked = [
            (line.row, line.state(depth), token, number)
            for number, line in enumerate(lines)
            for depth, token in enumerate(self.model.chain([line.code]))
        ]
        row, place, token, of = torch.tensor(asked, device=hidden.device).T
        values = self.model.log_probs(hidden[row, place], token)
        return torch.zeros(len(lines), device=hidden.device).index_add(0, of, -values)


def lines_task(
    scorer: LikelihoodScorer | VocabularyScorer,
    source: Portions,
    config: TrainingConfig,
    typed: Typed | None = None,
    wishes: float = 0.0,
) -> LinesTask:
    """What a model is trained by that scores items by their lines."""
    if isinstance(scorer, VocabularyScorer):
        return NextTokenTask(scorer.words, source, config, typed, wishes)
    return LikelihoodTask(scorer.model, source, config, typed, wishes)
