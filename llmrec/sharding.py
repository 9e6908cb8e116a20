"""Frozen layers spread over the processes of a training run, by PyTorch's FSDP2.

What LoRA trains is small, and stays whole in each process; what it leaves frozen is large, and nothing else
is done with it than to read it. So each process keeps its part of every layer, and has the whole of one
layer at a time while it computes. The steps are those of the same processes without it.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import Tensor, nn

from llmrec.errors import ConfigError, ModelError
from llmrec.processes import Processes

logger = logging.getLogger(__name__)


class ShardedLayers:
    """The layers of a body while each process holds a part of them. Every process does this alike.

    Parameters
    ----------
    body
        With LoRA matrices; the parameters that have no gradient are spread.

    Raises
    ------
    ConfigError
        If another version of FSDP than 2 is configured.
    ModelError
        If the body does not say what its layers are.
    """

    def __init__(self, body: nn.Module, team: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if team.fsdp_version != 2:
            raise ConfigError(
                f"fsdp_version must be 2 in accelerate's configuration, got {team.fsdp_version}"
            )
        kinds = {kind for part in body.modules() for kind in getattr(part, "_no_split_modules", None) or ()}
        names = [name for name, part in body.named_modules() if type(part).__name__ in kinds]
        if not names:
            raise ModelError(f"{type(body).__name__} does not say what its layers are; train it without FSDP")
        mesh = init_device_mesh(team.device.type, (team.count,))
        self.body = body
        # FSDP changes a layer for good; these stand in for them afterwards.
        self._plain: dict[str, nn.Module] = {}
        for name in names:
            layer = body.get_submodule(name)
            self._plain[name] = copy.deepcopy(layer).to("meta")
            trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
            # Said expressly: a layer by itself would stay whole from its forward to its backward pass.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        logger.info("%d layers are spread over %d processes", len(names), team.count)

    def restore(self) -> None:
        """Put plain layers back, whole in each process, with what was trained as it is."""
        for name, plain in self._plain.items():
            layer = self.body.get_submodule(name)
            whole = {key: _whole(value) for key, value in layer.named_parameters()}
            for key, value in layer.named_buffers():
                owner, _, leaf = key.rpartition(".")
                setattr(plain.get_submodule(owner), leaf, value)
            plain.load_state_dict(whole, strict=False, assign=True)
            left = [key for key, value in plain.named_parameters() if value.is_meta]
            left += [key for key, value in plain.named_buffers() if value.is_meta]
            if left:
                raise ModelError(f"layer {name} cannot be put together again: {', '.join(left)}")
            plain.train(layer.training)
            self.body.set_submodule(name, plain)


def _whole(parameter: nn.Parameter) -> Tensor:
    """All of a parameter of which this process has a part; what is not spread is itself."""
    value: Any = parameter
    if not hasattr(value, "full_tensor"):
        return parameter
    return nn.Parameter(value.full_tensor(), requires_grad=parameter.requires_grad)
