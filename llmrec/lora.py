"""LoRA layers that add their update inside one matrix product, in the precision of the layer below."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's layer, whose update is not scaled, converted and added in passes of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y = base(x) + scale * B(A(x)); peft's own way wherever the layer is more than that."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(names) == 1 and not (self.disable_adapters or self.merged or self.lora_variant)
        plain = plain and not self.lora_bias.get(names[0])
        if not plain or args or kwargs or not isinstance(self.lora_dropout[names[0]], nn.Identity):
            other: Tensor = super().forward(x, *args, **kwargs)
            return other
        (name,) = names
        found: Tensor = self.base_layer(x)
        down = self.lora_A[name].weight.to(found.dtype)
        up = (self.lora_B[name].weight * self.scaling[name]).to(found.dtype)
        low = functional.linear(x.to(found.dtype), down)
        found.view(-1, found.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.T)
        return found


def fused(body: nn.Module) -> nn.Module:
    """The same body, its LoRA layers over linear ones fused."""
    for module in body.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
    return body
