"""Fine-tuning the text encoder on a log: items that are chosen together come closer."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.encode.config import EncoderTrainingConfig
from llmrec.errors import DataError
from llmrec.protocols import Codes
from llmrec.quiet import quiet_transformers

CARD = "llmrec.json"
"""File beside the weights that says what an encoder was tuned on."""


def trained_on(histories: Sequence[Codes], lines: Sequence[str]) -> str:
    """Hash of training histories in the lines of their items."""
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "replace"))
    for codes in histories:
        digest.update(np.asarray(codes, dtype=np.int32).tobytes() + b"/")
    return digest.hexdigest()


def encoder_checked(name: str, histories: Sequence[Codes], lines: Sequence[str]) -> bool | None:
    """Whether a text encoder was tuned on these histories and no others.

    None for one that is known by name: it was published before. False for a folder that says otherwise, or
    nothing.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    card = folder / CARD
    try:
        said = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    except ValueError:
        return False
    return bool(said.get("histories_sha256") == trained_on(histories, lines))


@dataclass(frozen=True, slots=True)
class EncoderReport:
    """What a run did: pairs in all, steps, seconds, and the mean loss of the last steps."""

    pairs: int
    steps: int
    seconds: float
    loss: float

    def __str__(self) -> str:
        return f"{self.steps} steps over {self.pairs:,} pairs in {self.seconds:.0f} s, loss {self.loss:.3f}"


def pairs_of(
    histories: Sequence[Codes], lines: Sequence[str], window: int, history: int, most: int, seed: int
) -> list[tuple[str, str]]:
    """Texts that belong together: items chosen within `window` steps, and a history with its next item.

    A history's text is its latest `history` lines, the latest first, one a line; 0 makes no such pairs. Pairs
    of equal texts say nothing and are left out. Of more than `most` events a seeded sample is used, in an
    order drawn.
    """
    events = np.cumsum([0, *(max(len(codes) - 1, 0) for codes in histories)])
    pairs: list[tuple[str, str]] = []
    for row in np.random.default_rng(seed).permutation(events[-1]):
        user = np.searchsorted(events, row, side="right") - 1
        codes, place = histories[user], row - events[user] + 1
        target = lines[codes[place]]
        for step in range(1, min(window, int(place)) + 1):
            if lines[codes[place - step]] != target:
                pairs.append((lines[codes[place - step]], target))
        latest = codes[max(0, place - history) : place][::-1] if history else codes[:0]
        if len(latest) > 1 and target not in {lines[code] for code in latest}:
            pairs.append(("\n".join(lines[code] for code in latest), target))
        if len(pairs) >= most:
            break
    return pairs[:most]


def finetune_encoder(
    histories: Sequence[Codes],
    lines: Sequence[str],
    base: Path,
    out: Path,
    config: EncoderTrainingConfig,
    on_step: Callable[[int, float, float], None] = lambda step, done, loss: None,
) -> EncoderReport:
    """Train a sentence-transformers model and write it to a new folder, whole or not at all.

    The loss is a softmax over the items of the batch (van den Oord et al. 2018, arXiv 1807.03748;
    Henderson et al. 2017, arXiv 1705.00652).

    Parameters
    ----------
    histories
        Training histories; those of an evaluation without its held-out events.
    lines
        Text of each item, by code.
    base
        Folder of the model to start from.
    out
        Folder of the tuned model; must not exist or be empty.
    on_step
        Called with the step, the finished share, and the mean of the latest losses.

    Raises
    ------
    DataError
        If there is no pair to train on, or `out` holds something.
    ImportError
        If the packages of the extra ``lm`` or ``datasets`` are not installed.
    """
    try:
        import datasets  # noqa: F401
        import sentence_transformers  # noqa: F401
        import torch
    except ImportError as missing:
        raise ImportError('fine-tuning the encoder needs: pip install "llmrec[lm,datasets]"') from missing

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already; give a new folder")
    most = config.steps * config.batch
    pairs = pairs_of(histories, lines, config.window, config.history, most, config.seed)
    if len(pairs) < 2:
        raise DataError("no pairs to train on: no history has two items with different texts")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return _train(pairs, base, out, config, on_step, trained_on(histories, lines))


def _train(
    pairs: Sequence[tuple[str, str]],
    base: Path,
    out: Path,
    config: EncoderTrainingConfig,
    on_step: Callable[[int, float, float], None],
    sha256: str,
) -> EncoderReport:
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from transformers import PrinterCallback, TrainerCallback

    table = {"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]}
    with quiet_transformers():
        model: Any = SentenceTransformer(
            str(base), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    # No text is in a batch twice, which a small catalogue could not fill.
    distinct = len({text for pair in pairs for text in pair})
    longest = model.max_seq_length
    model.max_seq_length = min(config.length, longest or config.length)
    if config.lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear")
        # peft puts its matrices into the model itself, and takes them out when they are merged.
        adapted: Any = get_peft_model(model[0].auto_model, settings)
    losses: list[float] = []
    begun = time.monotonic()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            by_time = (time.monotonic() - begun) / (60 * config.minutes) if config.minutes else 0.0
            done = max(by_time, state.global_step / state.max_steps)
            on_step(
                state.global_step, min(done, 1.0), float(np.mean(losses[-20:])) if losses else float("nan")
            )
            control.should_training_stop = control.should_training_stop or done >= 1.0

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(Path(temporary) / "run"),
            max_steps=config.steps,
            per_device_train_batch_size=min(config.batch, max(2, distinct // 4), len(pairs)),
            learning_rate=config.learning_rate,
            warmup_steps=min(50, config.steps // 10),
            lr_scheduler_type="constant_with_warmup",
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            # An item that is there twice would be its own negative.
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(table),
            loss=MultipleNegativesRankingLoss(model, scale=config.scale),
            callbacks=[Watch()],
        )
        # It would print every log line; `on_step` is told of them.
        trainer.remove_callback(PrinterCallback)
        with quiet_transformers():
            trainer.train()
        steps = int(trainer.state.global_step)
        if not steps:
            raise DataError("no batch to train on: all pairs share a text")
        if config.lora:
            adapted.merge_and_unload()
        # What is served reads texts as long as before.
        model.max_seq_length = longest
        draft = Path(temporary) / "model"
        model.save(str(draft), safe_serialization=True)
        card = {"histories_sha256": sha256, "training": config.model_dump()}
        (draft / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(str(draft), str(out))
    return EncoderReport(len(pairs), steps, time.monotonic() - begun, _recent(losses))


def _recent(losses: Sequence[float]) -> float:
    return float(np.mean(losses[-20:])) if losses else float("nan")
