"""The `item_tokens` model: each history item enters the language model as one vector.

The prompt is an instruction in words followed by one input vector an item: a projection of the item's
text embedding plus a learned id vector. The hidden state after each item, projected, times the output
vectors of all items gives the log-probability of the next item over the whole catalogue, in one forward
pass and without any order of candidates to be biased by. After E4SRec (arXiv 2312.02443), LLaRA
(arXiv 2312.02445) and HLLM (arXiv 2409.12740).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.errors import ModelError
from llmrec.protocols import Codes, Floats, Hits, Mask, Query, VectorIndex
from llmrec.quiet import loading_from
from llmrec.ranking import tops
from llmrec.score.attention import additive
from llmrec.score.nearest import Nearest
from llmrec.score.unseen import expected_counts
from llmrec.score.words import WISH_TOKENS, Vocabulary
from llmrec.sequences import Window, pad, rows_of

SUMMED = 1000
"""Items whose probabilities stand for those of a catalogue that is too large to sum over."""

CHUNK = 128
"""Queries whose scores of the whole catalogue are held at once."""


def instruction_tokens(folder: Path, words: str) -> list[int]:
    """Tokenise the instruction; the begin-of-text token is put first where the model has one."""
    from transformers import AutoTokenizer

    with loading_from(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens: list[int] = tokenizer(words)["input_ids"]
    # Some end every text with it, and the history goes on from here.
    while tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def as_words(tokens: Sequence[int]) -> Codes:
    """Word tokens as they stand among item codes: below 0, so that nothing is both."""
    return -1 - np.asarray(tokens, np.int32)


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is read of one history in training.

    Parameters
    ----------
    elements
        Item codes, and words as `as_words` has them, oldest first, shape (n,).
    asked
        How many elements come before each item that is predicted, ascending.
    """

    elements: Codes
    asked: NDArray[np.int64]

    @classmethod
    def of(cls, window: Window) -> Stretch:
        """Every item of a window is predicted; a wish is read in place of the last one, and before it."""
        asked = np.arange(len(window))
        if not window.typed:
            return cls(window.items, asked)
        asked[-1] += len(window.typed)
        return cls(np.concatenate([window.items[:-1], as_words(window.typed)]), asked)


class Wish:
    """Turns a typed wish into the words that the prompt has for it.

    Parameters
    ----------
    line
        Of the prompt, with the slot ``{wish}``.
    """

    def __init__(self, vocabulary: Vocabulary, line: str) -> None:
        self._vocabulary = vocabulary
        before, after = line.split("{wish}")
        self._before = [vocabulary.end, *vocabulary.tokens(before.rstrip())]
        self._after = [*vocabulary.tokens(after), vocabulary.end]

    def tokens(self, text: str) -> list[int]:
        """The line with these words in it, of which the first tokens are read."""
        return [*self._before, *self._vocabulary.tokens(f" {text}")[:WISH_TOKENS], *self._after]


