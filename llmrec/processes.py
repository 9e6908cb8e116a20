"""The processes that share one training run, started by `accelerate launch` or `torchrun`; else there is one.

All of them do the same work but for their part of each batch, and one of them, the main one, decides whatever
depends on a clock, validates, and writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

WAIT = timedelta(hours=6)
"""How long the others wait for the main process, which may fit retrievers or validate meanwhile."""


class Processes:
    """What the processes of a run tell each other. One alone talks to nobody.

    Attributes
    ----------
    count, index
        How many there are, and which this one is, from 0.
    main
        Whether this is the one that writes.
    device
        Where this one computes: a GPU of its own where there are any.
    fsdp_version
        Of the FSDP that accelerate's configuration asks for; 0 for none.
    """

    def __init__(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        cpu = not torch.cuda.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
        self._state: Any = PartialState(cpu=cpu, timeout=WAIT)
        self.count: int = self._state.num_processes
        self.index: int = self._state.process_index
        self.main: bool = self._state.is_main_process
        self.device: torch.device = self._state.device
        wanted = bool(parse_flag_from_env("ACCELERATE_USE_FSDP")) and self.count > 1
        self.fsdp_version = int(os.environ.get("FSDP_VERSION", "1")) if wanted else 0

    def agreed(self, value: Value) -> Value:
        """The value that the main process has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        told: list[Value] = broadcast_object_list([value])
        return told[0]

    def agreed_numbers(self, values: Sequence[float]) -> list[float]:
        """The same for a few numbers, which is fast enough for every step."""
        if self.count == 1:
            return list(values)
        from accelerate.utils import broadcast

        # Not every device has numbers of double precision.
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        told: list[float] = broadcast(torch.tensor(values, dtype=kind, device=self.device)).tolist()
        return told

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        total: Tensor = reduce(tensor, "sum")
        return total

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes: (...) -> (processes, ...)."""
        if self.count == 1:
            return tensor[None]
        from accelerate.utils import gather

        found: Tensor = gather(tensor[None])
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        self._state.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do."""
        with self._state.main_process_first():
            yield

    def end(self) -> None:
        """Say good-bye at the end of a program."""
        self._state.destroy_process_group()
