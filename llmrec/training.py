"""LoRA fine-tuning: the loop and its checkpoints. Shared by finetune/ and the CLI."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmrec.score.config import TrainingConfig
from llmrec.score.tasks import Batch, Task

logger = logging.getLogger(__name__)


WORSE = 0.5
"""Nats an item by which the held-out loss has to rise above its lowest to end the run early."""

VALIDATION_SECONDS = 90.0
"""Longest stretch of training between two validations in a run that lasts by minutes."""


@dataclass(frozen=True, slots=True)
class Cooling:
    """The end of a run that was seen to learn by heart: from `start` to `end` events the rate falls to 0.

    `rate` is the share of the learning rate at its start.
    """

    start: int
    end: int
    rate: float


@dataclass(slots=True)
class Progress:
    """State of a run; written into every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    events: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    validated: int = 0
    best: float = -math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    cooling: Cooling | None = None


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run did. `curve` holds one row a validation: events, seconds, train_nats and the measures.

    `early` says that it ended before its budget, since the held-out loss rose.
    """

    steps: int
    events: int
    seconds: float
    events_per_second: float
    best: float
    best_step: int
    curve: list[dict[str, float]]
    early: bool = False

    def __str__(self) -> str:
        last = self.curve[-1]["train_nats"] if self.curve else math.nan
        return (
            f"{self.steps} steps, {self.events} events in {self.seconds:.0f} s "
            f"({self.events_per_second:.0f} a second), {last:.2f} nats an item; "
            f"validation NDCG@10 {self.best:.4f} at step {self.best_step}"
            + ("; ended early, since it began to learn by heart" if self.early else "")
        )


Validate = Callable[[], Mapping[str, float]]
"""Measures the model as it is; ``ndcg@10`` among the measures decides which state is kept."""


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained: the LoRA matrices and the head."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def cooling(curve: Sequence[Mapping[str, float]], rate: float) -> Cooling | None:
    """Whether the last validation says that a run learns by heart, and how it then ends.

    Where the held-out loss has risen by `WORSE` above its lowest, as many events follow as there were up to
    that lowest, with a falling learning rate: lists still get better while the rate falls, though the loss
    does not. The state that ranked best is kept either way.

    Parameters
    ----------
    curve
        Validations so far, with ``events`` and ``nats`` (never cooling without).
    rate
        Share of the learning rate now.
    """
    known = [row for row in curve if "nats" in row]
    if len(known) < 2:
        return None
    lowest = min(known, key=lambda row: row["nats"])
    if known[-1]["nats"] <= lowest["nats"] + WORSE:
        return None
    now = int(known[-1]["events"])
    return Cooling(now, now + int(lowest["events"]), rate)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file to a temporary name and rename it, so that no half file is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata)
    )
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors and metadata."""
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118


