"""Attention of packed prompts on a processor: blocks of queries meet the keys that they see, not all.

In a packed prompt most pairs of a query and a key are hidden by the mask: branches do not see each other,
and nothing sees what comes after it. The dense kernel multiplies all of them. Here the keys that a block of
queries sees are gathered first; what a block does not see is never multiplied, and the rest is the usual
softmax over the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

NAME = "llmrec_blocks"
"""Of this attention among those of transformers."""

BLOCK = 64
"""Queries that share their keys."""

ALIKE = 0.8
"""Blocks with at least this share of the most keys of a group are multiplied together, padded."""

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What a model may ask of attention beside the mask, and only dense attention does."""

WORTH = 0.75
"""Share of all pairs up to which gathering pays."""

EVEN = 16
"""Keys of a block come in multiples of it: an odd number of them takes up to twice as long in bfloat16."""


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks of queries that see about as many keys.

    Parameters
    ----------
    queries, keys
        Places among the queries and keys of all rows, shape (blocks * BLOCK,) and (blocks * keys,).
    mask
        What is added to the products, shape (blocks, BLOCK, keys).
    wide
        The mask for so many heads that share their keys, (blocks, 1, heads * BLOCK, keys): made once for all
        layers.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    wide: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the queries, shape (blocks * BLOCK, heads, dim), from those of all rows.

        `query` has shape (heads, queries, dim), `key` and `value` (key heads, keys, dim).
        """
        blocks, block, n = self.mask.shape
        heads, shared = len(query), len(query) // len(key)
        # Heads that share their keys are further queries of these.
        q = query.index_select(1, self.queries).view(len(key), shared, blocks, block, -1)
        q = q.permute(2, 0, 1, 3, 4).reshape(blocks, len(key), shared * block, -1)
        k, v = (
            x.index_select(1, self.keys).view(len(x), blocks, n, -1).transpose(0, 1) for x in (key, value)
        )
        if shared not in self.wide:
            self.wide[shared] = self.mask.repeat(1, shared, 1)[:, None]
        mask = self.wide[shared].to(q.dtype)
        found = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        found = found.view(blocks, len(key), shared, block, -1).permute(0, 3, 1, 2, 4)
        given: Tensor = found.reshape(blocks * block, heads, -1)
        return given


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which queries meet which keys.

    Parameters
    ----------
    groups
        All queries, some of them more than once.
    places
        Of each query among those of the groups, shape (rows * queries,).
    """

    groups: list[Group]
    places: Tensor

    @classmethod
    def of(cls, sees: NDArray[np.bool_], dtype: torch.dtype) -> Blocks | None:
        """From what each query of each row sees, shape (rows, queries, keys); None where it would not pay."""
        rows, n, m = sees.shape
        found = []
        for row in range(rows):
            for start in range(0, n, BLOCK):
                own = np.minimum(np.arange(start, start + BLOCK), n - 1)
                found.append((row, own, np.flatnonzero(sees[row, start : start + BLOCK].any(axis=0))))
        found.sort(key=lambda block: -len(block[2]))
        grouped: list[list[tuple[int, NDArray[Any], NDArray[Any]]]] = []
        for block in found:
            if not grouped or len(block[2]) < ALIKE * len(grouped[-1][0][2]):
                grouped.append([])
            grouped[-1].append(block)
        pairs = sum(BLOCK * len(group) * len(group[0][2]) for group in grouped)
        if pairs > WORTH * sees.size:
            return None
        groups, at = [], 0
        places = np.empty(rows * n, np.int64)
        for group in grouped:
            keys = np.zeros((len(group), -(-len(group[0][2]) // EVEN) * EVEN), np.int64)
            seen = np.zeros((len(group), BLOCK, keys.shape[1]), np.bool_)
            queries = np.stack([row * n + own for row, own, _ in group])
            for b, (row, own, own_keys) in enumerate(group):
                keys[b, : len(own_keys)] = row * m + own_keys
                seen[b, :, : len(own_keys)] = sees[row][own][:, own_keys]
            places[queries.ravel()] = at + np.arange(queries.size)
            at += queries.size
            mask = additive(torch.from_numpy(seen), dtype)
            groups.append(Group(torch.from_numpy(queries.ravel()), torch.from_numpy(keys.ravel()), mask))
        return cls(groups, torch.from_numpy(places))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """(rows, heads, queries, dim), twice (rows, key heads, keys, dim) -> (rows, queries, heads, dim)."""
        rows, _, n, _ = query.shape
        flat = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]
        found = torch.cat([group.attend(flat[0], flat[1], flat[2], scale) for group in self.groups])
        ordered: Tensor = found.index_select(0, self.places)
        return ordered.view(rows, n, *ordered.shape[1:])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: by blocks where the mask has them, else as `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    blocks: Blocks | None = getattr(attention_mask, "blocks", None)
    if blocks is None or dropout or any(others.get(name) is not None for name in UNKNOWN):
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    return blocks.attend(query, key, value, scaling), None


def use_blocks(body: Any) -> None:
    """Let a body that attends as `sdpa` does take masks with blocks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if getattr(body.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    body.set_attn_implementation(NAME)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to the products of queries and keys: 0 where a query sees a key, the least number elsewhere."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )


def mask_of(sees: NDArray[np.bool_], like: Tensor) -> Tensor:
    """The mask of what each query of each row sees, (rows, 1, queries, keys), with blocks where they pay.

    Of the dtype and on the device of another tensor.
    """
    mask = additive(torch.from_numpy(sees), like.dtype)[:, None].to(like.device)
    if like.device.type == "cpu":
        mask.blocks = Blocks.of(sees, like.dtype)  # type: ignore[attr-defined]
    return mask
