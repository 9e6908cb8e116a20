"""Three small encoders of a history: recurrent, convolutional, attention.

Each maps item vectors (batch, n, dim) to states (batch, n, dim), in which position t has read the items
up to t and no later one. Histories are padded on the right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GRU(nn.Module):
    """Gated recurrent units (GRU4Rec; Hidasi et al. 2016, arXiv 1511.06939)."""

    def __init__(self, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)

    def forward(self, vectors: Tensor) -> Tensor:
        """Encode: (batch, n, dim) -> (batch, n, dim)."""
        states: Tensor = self.gru(vectors)[0]
        return states


class Caser(nn.Module):
    """Convolutions over the latest items (Caser; Tang and Wang 2018, arXiv 1809.07426), at every position.

    Horizontal filters of heights 1 to `width` see all dimensions of so many items in a row and are
    max-pooled over the latest `width` items; vertical filters are weighted sums of those items.
    """

    def __init__(self, dim: int, width: int, dropout: float, filters: int = 16, vertical: int = 4) -> None:
        super().__init__()
        self.width = width
        self.horizontal = nn.ModuleList(nn.Conv1d(dim, filters, height) for height in range(1, width + 1))
        self.vertical = nn.Parameter(torch.randn(vertical, width) / width)
        self.out = nn.Linear(filters * width + vertical * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        """Encode: (batch, n, dim) -> (batch, n, dim)."""
        batch, n, _ = vectors.shape
        padded = functional.pad(vectors.transpose(1, 2), (self.width - 1, 0))
        pooled = []
        for height, convolution in enumerate(self.horizontal, start=1):
            # (batch, filters, places); a window of `width` items has width - height + 1 places.
            found = functional.relu(convolution(padded))
            places = self.width - height + 1
            pooled.append(functional.max_pool1d(found, places, stride=1) if places > 1 else found)
        across = torch.cat(pooled, dim=1).transpose(1, 2)
        latest = padded.unfold(2, self.width, 1)
        down = torch.einsum("bdnw,vw->bnvd", latest, self.vertical).reshape(batch, n, -1)
        states: Tensor = functional.relu(self.out(self.dropout(torch.cat([across, down], dim=-1))))
        return states


class SelfAttention(nn.Module):
    """Causal self-attention (SASRec; Kang and McAuley 2018, arXiv 1808.09781), norm before each block."""

    def __init__(self, dim: int, layers: int, heads: int, longest: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(longest, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        block = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Encode: (batch, n, dim) -> (batch, n, dim)."""
        n = vectors.shape[1]
        places = self.position.weight[:n]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=vectors.device)
        states: Tensor = self.blocks(vectors + places, mask=mask, is_causal=True)
        return states