class ItemTokenModel(nn.Module):
    """A causal LM body with item vectors going in and item log-probabilities coming out.

    Parameters
    ----------
    body
        Inner transformer; takes `inputs_embeds` (batch, length, hidden), gives hidden states.
    instruction
        Token ids of the words before the history, at least one.
    text_vectors
        Float32 text embeddings of the catalogue, shape (items, text_dim).
    counts
        Weight of the training events of each item, shape (items,). Items with count 0 have no id vector: they
        are known by their text alone.
    dropout
        On the components of the input vectors, in training.
    id_dropout, id_out_dropout
        Share of items that are known by their text alone for one step of training, where they are read and
        where they are scored. Id vectors learn single histories by heart; this makes the text carry the rest.
    late
        Whether an item came after training, shape (items,); None for none.
    drawn
        Whether the head is drawn at random; what is drawn otherwise is left open, for weights that are there.
    """

    text_vectors: Tensor
    counts: Tensor
    instruction: Tensor
    late: Tensor
    unseen: Tensor

    def __init__(
        self,
        body: nn.Module,
        instruction: Sequence[int],
        text_vectors: Floats,
        counts: NDArray[Any],
        head_dim: int = 256,
        dropout: float = 0.2,
        id_dropout: float = 0.0,
        id_out_dropout: float = 0.0,
        late: Mask | None = None,
        *,
        drawn: bool = True,
    ) -> None:
        super().__init__()
        if len(instruction) == 0:
            raise ModelError("the instruction has no tokens; the first item needs a position before it")
        self.body = body
        config: Any = body.config
        hidden: int = config.hidden_size
        items, text_dim = text_vectors.shape
        words: Tensor = body.get_input_embeddings().weight  # type: ignore[operator]
        self.register_buffer("instruction", torch.tensor(instruction, dtype=torch.long), persistent=False)
        self.register_buffer("text_vectors", torch.from_numpy(text_vectors), persistent=False)
        self.register_buffer("counts", torch.from_numpy(counts.astype(np.float32)), persistent=False)
        came_late = np.zeros(items, dtype=bool) if late is None else late
        self.register_buffer("late", torch.from_numpy(came_late), persistent=False)
        # Fitted after training, see `fit_unseen`.
        self.register_buffer("unseen", torch.tensor(0.0), persistent=False)

        make: Any = (lambda kind, *sizes: kind(*sizes)) if drawn else nn.utils.skip_init
        self.text_in = make(nn.Linear, text_dim, hidden)
        self.id_in = make(nn.Embedding, items, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.state = make(nn.Linear, hidden, head_dim)
        self.text_out = make(nn.Linear, text_dim, head_dim)
        self.id_out = make(nn.Embedding, items, head_dim)
        self.dropout = nn.Dropout(dropout)
        self.id_dropout, self.id_out_dropout = id_dropout, id_out_dropout
        if not drawn:
            return
        spread = float(words.detach().float().std())
        # Unit text vectors have components of spread 1/sqrt(text_dim), so unit-variance weights give
        # inputs with the spread of the LM's own word embeddings.
        nn.init.normal_(self.text_in.weight, std=spread)
        nn.init.zeros_(self.text_in.bias)
        nn.init.normal_(self.id_in.weight, std=spread / 2)
        nn.init.normal_(self.id_out.weight, std=0.02)

    @property
    def head_names(self) -> list[str]:
        """Names of the parameters that are trained in full and saved beside the adapter."""
        return [n for n, _ in self.named_parameters() if not n.startswith("body.")]

    def item_inputs(self, codes: Tensor) -> Tensor:
        """Input vectors of items: codes of any shape -> (..., hidden)."""
        known = self._with_id(codes, self.id_dropout)
        with torch.autocast(codes.device.type, enabled=False):
            vectors: Tensor = self.text_in(self.text_vectors[codes]) + self.id_in(self._row(codes)) * known
        return vectors

    def item_outputs(self) -> Tensor:
        """Output vectors of all items, shape (items, head_dim)."""
        return self.outputs_of(torch.arange(len(self.counts), device=self.counts.device))

    def outputs_of(self, codes: Tensor) -> Tensor:
        """Output vectors of some items: (n,) -> (n, head_dim)."""
        known = self._with_id(codes, self.id_out_dropout)
        with torch.autocast(known.device.type, enabled=False):
            vectors: Tensor = self.text_out(self.text_vectors[codes]) + self.id_out(self._row(codes)) * known
        return vectors

    def _row(self, codes: Tensor) -> Tensor:
        """Rows of the id vectors; any for items that came after these were made, which have none."""
        return codes.clamp(max=self.id_in.num_embeddings - 1)

    def share_head(self, other: ItemTokenModel) -> None:
        """Take the trained parts of a model over another catalogue, whose first items have the id vectors."""
        for name in ("text_in", "id_in", "norm", "state", "text_out", "id_out"):
            setattr(self, name, getattr(other, name))

    def head(self) -> dict[str, Tensor]:
        """The trained parts by name, with a row of id vectors for every item."""
        parameters = dict(self.named_parameters())
        found: dict[str, Tensor] = {name: parameters[name].detach() for name in self.head_names}
        for name in ("id_in.weight", "id_out.weight"):
            new = len(self.counts) - len(found[name])
            if new:
                found[name] = nn.functional.pad(found[name], (0, 0, 0, new))
        return found

    def _with_id(self, codes: Tensor, dropout: float) -> Tensor:
        """Which items have an id vector, this time: codes of any shape -> (..., 1)."""
        known = self.counts[codes] > 0
        if self.training and dropout:
            known &= torch.rand(codes.shape, device=codes.device) >= dropout
        return known.unsqueeze(-1)

    def bias(self) -> Tensor:
        """Log of what each item counts before anything is read, shape (items,).

        That is its training events and one more; without any it is what held-out events say. For what came
        after training see `expected_counts`.
        """
        counts = expected_counts(self.counts, self.late)
        return torch.where(counts > 0, torch.log1p(counts), self.unseen)

    def popularity(self) -> Tensor:
        """Log of the share of each item in what all count, shape (items,)."""
        return torch.log_softmax(self.bias(), dim=0)

    def inputs(self, elements: Tensor) -> Tensor:
        """Input vectors of items and of words as `as_words` has them: any shape -> (..., hidden)."""
        vectors: Tensor = self.dropout(self.item_inputs(elements.clamp(min=0)))
        if bool((elements < 0).any()):
            words = self.body.get_input_embeddings()((-1 - elements).clamp(min=0))  # type: ignore[operator]
            vectors = torch.where((elements >= 0).unsqueeze(-1), vectors, words.float())
        return vectors

    def hidden(self, elements: Tensor) -> Tensor:
        """Hidden states before the first element and after each: (batch, n) -> (batch, n + 1, hidden).

        Elements are items, and words as `as_words` has them. Rows are padded on the right with any item.
        Attention is causal, so no real position sees the padding and no mask is needed.
        """
        words = self.body.get_input_embeddings()(self.instruction)  # type: ignore[operator]
        # `words` has the LM's dtype, the head is float32.
        prefix = words.float().unsqueeze(0).expand(len(elements), -1, -1)
        inputs = torch.cat([prefix, self.inputs(elements)], dim=1).to(words.dtype)
        hidden = self.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
        after: Tensor = hidden[:, len(self.instruction) - 1 :].float()
        return after

    def packed(self, windows: Sequence[Stretch], width: int) -> tuple[Tensor, list[int]]:
        """States before each item of several windows that lie side by side behind one instruction.

        A window sees the instruction and itself (block mask), and its positions go on from the instruction:
        the states are those of `before`, without padding and with the instruction read once a row.

        Parameters
        ----------
        width
            Elements in a row, at most.

        Returns
        -------
        tuple
            States (items, head_dim), window after window, and the order in which the windows come.
        """
        rows = rows_of([len(window.elements) for window in windows], width)
        longest = max(sum(len(windows[i].elements) for i in row) for row in rows)
        lead = len(self.instruction)
        elements = np.zeros((len(rows), longest), np.int64)
        # Of each place: the number of its window, and how many elements of it came before.
        block, offset = np.full((len(rows), longest), -1), np.zeros((len(rows), longest), np.int64)
        # Row and place of the state before each item.
        row_of, before = [], []
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                window, n = windows[i], len(windows[i].elements)
                elements[r, at : at + n], block[r, at : at + n] = window.elements, i
                offset[r, at : at + n] = np.arange(n)
                row_of.append(np.full(len(window.asked), r))
                before.append(np.where(window.asked == 0, lead - 1, lead + at + window.asked - 1))
                at += n
        device = self.counts.device
        places = torch.from_numpy(np.concatenate([np.full((len(rows), lead), -2), block], axis=1)).to(device)
        steps = torch.arange(lead + longest, device=device)
        sees = (places[:, :, None] == places[:, None, :]) | (steps < lead)
        sees &= steps[:, None] >= steps[None, :]
        positions = np.concatenate([np.tile(np.arange(lead), (len(rows), 1)), lead + offset], axis=1)
        words = self.body.get_input_embeddings()(self.instruction)  # type: ignore[operator]
        prefix = words.float().unsqueeze(0).expand(len(rows), -1, -1)
        items = self.inputs(torch.from_numpy(elements).to(device))
        mask = additive(sees, words.dtype)[:, None]
        hidden = self.body(
            inputs_embeds=torch.cat([prefix, items], dim=1).to(words.dtype),
            attention_mask=mask,
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
        ).last_hidden_state
        at_rows, at_places = (torch.from_numpy(np.concatenate(x)).to(device) for x in (row_of, before))
        found = hidden[at_rows, at_places]
        return self.states(found), [i for row in rows for i in row]

    def before(self, codes: Tensor) -> Tensor:
        """State before each item, from the items that precede it: (batch, n) -> (batch, n, head_dim)."""
        return self.states(self.hidden(codes)[:, :-1])

    def states(self, hidden: Tensor) -> Tensor:
        """Project hidden states to the space of the output vectors: (..., hidden) -> (..., head_dim)."""
        with torch.autocast(hidden.device.type, enabled=False):
            state: Tensor = self.state(self.norm(hidden.float()))
        return state

    def logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Unnormalised log-probabilities: (..., head_dim) and (items, head_dim) -> (..., items)."""
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ outputs.float().T * self._scale(states) + popularity

    def own_logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Those of one item a state: (n, head_dim), (n, head_dim) and (n,) -> (n,)."""
        with torch.autocast(states.device.type, enabled=False):
            return (states.float() * outputs.float()).sum(-1) * self._scale(states) + popularity

    @staticmethod
    def _scale(states: Tensor) -> float:
        return 2.0 / math.sqrt(states.shape[-1])


class ItemTokenScorer:
    """Scores and proposes items with a trained `ItemTokenModel`.

    A history is read once: its state vector (head_dim floats) is kept in a bounded cache and answers
    both `retrieve` and `score`. Thread-safe.

    Parameters
    ----------
    model
        In evaluation mode.
    window
        Latest items of a history that are read.
    dtype
        bfloat16 runs the body under autocast; the head is float32 either way.
    wish
        How a typed wish is read; None for a model that was not trained with any, which reads the history
        alone.
    tokens
        Padded positions in one forward.
    cached
        State vectors kept.
    index
        Makes an index over vectors. With one, in a catalogue too large to be scored as a whole for each
        request, the state vector searches it: scores are then log-probabilities up to a constant of the
        query, which no ranking depends on. It is made once, of the weights as they are at the first search.
    """

    name = "lm"

    def __init__(
        self,
        model: ItemTokenModel,
        window: int,
        dtype: torch.dtype = torch.float32,
        *,
        wish: Wish | None = None,
        tokens: int = 4096,
        cached: int = 10_000,
        index: Callable[[Floats], VectorIndex] | None = None,
    ) -> None:
        self._make_index = index
        self._nearest: Nearest | None = None
        self._smaller: tuple[Nearest, Tensor] | None = None
        self.wish = wish
        self.model, self.window, self.dtype, self.tokens, self.cached = (
            model.eval(),
            window,
            dtype,
            tokens,
            cached,
        )
        self._lock = threading.Lock()
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()
        self._outputs: tuple[Tensor, Tensor] | None = None
        # Output vectors of the same model over a smaller catalogue, and the text vectors of that.
        self._before: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Drop all cached states; an index holds nothing of users, and stays."""
        with self._lock:
            self._states.clear()
            self._outputs = self._before = None

    def log_probs(self, histories: Sequence[Codes]) -> Floats:
        """Log-probability of each item to be the next, shape (len(histories), items); rows sum to 1."""
        return self._log_probs([Query(history) for history in histories])

    def _all_outputs(self) -> tuple[Tensor, Tensor]:
        """Output vectors and popularity of all items."""
        if self._outputs is None:
            self._outputs = (self._output_vectors(), self.model.popularity())
        return self._outputs

    def _output_vectors(self) -> Tensor:
        """Output vectors of all items: those of a smaller catalogue, and of what is new or other."""
        before, self._before = self._before, None
        if before is None:
            return self.model.item_outputs()
        outputs, texts = before
        new = torch.arange(len(texts), len(self.model.counts), device=outputs.device)
        grown = torch.cat([outputs, self.model.outputs_of(new)])
        other = self._other_than(texts)
        grown[other] = self.model.outputs_of(other)
        return grown

    def _other_than(self, texts: Tensor) -> Tensor:
        """Codes of items whose text vector is not what it was."""
        return (self.model.text_vectors[: len(texts)] != texts).any(dim=1).nonzero()[:, 0]

    def _log_probs(self, queries: Sequence[Query]) -> Floats:
        """The same, after the wish too where one was typed."""
        with self._lock, torch.inference_mode():
            states = self._read([self._elements(query) for query in queries])
            logits = self.model.logits(states, *self._all_outputs())
            values: Floats = torch.log_softmax(logits, dim=-1).cpu().numpy()
        return values

    def _elements(self, query: Query) -> Codes:
        """What is read of a query: the latest items, then the words of its wish."""
        items = query.history[-self.window :]
        if self.wish is None or not query.text:
            return items
        return np.concatenate([items, as_words(self.wish.tokens(query.text))]).astype(np.int32)

    def _read(self, histories: Sequence[Codes]) -> Tensor:
        """State after each history, of items and words, shape (len(histories), head_dim)."""
        keys = [h.astype(np.int32).tobytes() for h in histories]
        new = {key: h for key, h in zip(keys, histories, strict=True) if key not in self._states}
        fresh: dict[bytes, Tensor] = {}
        for group in self._groups(sorted(new, key=len, reverse=True)):
            codes, lengths = pad([new[key] for key in group])
            device = self.model.counts.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                hidden = self.model.hidden(codes.to(device))
            last = hidden[torch.arange(len(group), device=device), lengths.to(device)]
            # Each on its own: a row of the batch would keep all of it.
            fresh.update(zip(group, (state.clone() for state in self.model.states(last)), strict=True))
        states = torch.stack([fresh[key] if key in fresh else self._states[key] for key in keys])
        for key in keys:
            self._states[key] = fresh[key] if key in fresh else self._states[key]
            self._states.move_to_end(key)
        while len(self._states) > self.cached:
            self._states.popitem(last=False)
        return states

    def _groups(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        """Split histories, longest first, so that a padded batch has at most `tokens` positions."""
        groups: list[list[bytes]] = []
        start = 0
        while start < len(keys):
            longest = len(self.model.instruction) + len(keys[start]) // 4
            rows = max(1, self.tokens // longest)
            groups.append(list(keys[start : start + rows]))
            start += rows
        return groups

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Log-probability over the whole catalogue of each candidate of each query.

        With an index, up to a constant of the query.
        """
        if self._make_index is not None:
            return self._own_logits(queries, candidates)
        scores: list[Floats] = []
        for start in range(0, len(queries), CHUNK):
            rows = self._log_probs(queries[start : start + CHUNK])
            scores += [row[items] for row, items in zip(rows, candidates[start : start + CHUNK], strict=True)]
        return scores

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return the k most probable allowed items for each query; those that the index finds, with one."""
        hits: list[Hits] = []
        for start in range(0, len(queries), CHUNK):
            chunk = queries[start : start + CHUNK]
            if self._make_index is not None:
                hits += self._searched(chunk, k)
            else:
                hits += tops(self._log_probs(chunk), chunk, k)
        return hits

    def compared(self, queries: Sequence[Query], items: Codes) -> list[Floats]:
        """Scores of the same items for several queries, as log-probabilities.

        With an index, the sum over the catalogue is that over what the index finds.
        """
        scores = self.score(queries, [items] * len(queries))
        if self._make_index is None:
            return scores
        found = self.retrieve([replace(query, mask=None) for query in queries], SUMMED)
        sums = [np.logaddexp.reduce(hits.scores) for hits in found]
        return [own - total for own, total in zip(scores, sums, strict=True)]

    def _own_logits(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Logits of the candidates alone."""
        scores: list[Floats] = []
        with self._lock, torch.inference_mode():
            # Popularity but for a constant, so that scores stay when the catalogue grows.
            outputs, bias = self._all_outputs()[0], self.model.bias()
            for start in range(0, len(queries), CHUNK):
                states = self._read([self._elements(query) for query in queries[start : start + CHUNK]])
                for state, items in zip(states, candidates[start : start + CHUNK], strict=True):
                    codes = torch.from_numpy(items.astype(np.int64)).to(state.device)
                    values = self.model.logits(state[None], outputs[codes], bias[codes])
                    scores.append(values[0].cpu().numpy())
        return scores

    def _biased(self) -> tuple[Floats, Floats]:
        """Vectors of all items whose product with a state, and a bias each, are the logits."""
        outputs, _ = self._all_outputs()
        vectors = outputs.float() * self.model._scale(outputs)
        return vectors.cpu().numpy(), self.model.bias().cpu().numpy()

    def grow_from(self, old: ItemTokenScorer) -> None:
        """Take over index and output vectors of the same model over a smaller catalogue, when asked."""
        outputs, before = old._outputs, old._before
        self._before = before if outputs is None else (outputs[0], old.model.text_vectors)
        # In this order no lock is needed, which the other may hold for as long as an index takes to make.
        smaller, made = old._smaller, old._nearest
        self._smaller = smaller if made is None else (made, old.model.text_vectors)

    def _index(self) -> Nearest:
        """The index, made if it is not there; that of a smaller catalogue gets what is new or other."""
        assert self._make_index is not None
        if self._nearest is None and self._smaller is not None:
            old, texts = self._smaller
            other = self._other_than(texts).cpu().numpy().astype(np.int32)
            self._nearest = old.grown(*self._biased(), other)
        elif self._nearest is None:
            self._nearest = Nearest.of(*self._biased(), self._make_index)
        self._smaller = None
        return self._nearest

    def _searched(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """The items that the index finds for the states of some queries, with their logits."""
        with self._lock, torch.inference_mode():
            index = self._index()
            states = self._read([self._elements(query) for query in queries])
        return index.search(states.float().cpu().numpy(), k, [query.mask for query in queries])
