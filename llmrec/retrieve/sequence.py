"""Sequence models over item ids: one training loop, three encoders (GRU4Rec, Caser, SASRec)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import NO_HITS, tops
from llmrec.retrieve.encoders import GRU, Caser, SelfAttention
from llmrec.retrieve.sequence_config import Kind, SequenceConfig
from llmrec.sequences import batches, next_item_loss, pad, windows

logger = logging.getLogger(__name__)

CHUNK = 256
"""Queries that are encoded and scored at once."""


class SequenceModel(nn.Module):
    """Item vectors, an encoder of histories, and item scores by inner product with the same vectors.

    An item vector is a learned id vector (zero for an item without training events) plus, with `text`, a
    projection of the text vector, so that an unseen item has a vector too.
    """

    counts: Tensor
    text_vectors: Tensor

    def __init__(self, kind: Kind, config: SequenceConfig, counts: Floats, text_vectors: Floats) -> None:
        super().__init__()
        dim = config.dim
        self.text = config.text and text_vectors.shape[1] > 0
        self.register_buffer("counts", torch.from_numpy(counts.astype(np.float32)), persistent=False)
        self.register_buffer("text_vectors", torch.from_numpy(text_vectors), persistent=False)
        self.ids = nn.Embedding(len(counts), dim)
        nn.init.normal_(self.ids.weight, std=0.1)
        self.projection = nn.Linear(text_vectors.shape[1], dim, bias=False) if self.text else None
        self.start = nn.Parameter(torch.zeros(dim))
        self.encoder: nn.Module
        if kind == "gru4rec":
            self.encoder = GRU(dim, config.layers, config.dropout)
        elif kind == "caser":
            self.encoder = Caser(dim, config.width, config.dropout)
        else:
            # One place more than items: the start.
            self.encoder = SelfAttention(dim, config.layers, config.heads, config.window + 1, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def item_outputs(self) -> Tensor:
        """Vectors of all items, shape (items, dim)."""
        return self.outputs_of(torch.arange(len(self.counts), device=self.counts.device))

    def outputs_of(self, codes: Tensor) -> Tensor:
        """Vectors of some items, of any shape: (...) -> (..., dim)."""
        vectors: Tensor = self.ids(codes) * (self.counts[codes] > 0).unsqueeze(-1)
        return vectors if self.projection is None else vectors + self.projection(self.text_vectors[codes])

    def popularity(self) -> Tensor:
        """Log of the smoothed share of each item in the training events, shape (items,)."""
        smoothed = self.counts + 1.0
        return torch.log(smoothed / smoothed.sum())

    def after(self, codes: Tensor) -> Tensor:
        """State before the first item and after each: (batch, n) -> (batch, n + 1, dim)."""
        start = self.start.expand(len(codes), 1, -1)
        states: Tensor = self.encoder(self.dropout(torch.cat([start, self.outputs_of(codes)], dim=1)))
        return states

    def before(self, codes: Tensor) -> Tensor:
        """State before each item: (batch, n) -> (batch, n, dim)."""
        return self.after(codes[:, :-1])

    def logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Unnormalised log-probabilities: (..., dim) and (items, dim) -> (..., items)."""
        return states @ outputs.T + popularity

    def own_logits(self, states: Tensor, outputs: Tensor, popularity: Tensor) -> Tensor:
        """Those of one item a state: (n, dim), (n, dim) and (n,) -> (n,)."""
        return (states * outputs).sum(-1) + popularity


