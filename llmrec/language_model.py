"""The tuned language model as one thing: made, trained, saved, loaded, grown with the catalogue."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from llmrec.catalog import RENDERER_HASH
from llmrec.errors import ModelError
from llmrec.families import Texts
from llmrec.fetch import tokenizer_hash, weights_hash
from llmrec.metrics import summary
from llmrec.prompt import Prompt
from llmrec.protocols import Codes, Floats, Retriever
from llmrec.recipe import HeldOut, Recipe, RetrievalConfig, hash_histories, ranks_in
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.item_tokens import ItemTokenModel, ItemTokenScorer, instruction_tokens
from llmrec.score.loading import body_dtype, load_body
from llmrec.score.tasks import ItemTokensTask
from llmrec.search import with_language_model
from llmrec.training import LoRATrainer, Progress, TrainingReport, read_tensors, write_tensors

logger = logging.getLogger(__name__)

VALIDATION_USERS = 256
"""Held-out users that decide which state of a training run is kept."""


@dataclass(frozen=True, slots=True)
class Card:
    """What an adapter belongs to. The first five must match when it is loaded, data and versions should."""

    base_sha256: str
    tokenizer_sha256: str
    prompt_sha256: str
    renderer_sha256: str
    encoder_sha256: str
    data_sha256: str
    versions: dict[str, str]
    training: dict[str, Any]

    def check(self, other: Card) -> None:
        """Refuse another base, tokenizer, prompt, renderer or encoder; warn of other data and versions.

        Raises
        ------
        ModelError
            Naming both hashes.
        """
        names = ("base", "tokenizer", "prompt", "renderer", "encoder")
        for name in names:
            mine, theirs = getattr(self, f"{name}_sha256"), getattr(other, f"{name}_sha256")
            if mine != theirs:
                raise ModelError(
                    f"the adapter belongs to another {name}: {mine[:12]}... then, {theirs[:12]}... now; "
                    f"use the {name} it was trained with, or fine-tune again"
                )
        if self.data_sha256 != other.data_sha256:
            logger.warning(
                "the adapter was trained on other events than the retrievers were fitted on; "
                "fine-tune again to bring it up to date"
            )
        changed = [
            f"{n} {v} -> {other.versions.get(n)}"
            for n, v in self.versions.items()
            if other.versions.get(n) != v
        ]
        if changed:
            logger.warning("the adapter was trained with other versions: %s", ", ".join(changed))


def make_card(
    config: ItemTokensConfig, base: Path, encoder: str, data: str, report: Mapping[str, Any]
) -> Card:
    """The card of an adapter trained here and now."""
    return Card(
        base_sha256=weights_hash(base),
        tokenizer_sha256=tokenizer_hash(base),
        prompt_sha256=Prompt.load(config.prompt).sha256,
        renderer_sha256=RENDERER_HASH,
        encoder_sha256=encoder,
        data_sha256=data,
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        training=dict(report),
    )


class LanguageModel:
    """A tuned model with its settings and its card.

    Parameters
    ----------
    model
        With LoRA matrices in its body.
    config
        Its shape.
    card
        What it belongs to; None before it is trained.
    """

    def __init__(self, model: ItemTokenModel, config: ItemTokensConfig, card: Card | None = None) -> None:
        self.model, self.config, self.card = model, config, card
        self.dtype = body_dtype(config.precision)
        self.scorer = ItemTokenScorer(model, config.window, self.dtype)

    @classmethod
    def new(
        cls, config: ItemTokensConfig, base: Path, vectors: Floats, counts: NDArray[Any], seed: int = 0
    ) -> LanguageModel:
        """Make a model to train: fresh LoRA matrices (Hu et al. 2021, arXiv 2106.09685) and head.

        Parameters
        ----------
        base
            Folder of the causal LM.
        vectors
            Text vectors of the catalogue, shape (items, dim).
        counts
            Weight of the training events of each item, shape (items,).
        """
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        body = load_body(base, config.layers, body_dtype(config.precision))
        settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets)
        adapted: Any = get_peft_model(body, settings)
        # peft notes the folder, which says nothing on another machine.
        adapted.peft_config["default"].base_model_name_or_path = config.base
        return cls(_assemble(adapted, config, base, vectors, counts), config)

    def save(self, folder: Path) -> None:
        """Write adapter (peft's own files), head and card into a folder; safetensors and JSON only."""
        if self.card is None:
            raise ModelError("only a trained language model can be saved")
        folder.mkdir(parents=True, exist_ok=True)
        body: Any = self.model.body
        body.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        parameters = dict(self.model.named_parameters())
        head = {name: parameters[name] for name in self.model.head_names}
        write_tensors(folder / "head.safetensors", {**head, "counts": self.model.counts}, {})
        card = {"config": self.config.model_dump(), "card": asdict(self.card)}
        (folder / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, base: Path, vectors: Floats, encoder: str, data: str) -> LanguageModel:
        """Load what `save` wrote.

        Parameters
        ----------
        base
            Folder of the causal LM; must hold the weights that the adapter was trained on.
        vectors
            Text vectors of the catalogue, which may have grown since, shape (items, dim).
        encoder
            Fingerprint of the encoder that made them.
        data
            Fingerprint of the log; another one than it was trained on is a warning.

        Raises
        ------
        ModelError
            If anything that the adapter depends on is another.
        """
        from peft import PeftModel

        try:
            stored = json.loads((folder / "card.json").read_text(encoding="utf-8"))
            config, card = ItemTokensConfig(**stored["config"]), Card(**stored["card"])
            head, _ = read_tensors(folder / "head.safetensors")
            counts = head.pop("counts").numpy()
            if not (folder / "adapter_model.safetensors").is_file():
                raise FileNotFoundError("adapter_model.safetensors is missing")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as broken:
            raise ModelError(f"{folder} holds no complete adapter: {broken}") from broken
        card.check(make_card(config, base, encoder, data, {}))
        body = load_body(base, config.layers, body_dtype(config.precision))
        adapted: Any = PeftModel.from_pretrained(body, str(folder), is_trainable=False)
        model = _assemble(adapted, config, base, vectors[: len(counts)], counts)
        model.load_state_dict(head, strict=False)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.eval(), config, card).grown(vectors)

    def grown(self, vectors: Floats) -> LanguageModel:
        """The same for a catalogue whose text vectors changed or grew: new items are known by their text."""
        old = self.model
        counts = np.zeros(len(vectors), dtype=np.float32)
        counts[: len(old.counts)] = old.counts.cpu().numpy()
        model = _model(old.body, old.instruction.tolist(), vectors, counts, self.config)
        state = {n: p.detach() for n, p in old.named_parameters() if not n.startswith("body.")}
        for name in ("id_in.weight", "id_out.weight"):
            state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, len(vectors) - len(old.counts)))
        model.load_state_dict(state, strict=False)
        return LanguageModel(model.to(old.counts.device).eval(), self.config, self.card)


