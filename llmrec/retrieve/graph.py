"""Graph convolution over the graph of users and items: LightGCN, built on torch_geometric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmrec.protocols import Codes, Floats, Hits, Query
from llmrec.ranking import age_weights
from llmrec.retrieve.factors import by_inner_product

if TYPE_CHECKING:
    import torch


class LightGCNConfig(BaseModel):
    """Settings of LightGCN."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1, description="length of the embeddings")
    layers: int = Field(2, ge=1, description="rounds of propagation")
    steps: int = Field(300, ge=1, description="optimiser steps; each propagates over the whole graph")
    batch: int = Field(4096, ge=1, description="events whose loss is taken in a step")
    negatives: int = Field(4096, ge=1, description="items in the softmax of a step, drawn if there are more")
    learning_rate: float = Field(0.02, gt=0)
    l2: float = Field(1e-5, ge=0, description="penalty on the embeddings of a batch")
    decay: float = Field(0.9, gt=0, le=1, description="weight of a history item, per step of age")
    seed: int = 0


class LightGCNRetriever:
    """LightGCN (He et al. 2020, arXiv 2002.02126), trained with a softmax over items instead of BPR.

    With layer-wise item embeddings x(0..L-1) a user's final embedding, but for the user's own x(0), is the
    sum over the history of (mean over layers of x(l) / sqrt(degree of the item)) / sqrt(history length).
    So users are served from their history alone, known or not.

    Parameters
    ----------
    messages
        What each item sends to a user that has it, shape (items, dim).
    outputs
        Final item embeddings, shape (items, dim).
    """

    name = "lightgcn"

    def __init__(self, messages: Floats, outputs: Floats, config: LightGCNConfig) -> None:
        self.messages, self.outputs, self.config = messages, outputs, config

    @classmethod
    def fit(
        cls,
        histories: Sequence[Codes],
        n_items: int,
        config: LightGCNConfig,
        weights: Sequence[Floats] | None = None,
        on_step: Callable[[int, float], None] = lambda step, nats: None,
    ) -> LightGCNRetriever:
        """Train on the graph of the histories; an event's weight counts in the loss.

        Raises
        ------
        ImportError
            If torch or `torch_geometric` is not installed.
        """
        try:
            import torch
            from torch_geometric.nn.models import LightGCN
        except ImportError as missing:
            raise ImportError('LightGCN needs: pip install "llmrec[families]"') from missing

        items = np.concatenate([np.empty(0, np.int32), *histories]).astype(np.int64)
        if not len(items):
            nothing = np.zeros((n_items, config.dim), np.float32)
            return cls(nothing, nothing, config)
        users = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
        value = np.ones(len(items), np.float32) if weights is None else np.concatenate(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model: Any = LightGCN(len(histories) + n_items, config.dim, config.layers)
            torch.nn.init.normal_(model.embedding.weight, std=0.1)
        edges = edges_of(users, items, len(histories))
        _train(model, edges, (users, items, value), len(histories), n_items, config, on_step)
        return cls(*summarise(model, edges, len(histories)), config)

    def user(self, history: Codes) -> Floats:
        """Embedding of the user with this history, shape (dim,)."""
        weight: dict[int, float] = {}
        for code, value in zip(history.tolist(), age_weights(len(history), self.config.decay), strict=True):
            weight[code] = max(weight.get(code, 0.0), float(value))
        w = np.array(list(weight.values()), dtype=np.float32)
        vector: Floats = w @ self.messages[list(weight)] / np.sqrt(max(float(w.sum()), 1e-6))
        return vector

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Hits]:
        """Return up to k allowed items for each query whose history has a known item."""
        users = [self.user(q.history) if len(q.history) else np.zeros(0, np.float32) for q in queries]
        return by_inner_product(self.outputs, users, queries, k)

    def grown(self, n_items: int) -> LightGCNRetriever:
        """The same for a catalogue that has grown; new items are no nodes and are not proposed."""
        more = ((0, n_items - len(self.outputs)), (0, 0))
        return LightGCNRetriever(np.pad(self.messages, more), np.pad(self.outputs, more), self.config)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State as arrays."""
        return {"messages": self.messages, "outputs": self.outputs}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], config: LightGCNConfig) -> LightGCNRetriever:
        """Make the retriever from `arrays()`."""
        return cls(arrays["messages"], arrays["outputs"], config)


def edges_of(users: NDArray[np.int64], items: NDArray[np.int64], n_users: int) -> torch.Tensor:
    """Edges between users and the items they have, each once and in both directions, shape (2, edges).

    Users are nodes from 0, items from `n_users`.
    """
    import torch

    pairs = torch.from_numpy(np.unique(np.stack([users, items + n_users]), axis=1))
    return torch.cat([pairs, pairs.flip(0)], dim=1)


def summarise(model: Any, edges: torch.Tensor, n_users: int) -> tuple[Floats, Floats]:
    """Messages and final embeddings of the items of a LightGCN; zero for items without an edge."""
    import torch

    with torch.inference_mode():
        layers = [model.embedding.weight]
        for convolution in model.convs:
            layers.append(convolution(layers[-1], edges))
        degree = torch.bincount(edges[0], minlength=model.num_nodes)[n_users:, None]
        share = 1.0 / len(layers)
        outputs = share * torch.stack(layers).sum(dim=0)[n_users:]
        messages = share * torch.stack(layers[:-1]).sum(dim=0)[n_users:] / degree.clamp(min=1).sqrt()
        seen = degree > 0
    return (messages * seen).numpy(), (outputs * seen).numpy()


def _train(
    model: Any,
    edges: torch.Tensor,
    events: tuple[NDArray[np.int64], NDArray[np.int64], Floats],
    n_users: int,
    n_items: int,
    config: LightGCNConfig,
    on_step: Callable[[int, float], None],
) -> None:
    """Softmax over items for drawn events, each counted with its weight."""
    import torch

    users, items, value = events
    # How likely an item is among those that a step offers: asked for in the batch, or drawn.
    share = np.bincount(items, minlength=n_items) / len(items)
    offering = -np.expm1(
        config.batch * np.log1p(-np.minimum(share, 1 - 1e-9)) - config.negatives / max(n_items, 1)
    )
    log_q = torch.from_numpy(np.log(offering).astype(np.float32))
    rng = np.random.default_rng(config.seed)
    optimiser = torch.optim.Adam(model.parameters(), config.learning_rate)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        rows = rng.integers(0, len(items), config.batch)
        offered = np.arange(n_items)
        if n_items > config.negatives:
            # The targets of the batch and others, each once.
            offered = np.unique(np.append(items[rows], rng.integers(0, n_items, config.negatives)))
        target = torch.from_numpy(np.searchsorted(offered, items[rows]))
        asked, weight = torch.from_numpy(users[rows]), torch.from_numpy(value[rows])
        optimiser.zero_grad(set_to_none=True)
        final = model.get_embedding(edges)
        logits = final[asked] @ final[torch.from_numpy(offered) + n_users].T
        if len(offered) < n_items:
            # Popular items are offered more often: without this they would be pushed down.
            logits = logits - log_q[torch.from_numpy(offered)]
        nats = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        loss = (nats * weight).sum() / weight.sum()
        first = model.embedding.weight[torch.cat([asked, torch.from_numpy(items[rows]) + n_users])]
        (loss + config.l2 * first.pow(2).sum(-1).mean()).backward()
        optimiser.step()
        on_step(step, float(loss.detach()))