class SequenceRetriever:
    """Retrieves by a trained sequence model. Thread-safe.

    Parameters
    ----------
    kind
        Which encoder.
    model
        In evaluation mode.
    """

    def __init__(self, kind: Kind, model: SequenceModel, config: SequenceConfig) -> None:
        self.kind, self.model, self.config = kind, model.eval(), config
        self._lock = threading.Lock()
        self._outputs: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """The kind of the encoder."""
        return self.kind

    @classmethod
    def fit(
        cls,
        kind: Kind,
        histories: Sequence[Codes],
        text_vectors: Floats,
        config: SequenceConfig,
        weights: Sequence[Floats] | None = None,
        validate: Callable[[SequenceRetriever], float] | None = None,
        on_epoch: Callable[[int, float, float], None] = lambda epoch, nats, value: None,
    ) -> SequenceRetriever:
        """Train on all positions of all histories.

        Parameters
        ----------
        text_vectors
            Shape (items, text_dim); text_dim may be 0.
        weights
            Of the events, one array a history.
        validate
            Measures after each epoch, higher is better: decides which state is kept and when to stop. All
            epochs are run without it.
        on_epoch
            Told the epoch, the mean nats an item, and the validation value.
        """
        codes = np.concatenate([np.empty(0, np.int32), *histories])
        counted = None if weights is None else np.concatenate([np.empty(0, np.float32), *weights])
        counts = np.bincount(codes, counted, minlength=len(text_vectors)).astype(np.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            made = cls(kind, SequenceModel(kind, config, counts, text_vectors), config)
            if len(codes):
                made._train(histories, weights, validate, on_epoch)
        return made

    def _train(
        self,
        histories: Sequence[Codes],
        weights: Sequence[Floats] | None,
        validate: Callable[[SequenceRetriever], float] | None,
        on_epoch: Callable[[int, float, float], None],
    ) -> None:
        config, model = self.config, self.model
        optimiser = torch.optim.AdamW(
            model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        begun, best, since = time.monotonic(), -np.inf, 0
        kept: dict[str, Tensor] = {}
        for epoch in range(config.epochs):
            rng = np.random.default_rng([config.seed, epoch])
            # The last item of a window is only asked for, so that the state after a full one is trained too.
            pieces = windows(histories, config.window + 1, rng, weights)
            losses, late = [], False
            model.train()
            for batch in batches(pieces, 1, config.tokens_per_step, rng):
                optimiser.zero_grad(set_to_none=True)
                loss = next_item_loss(model, batch, config.negatives)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimiser.step()
                losses.append(float(loss.detach()))
                late = config.minutes is not None and time.monotonic() - begun > 60 * config.minutes
                if late:
                    break
            model.eval()
            self._outputs = None
            value = validate(self) if validate is not None else float(epoch)
            on_epoch(epoch, float(np.mean(losses)), value)
            since = 0 if value > best else since + 1
            if value > best:
                best, kept = value, {n: p.detach().clone() for n, p in model.state_dict().items()}
            if since >= config.patience or late:
                break
        model.load_state_dict(kept)
        self._outputs = None

    def scores(self, histories: Sequence[Codes]) -> Floats:
        """Log-probability of each item to be the next, shape (len(histories), items); rows sum to 1."""
        codes, lengths = pad([h[-self.config.window :] for h in histories])
        with self._lock, torch.inference_mode():
            if self._outputs is None:
                self._outputs = (self.model.item_outputs(), self.model.popularity())
            states = self.model.after(codes)[torch.arange(len(codes)), lengths]
            values: Floats = torch.log_softmax(self.model.logits(states, *self._outputs), dim=-1).numpy()
        return values

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return the k most probable allowed items for each query with a history."""
        found: list[Hits] = [NO_HITS] * len(queries)
        asked = [row for row, query in enumerate(queries) if len(query.history)]
        # Of like length together, so that little is padded.
        asked.sort(key=lambda row: -len(queries[row].history))
        for start in range(0, len(asked), CHUNK):
            rows = asked[start : start + CHUNK]
            chunk = [queries[row] for row in rows]
            for row, hits in zip(rows, tops(self.scores([q.history for q in chunk]), chunk, k), strict=True):
                found[row] = hits
        return found

    def grown(self, text_vectors: Floats) -> SequenceRetriever:
        """The same for a catalogue that has grown: new items are known by their text alone."""
        old = self.model
        more = len(text_vectors) - len(old.counts)
        counts = np.pad(old.counts.numpy(), (0, more))
        with torch.random.fork_rng(devices=[]):  # what it draws is written over
            model = SequenceModel(self.kind, self.config, counts, text_vectors)
        state = dict(old.state_dict())
        state["ids.weight"] = nn.functional.pad(state["ids.weight"], (0, 0, 0, more))
        model.load_state_dict(state)
        return SequenceRetriever(self.kind, model, self.config)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {
            "counts": self.model.counts.numpy(),
            **{f"state.{n}": p.detach().numpy() for n, p in self.model.state_dict().items()},
        }

    @classmethod
    def from_arrays(
        cls, kind: Kind, arrays: Mapping[str, NDArray[Any]], text_vectors: Floats, config: SequenceConfig
    ) -> SequenceRetriever:
        """Make the retriever from `arrays()`."""
        with torch.random.fork_rng(devices=[]):
            model = SequenceModel(kind, config, arrays["counts"], text_vectors[: len(arrays["counts"])])
        state = {n.removeprefix("state."): torch.from_numpy(a) for n, a in arrays.items() if n != "counts"}
        model.load_state_dict(state)
        return cls(kind, model, config).grown(text_vectors)
