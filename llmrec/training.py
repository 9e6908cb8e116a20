"""LoRA fine-tuning: the loop and its checkpoints. Shared by finetune/ and the CLI."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmrec.errors import DataError, ModelError
from llmrec.processes import Processes
from llmrec.progress import Progress, TrainingReport, cooling
from llmrec.run_log import RunLog, need_tensorboard
from llmrec.score.config import TrainingConfig
from llmrec.score.tasks import Batch, Task
from llmrec.sharding import ShardedLayers
from llmrec.tensors import random_state, read_tensors, set_random_state, write_tensors

logger = logging.getLogger(__name__)

VALIDATION_SECONDS = 90.0
"""Longest stretch of training between two validations in a run that lasts by minutes."""

VALIDATING = 0.25
"""What validations add to the time of such a run, about, where they take long."""

WARMUP = 0.1
"""Share of the budget over which the learning rate rises, at most."""

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"

Validate = Callable[[], Mapping[str, float]]
"""Measures the model as it is; ``ndcg@10`` decides which state is kept, and of equal ones ``nats``."""


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained: the LoRA matrices and the head."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class LoRATrainer(Generic[Batch]):
    """One training run, resumable from its folder, in one process or in several that share each step.

    Parameters
    ----------
    task
        Model, batches and loss. The model's body carries LoRA matrices already; everything else in the
        body is frozen.
    folder
        Where checkpoint, best state and log are written, by the main process alone; that of the main process
        is read by all. A checkpoint of the same `fingerprint` and as many processes is continued.
    fingerprint
        Hash of data and settings; a checkpoint of another run is not continued.
    dtype
        bfloat16 runs the loss under autocast.

    Raises
    ------
    ImportError
        If TensorBoard is wanted and not installed.
    ModelError
        If gradient checkpointing is wanted of a model that has none.
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
        if config.tensorboard:
            need_tensorboard()
        self.team = Processes()
        self.task, self.config, self.dtype = task, config, dtype
        self.folder = self.team.agreed(folder)
        # What one process was given to draw is not what another draws.
        self.fingerprint = fingerprint + (f"/{self.team.count}" if self.team.count > 1 else "")
        self.progress = Progress()
        self.log: RunLog | None = None
        model: Any = task.model
        body = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("body.")]
        head = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("body.")]
        optimiser = torch.optim.AdamW(
            [
                {"params": body, "base": config.learning_rate},
                {"params": head, "base": config.head_learning_rate},
            ],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.layers = ShardedLayers(model.body, self.team) if self.team.fsdp_version else None
        self.model: nn.Module = model.to(self.team.device)
        self.optimiser: Any = optimiser
        self.parameters = trainable(model)

    def run(
        self, validate: Validate | None = None, on_step: Callable[[Progress, float], None] | None = None
    ) -> TrainingReport:
        """Train to the end of the budget and leave the best validated state in the model.

        `on_step` is called with the progress and the finished share of the budget. Only the main process
        calls it, and `validate`, which all call where the frozen layers are spread over them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed + self.team.index)
        self._resume()
        p = self.progress
        if self.team.main:
            run = self.fingerprint[:12]
            self.log = RunLog(self.folder, run, p.logged, p.step, tensorboard=self.config.tensorboard)
        checkpointing(self.model, self.config.gradient_checkpointing)
        try:
            self._loop(validate, on_step if self.team.main else None)
            return self._finish(validate)
        finally:
            checkpointing(self.model, False)
            if self.log is not None:
                self.log.close()

    def _loop(self, validate: Validate | None, on_step: Callable[[Progress, float], None] | None) -> None:
        p = self.progress
        started = time.monotonic() - p.seconds
        saved = time.monotonic()
        for batch in self._stream():
            if self._done() >= 1:
                break
            loss = self._step(batch)
            now = time.monotonic()
            # One clock decides for all processes.
            due = float(now - saved > self.config.checkpoint_seconds)
            seconds, due = self.team.agreed_numbers([now - started, due])
            p.took(loss, seconds)
            if p.step % self.config.log_steps == 0:
                self._note("step", {"rate": self._rate(), "loss": loss})
            if on_step is not None:
                on_step(p, self._done())
            if validate is not None and self._done() * self._validations() >= p.validated + 1:
                started += self._validate(validate)
                # The best state and the curve that names it are kept together.
                due = due or self.progress.stale == 0
            if due:
                self._checkpoint()
                saved = time.monotonic()

    def _spent(self) -> float:
        """Spent share of the budget; the sooner of minutes and steps."""
        by_time = self.progress.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        by_step = self.progress.step / self.config.steps if self.config.steps else 0.0
        return max(by_time, by_step)

    def _done(self) -> float:
        """Finished share of the run: of its budget, or of what is left of it while it cools."""
        p = self.progress
        if p.stopped:
            return 1.0
        return max(self._spent(), p.events / p.cooling.end if p.cooling else 0.0)

    def _rate(self) -> float:
        """Share of the learning rate: up over the first steps, then down to 0 at the end of the run.

        It is up after a tenth of the budget at the latest: a short run would spend itself on the way.
        """
        p = self.progress
        rate = max(0.0, 1.0 - self._spent())
        if p.cooling is not None:
            c = p.cooling
            rate = min(rate, max(0.0, c.rate * (c.end - p.events) / (c.end - c.start)))
        warm = max((p.step + 1) / max(1, self.config.warmup_steps), self._spent() / WARMUP)
        return rate * min(1.0, warm)

    def _validations(self) -> int:
        """How often the model is validated over the whole budget; in a run of steps that is as it is set."""
        seconds = 60 * (self.config.minutes or 0.0)
        wanted = max(self.config.validations, math.ceil(seconds / VALIDATION_SECONDS))
        if not seconds or not self.progress.validating:
            return wanted
        return max(1, min(wanted, math.floor(VALIDATING * seconds / self.progress.validating)))

    def _stream(self) -> Iterator[Batch]:
        """Batches without end; their order depends on seed and epoch alone, so a resumed run is exact."""
        p, parts = self.progress, self.team.count * self.config.accumulate
        while True:
            rng = np.random.default_rng([self.config.seed, p.epoch])
            for batch in itertools.islice(self.task.epoch(rng, parts), p.batch, None):
                p.batch += 1
                yield batch
            if not p.batch:
                raise DataError(
                    f"there is nothing to learn from in epoch {p.epoch}: a stream has to give its rows as "
                    "often as it is read"
                )
            p.epoch, p.batch = p.epoch + 1, 0

    def _step(self, batch: Batch) -> float:
        """Learn from a batch, part by part, and return its loss. Every process takes its parts of it."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * self._rate()
        self.model.train()
        parts = self.task.split(batch, self.team.count * self.config.accumulate)
        total, loss = self.task.weight(batch), 0.0
        own = parts[self.team.index :: self.team.count]
        idle = 0
        if self.layers is not None:
            # Layers that are spread are read by all together: who has no part left reads one that counts 0.
            idle = math.ceil(len(parts) / self.team.count) - len(own)
        for at, part in enumerate([*own, *parts[:idle]]):
            with torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                mean = self.task.loss(part)
            # A part counts as much as its events do, so that the sum is the mean over the whole batch.
            share = self.task.weight(part) / total if at < len(own) else 0.0
            torch.autograd.backward(mean * share)
            loss += float(mean.detach()) * share
        if self.team.count > 1:
            loss = self._sum_gradients(loss)
        self._need_number(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.events += self.task.events(batch)
        return loss

    def _need_number(self, nats: float) -> None:
        """Stop a run that has diverged: what it has learned is lost, and more steps do not bring it back."""
        if not math.isfinite(nats):
            raise ModelError(
                f"training diverged at step {self.progress.step}, its loss is {nats}: lower "
                "training.learning_rate or training.head_learning_rate"
            )

    def _sum_gradients(self, loss: float) -> float:
        """Add up the gradients of all processes, in one message, and return the sum of their losses."""
        parameters = list(self.parameters.values())
        device = self.team.device
        # What no process has used has no gradient afterwards either, and is not decayed.
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        summed = self.team.summed(torch.cat([torch.tensor([loss], device=device), used, *flat]))
        found, at = float(summed[0]), 1 + len(parameters)
        for number, parameter in enumerate(parameters, start=1):
            gradient = summed[at : at + parameter.numel()].view_as(parameter).to(parameter.dtype)
            parameter.grad = gradient if summed[number] > 0 else None
            at += parameter.numel()
        return found

    def _validate(self, validate: Validate) -> float:
        """Measure, keep the state if it is the best so far, and return the seconds it took."""
        begun = time.monotonic()
        p = self.progress
        self.model.eval()
        # Layers that are spread can only be read by all together.
        asked = self.team.main or self.layers is not None
        measures = self.team.agreed(dict(validate()) if asked else {})
        p.curve.append(
            {"step": p.step, "events": p.events, "seconds": p.seconds, "train_nats": p.loss, **measures}
        )
        logger.info("step %d: %s", p.step, p.curve[-1])
        self._need_number(measures.get("nats", 0.0))
        self._note("validation", measures)
        p.stale += 1
        # Few users rank many states alike: what they chose is likelier under some.
        nats = measures.get("nats", math.inf)
        if (measures["ndcg@10"], -nats) > (p.best, -p.best_nats):
            p.best, p.best_nats, p.stale = measures["ndcg@10"], nats, 0
            if self.team.main:
                write_tensors(self.folder / BEST, self.parameters, {"step": str(p.step)})
        p.stopped = self.config.patience is not None and p.stale >= self.config.patience
        if p.cooling is None:
            p.cooling = cooling(p.curve, self._rate())
        seconds = time.monotonic() - begun
        (p.validating,) = self.team.agreed_numbers([seconds])
        p.validated = math.floor(self._done() * self._validations() + 1e-9)
        return seconds

    def _note(self, kind: str, values: Mapping[str, float]) -> None:
        """Write a line of the log."""
        p = self.progress
        p.logged += 1
        if self.log is not None:
            known = {"events": p.events, "seconds": p.seconds, "train_nats": p.loss}
            self.log.add(kind, p.step, {**known, **values})

    def _finish(self, validate: Validate | None) -> TrainingReport:
        p = self.progress
        best, best_step = self.folder / BEST, p.step
        if validate is not None and (not p.curve or p.curve[-1]["step"] != p.step):
            self._validate(validate)
        # Whoever gives the same command again has the result at once.
        self._checkpoint()
        self.team.wait()
        if best.is_file():
            tensors, metadata = read_tensors(best)
            self._load(tensors)
            best_step = int(metadata["step"])
        # The main process may remove the folder as soon as it has its report.
        self.team.wait()
        if self.layers is not None:
            self.layers.restore()
        self.model.eval()
        speed = p.events / p.seconds if p.seconds else 0.0
        reason = ""
        if self._spent() < 1 and p.stopped:
            reason = f"{p.stale} validations in a row were no better"
        elif self._spent() < 1 and p.cooling is not None:
            reason = "it began to learn by heart"
        found = p.best if p.curve else None
        return TrainingReport(
            p.step, p.events, p.seconds, speed, found, best_step, p.curve, bool(reason), reason
        )

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def _checkpoint(self) -> None:
        # Each process draws its own dropout.
        drawn = self.team.gathered(random_state(self.team.device))
        if not self.team.main:
            return
        state: dict[str, Tensor] = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"optimiser.{key}.{name}"] = value
        state["rng"] = drawn
        metadata = {"fingerprint": self.fingerprint, "progress": json.dumps(asdict(self.progress))}
        write_tensors(self.folder / CHECKPOINT, state, metadata)

    @staticmethod
    def _kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a checkpoint holds; nothing where there is none, or one that cannot be read."""
        if not path.is_file():
            return {}, {}
        try:
            return read_tensors(path)
        except (SafetensorError, OSError) as broken:
            logger.warning("the checkpoint %s cannot be read (%s); starting anew", path, broken)
            return {}, {}

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        tensors, metadata = self._kept(path)
        # All have looked before anything is removed.
        self.team.wait()
        if metadata.get("fingerprint") != self.fingerprint:
            if metadata:
                logger.warning("the checkpoint in %s is of another run; starting anew", self.folder)
            if self.team.main:
                # Besides, what a run left that was killed before its first checkpoint.
                path.unlink(missing_ok=True)
                (self.folder / BEST).unlink(missing_ok=True)
            return
        self._load(tensors)
        for name, parameter in self.parameters.items():
            keys = {k.split(".")[1] for k in tensors if k.startswith("optimiser.") and k.endswith("." + name)}
            self.optimiser.state[parameter] = {
                key: tensors[f"optimiser.{key}.{name}"].to(parameter.device) for key in keys
            }
        set_random_state(tensors["rng"][self.team.index], self.team.device)
        self.progress = Progress.of(json.loads(metadata["progress"]))
        logger.info("continuing at step %d", self.progress.step)


def checkpointing(model: nn.Module, wanted: bool) -> None:
    """Let the layers of a model's body be computed again in the backward pass, or be kept.

    Raises
    ------
    ModelError
        If the model cannot do it.
    """
    body: Any = model.body
    if not wanted:
        if getattr(body, "is_gradient_checkpointing", False):
            body.gradient_checkpointing_disable()
        return
    if not getattr(body, "supports_gradient_checkpointing", False):
        raise ModelError(f"{type(body).__name__} has no gradient checkpointing; switch it off")
    body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
