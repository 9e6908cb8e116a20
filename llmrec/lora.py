"""LoRA layers that add their update inside one matrix product, in the precision of the layer below."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's layer, whose update is not scaled, converted and added in passes of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y = base(x) + scale * B(A(x)); peft's own way wherever the layer is more than that."""
        if self.merged_adapters and not self.disable_adapters:
            merged: Tensor = self.base_layer(x)
            return merged
        name = self.plain()
        if name is None or args or kwargs:
            other: Tensor = super().forward(x, *args, **kwargs)
            return other
        found: Tensor = self.base_layer(x)
        down = self.lora_A[name].weight.to(found.dtype)
        up = (self.lora_B[name].weight * self.scaling[name]).to(found.dtype)
        low = functional.linear(x.to(found.dtype), down)
        found.view(-1, found.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.T)
        return found

    def plain(self) -> str | None:
        """The adapter in use, where the layer is it and the layer below alone; else None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        if self.lora_bias.get(names[0]) or not isinstance(self.lora_dropout[names[0]], nn.Identity):
            return None
        found: str = names[0]
        return found


def fused(body: nn.Module) -> nn.Module:
    """The same body, its LoRA layers over linear ones fused."""
    for module in body.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
    return body


@torch.no_grad()
def merge(body: nn.Module) -> None:
    """Put the updates of fused layers into weights of their own below, once nothing is trained any more.

    A layer then is one product instead of three. Other bodies keep the weights that they shared with this
    one, and the matrices stay where they are, to be saved.
    """
    for module in body.modules():
        if not isinstance(module, FusedLinear) or (name := module.plain()) is None:
            continue
        weight = module.base_layer.weight
        # The update is in float32: their sum is rounded once.
        whole = (weight + module.get_delta_weight(name)).to(weight.dtype)
        module.base_layer.weight = nn.Parameter(whole, requires_grad=False)
        module.merged_adapters.append(name)