class LoRATrainer(Generic[Batch]):
    """One training run, resumable from its folder.

    Parameters
    ----------
    task
        Model, batches and loss. The model's body carries LoRA matrices already; everything else in the
        body is frozen.
    folder
        Where checkpoint and best state are written. A checkpoint of the same `fingerprint` is continued.
    fingerprint
        Hash of data and settings; a checkpoint of another run is not continued.
    """

    def __init__(
        self,
        task: Task[Batch],
        config: TrainingConfig,
        folder: Path,
        fingerprint: str,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from accelerate import Accelerator

        self.task, self.config, self.folder = task, config, folder
        model = task.model
        self.fingerprint = fingerprint
        self.progress = Progress()
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if dtype == torch.bfloat16 else "no"
        )
        body = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("body.")]
        head = [p for n, p in model.named_parameters() if not n.startswith("body.")]
        optimiser = torch.optim.AdamW(
            [
                {"params": body, "base": config.learning_rate},
                {"params": head, "base": config.head_learning_rate},
            ],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model = model.to(self.accelerator.device)
        self.optimiser: Any = optimiser
        self.parameters = trainable(model)

    def run(
        self, validate: Validate | None = None, on_step: Callable[[Progress, float], None] | None = None
    ) -> TrainingReport:
        """Train to the end of the budget and leave the best validated state in the model.

        `on_step` is called with the progress and the finished share of the budget.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed)
        self._resume()
        started = time.monotonic() - self.progress.seconds
        saved = time.monotonic()
        recent: list[float] = []
        for batch in self._stream():
            if self._done() >= 1:
                break
            loss = self._step(batch)
            recent = [*recent[-49:], loss]
            p = self.progress
            p.loss, p.seconds = float(np.mean(recent)), time.monotonic() - started
            if on_step is not None:
                on_step(p, self._done())
            if validate is not None and self._done() * self._validations() >= p.validated + 1:
                started += self._validate(validate)
            if time.monotonic() - saved > self.config.checkpoint_seconds:
                self._checkpoint()
                saved = time.monotonic()
        return self._finish(validate)

    def _spent(self) -> float:
        """Spent share of the budget; the sooner of minutes and steps."""
        by_time = self.progress.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        by_step = self.progress.step / self.config.steps if self.config.steps else 0.0
        return max(by_time, by_step)

    def _done(self) -> float:
        """Finished share of the run: of its budget, or of what is left of it while it cools."""
        cooling = self.progress.cooling
        return max(self._spent(), self.progress.events / cooling.end if cooling else 0.0)

    def _rate(self) -> float:
        """Share of the learning rate: up over the first steps, then down to 0 at the end of the run."""
        p = self.progress
        rate = max(0.0, 1.0 - self._spent())
        if p.cooling is not None:
            c = p.cooling
            rate = min(rate, max(0.0, c.rate * (c.end - p.events) / (c.end - c.start)))
        return rate * min(1.0, (p.step + 1) / max(1, self.config.warmup_steps))

    def _validations(self) -> int:
        """How often the model is validated over the whole budget."""
        minutes = self.config.minutes or 0.0
        return max(self.config.validations, math.ceil(60 * minutes / VALIDATION_SECONDS))

    def _stream(self) -> Iterator[Batch]:
        """Batches without end; their order depends on seed and epoch alone, so a resumed run is exact."""
        p = self.progress
        while True:
            rng = np.random.default_rng([self.config.seed, p.epoch])
            for batch in self.task.epoch(rng)[p.batch :]:
                p.batch += 1
                yield batch
            p.epoch, p.batch = p.epoch + 1, 0

    def _step(self, batch: Batch) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * self._rate()
        self.model.train()
        with self.accelerator.autocast():
            loss = self.task.loss(batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.events += self.task.events(batch)
        return float(loss.detach())

    def _validate(self, validate: Validate) -> float:
        """Measure, keep the state if it is the best so far, and return the seconds it took."""
        begun = time.monotonic()
        p = self.progress
        self.model.eval()
        measures = dict(validate())
        p.curve.append(
            {"step": p.step, "events": p.events, "seconds": p.seconds, "train_nats": p.loss, **measures}
        )
        logger.info("step %d: %s", p.step, p.curve[-1])
        if measures["ndcg@10"] > p.best:
            p.best = measures["ndcg@10"]
            write_tensors(self.folder / "best.safetensors", self.parameters, {"step": str(p.step)})
        if p.cooling is None:
            p.cooling = cooling(p.curve, self._rate())
        p.validated = math.floor(self._done() * self._validations() + 1e-9)
        return time.monotonic() - begun

    def _finish(self, validate: Validate | None) -> TrainingReport:
        p = self.progress
        best, best_step = self.folder / "best.safetensors", p.step
        if validate is not None and (not p.curve or p.curve[-1]["step"] != p.step):
            self._validate(validate)
        # Whoever gives the same command again has the result at once.
        self._checkpoint()
        if best.is_file():
            tensors, metadata = read_tensors(best)
            self._load(tensors)
            best_step = int(metadata["step"])
        self.model.eval()
        speed = p.events / p.seconds if p.seconds else 0.0
        early = p.cooling is not None and self._spent() < 1
        return TrainingReport(p.step, p.events, p.seconds, speed, p.best, best_step, p.curve, early)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def _checkpoint(self) -> None:
        state: dict[str, Tensor] = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"optimiser.{key}.{name}"] = value
        state["rng"] = torch.get_rng_state()
        metadata = {"fingerprint": self.fingerprint, "progress": json.dumps(asdict(self.progress))}
        write_tensors(self.folder / "checkpoint.safetensors", state, metadata)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.safetensors"
        if not path.is_file():
            # What a run left that was killed before its first checkpoint.
            (self.folder / "best.safetensors").unlink(missing_ok=True)
            return
        tensors, metadata = read_tensors(path)
        if metadata.get("fingerprint") != self.fingerprint:
            logger.warning("the checkpoint in %s is of another run; starting anew", self.folder)
            (self.folder / "best.safetensors").unlink(missing_ok=True)
            path.unlink()
            return
        self._load(tensors)
        for name, parameter in self.parameters.items():
            keys = {k.split(".")[1] for k in tensors if k.startswith("optimiser.") and k.endswith("." + name)}
            self.optimiser.state[parameter] = {
                key: tensors[f"optimiser.{key}.{name}"].to(parameter.device) for key in keys
            }
        torch.set_rng_state(tensors["rng"])
        stored = json.loads(metadata["progress"])
        if stored["cooling"] is not None:
            stored["cooling"] = Cooling(**stored["cooling"])
        self.progress = Progress(**stored)
        logger.info("continuing at step %d", self.progress.step)