def _assemble(
    body: torch.nn.Module, config: ItemTokensConfig, base: Path, vectors: Floats, counts: NDArray[Any]
) -> ItemTokenModel:
    before, after = Prompt.load(config.prompt).around("history")
    if after:
        raise ModelError(f"prompt {config.prompt!r} has words after the history; the last item is read last")
    words = instruction_tokens(base, before)
    return _model(body, words, vectors, counts, config)


def _model(
    body: torch.nn.Module,
    instruction: Sequence[int],
    vectors: Floats,
    counts: NDArray[Any],
    config: ItemTokensConfig,
) -> ItemTokenModel:
    return ItemTokenModel(
        body,
        instruction,
        vectors,
        counts,
        config.head_dim,
        config.dropout,
        config.id_dropout,
        config.id_out_dropout,
    )


def measure(scorer: ItemTokenScorer, held_out: HeldOut) -> dict[str, float]:
    """NDCG@10 and Recall@10 of the language model alone over the catalogue, and nats per held-out item."""
    found = scorer.retrieve(held_out.queries, 10)
    ranks = ranks_in((hits.items for hits in found), held_out.targets)
    scores = scorer.score(held_out.queries, [held_out.targets[i : i + 1] for i in range(len(found))])
    nats = [-float(values[0]) for values in scores]
    return {**summary(ranks, ["ndcg@10", "recall@10"]), "nats": float(np.mean(nats))}


def fine_tune(
    histories: Sequence[Codes],
    weights: Sequence[Floats] | None,
    held_out: HeldOut,
    texts: Texts,
    recipe: Recipe,
    retrievers: Mapping[str, Retriever],
    base: Path,
    config: ItemTokensConfig,
    training: TrainingConfig,
    retrieval: RetrievalConfig,
    *,
    data: str,
    folder: Path | None = None,
    on_step: Callable[[Progress, float], None] | None = None,
) -> tuple[LanguageModel, TrainingReport, Recipe]:
    """Train on histories, then fit the model's weights in the recipe on what was held out.

    `weights` are those of the events, one array a history, None if all are 1.
    Neither `histories` nor the fitted `retrievers` may hold the held-out events.
    """
    with tempfile.TemporaryDirectory(prefix="llmrec-") as temporary:
        lm, report = train_language_model(
            histories,
            weights,
            held_out,
            texts.vectors,
            base,
            config,
            training,
            encoder=texts.encoder.fingerprint,
            data=data,
            folder=folder or Path(temporary),
            on_step=on_step,
        )
    recipe = with_language_model(recipe, retrievers, lm.scorer, held_out, texts.lines, retrieval)
    return lm, report, recipe


def train_language_model(
    histories: Sequence[Codes],
    weights: Sequence[Floats] | None,
    held_out: HeldOut,
    vectors: Floats,
    base: Path,
    config: ItemTokensConfig,
    training: TrainingConfig,
    *,
    encoder: str,
    data: str,
    folder: Path,
    on_step: Callable[[Progress, float], None] | None = None,
) -> tuple[LanguageModel, TrainingReport]:
    """Fine-tune on histories; a run of the same data and settings in `folder` is continued.

    `held_out` decides which state is kept; it is not trained on.
    """
    counts = np.bincount(
        np.concatenate([np.empty(0, np.int32), *histories]),
        None if weights is None else np.concatenate([np.empty(0, np.float32), *weights]),
        minlength=len(vectors),
    )
    model = LanguageModel.new(config, base, vectors, counts, training.seed)
    card = make_card(config, base, encoder, data, {})
    # The same log over a changed catalogue is another run.
    items = hashlib.sha256(vectors.tobytes()).hexdigest()
    selected_on = held_out.sha256()
    # The number is that of the batches: a run on others is not continued.
    key = json.dumps([2, config.model_dump(), training.model_dump(), asdict(card), items, selected_on])
    task = ItemTokensTask(model.model, histories, config.window, training, weights)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    trainer = LoRATrainer(task, training, folder, fingerprint, dtype=model.dtype)
    sample = held_out.sample(VALIDATION_USERS, training.seed)

    def validate() -> dict[str, float]:
        return measure(ItemTokenScorer(model.model, config.window, model.dtype), sample)

    report = trainer.run(validate if len(sample.queries) else None, on_step)
    made = {
        **asdict(report),
        "settings": training.model_dump(),
        "histories_sha256": hash_histories(histories),
        "selected_on_sha256": selected_on,
    }
    card = make_card(config, base, encoder, data, made)
    return LanguageModel(model.model, config, card), report
