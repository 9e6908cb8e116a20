"""The CrossEncoder of sentence-transformers over a causal LM, asked with the very prompt of our `yes_no`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrec.protocols import Codes, Floats, Query
from llmrec.score.config import WordsConfig
from llmrec.score.labels import yes_no_labels
from llmrec.score.loading import body_dtype
from llmrec.score.tasks import Choice
from llmrec.score.words import Vocabulary, WordsPrompt
from llmrec.tensors import read_tensors, write_tensors
from llmrec.word_model import layout_of

NEGATIVES = 4
"""Candidates beside the one that came next that a choice is trained on."""

BATCH = 16
BATCH_READ = 4
"""Pairs that are read at once, which `predict` sorts by length: the fastest that speed.py finds."""


def cross_encoder(base: Path, vocabulary: Vocabulary, **model: Any) -> Any:
    """`CrossEncoder` with `LogitScore`: the logit of yes less that of no after a prompt, and nothing else.

    Without the modality a chat template would be put around the prompt, and what is asked would be another.
    """
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    reader = Transformer(
        str(base),
        transformer_task="text-generation",
        modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
        module_output_name="causal_logits",
        model_kwargs=model,
    )
    return CrossEncoder(modules=[reader, LogitScore(*yes_no_labels(vocabulary))], device="cpu")


class CrossScorer:
    """A CrossEncoder that reads each candidate with its history by itself.

    Parameters
    ----------
    base
        Folder of the causal LM.
    lines
        The catalogue in words, by code.
    shape
        Of the `yes_no` model that it stands beside: window, tokens of a line, rank, targets.
    """

    name = "lm"

    def __init__(self, base: Path, lines: Sequence[str], shape: WordsConfig) -> None:
        from peft import LoraConfig
        from transformers import AutoTokenizer

        vocabulary = Vocabulary(base)
        tokens = vocabulary.lines(lines, shape.line_tokens)
        self.prompt = WordsPrompt(vocabulary, layout_of(shape), tokens, shape.window)
        self.decode = AutoTokenizer.from_pretrained(base).decode
        self.model = cross_encoder(base, vocabulary)
        # As ours: bfloat16 where the processor has it, which is many times slower where it has not.
        self.fast = body_dtype(shape.precision) == torch.bfloat16
        self.model.add_adapter(LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=shape.targets))
        self.asking = 0.0
        """Seconds that all users took."""
        self._kept: Path | None = None

    def pair(self, query: Query, code: int) -> str:
        """The prompt in words."""
        p = self.prompt
        tokens = [*p.beginning(query.history), *p.stem(query), *p.lines[code], p.vocabulary.end, *p.last]
        return str(self.decode(tokens))

    def train(self, choices: Sequence[Choice], minutes: float, folder: Path, key: str) -> tuple[float, int]:
        """Binary cross-entropy on what came next and on some of the candidates beside it, for some minutes.

        What is trained, and what is answered afterwards, is kept in the folder: a killed run goes on.

        Parameters
        ----------
        key
            Names the run; what another one left is not taken up.

        Returns
        -------
        tuple
            Seconds, and pairs that were learned.
        """
        folder.mkdir(parents=True, exist_ok=True)
        adapter, self._kept = folder / "adapter.safetensors", folder / "scores.safetensors"
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if adapter.is_file():
            tensors, told = read_tensors(adapter)
            if told["key"] == key:
                for name, values in tensors.items():
                    parameters[name].data.copy_(values)
                return float(told["seconds"]), int(told["pairs"])
        self._kept.unlink(missing_ok=True)
        seconds, pairs = self._trained(choices, minutes, folder)
        write_tensors(adapter, parameters, {"key": key, "seconds": str(seconds), "pairs": str(pairs)})
        return seconds, pairs

    def _trained(self, choices: Sequence[Choice], minutes: float, folder: Path) -> tuple[float, int]:
        from datasets import Dataset
        from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
        from transformers import TrainerCallback

        rng, rows = np.random.default_rng(0), []
        for choice in choices:
            others = np.delete(np.arange(len(choice.candidates)), choice.truth)
            places = [choice.truth, *rng.permutation(others)[:NEGATIVES].tolist()]
            rows += [
                (self.pair(choice.query, int(choice.candidates[i])), "", float(i == choice.truth))
                for i in places
            ]
        names = ("query", "answer", "label")
        data = Dataset.from_dict({n: [row[i] for row in rows] for i, n in enumerate(names)})
        begun = time.monotonic()

        class Trainer(CrossEncoderTrainer):  # type: ignore[misc]
            def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
                """None: its statistics of columns fail at the second text of the pairs, which is empty."""

        class Until(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                control.should_training_stop = time.monotonic() - begun > 60 * minutes

        arguments = CrossEncoderTrainingArguments(
            output_dir=str(folder),
            num_train_epochs=100,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            bf16=self.fast,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=data,
            loss=BinaryCrossEntropyLoss(self.model),
            callbacks=[Until()],
        )
        trainer.train()
        return time.monotonic() - begun, trainer.state.global_step * BATCH

    def forget(self) -> None:
        """Nothing is kept."""

    def score(self, queries: Sequence[Query], candidates: Sequence[Codes]) -> list[Floats]:
        """Log-odds of yes for each candidate of each query; those that an earlier run has are not asked."""
        found: dict[str, torch.Tensor] = {}
        if self._kept is not None and self._kept.is_file():
            found, told = read_tensors(self._kept)
            self.asking = float(told["seconds"])
        for i in range(len(queries)):
            if str(i) in found:
                continue
            asked = [(self.pair(queries[i], int(code)), "") for code in candidates[i]]
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
                values = self.model.predict(
                    asked, batch_size=BATCH_READ, show_progress_bar=False, activation_fn=torch.nn.Identity()
                )
            self.asking += time.perf_counter() - begun
            found[str(i)] = torch.from_numpy(np.asarray(values, np.float32))
            if self._kept is not None:
                write_tensors(self._kept, found, {"seconds": str(self.asking)})
        return [found[str(i)].numpy() for i in range(len(queries))]
