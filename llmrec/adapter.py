"""LoRA matrices on a causal LM, and the folder in which a tuned one is kept with its head and its card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor, nn

from llmrec.card import Card
from llmrec.errors import ConfigError, ModelError
from llmrec.lora import fused
from llmrec.model_card import model_card
from llmrec.score.config import ItemTokensConfig, LMConfig, WordsConfig
from llmrec.tensors import read_tensors, write_tensors

CARD, PAGE, HEAD, LORA = "card.json", "README.md", "head.safetensors", "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def fresh_adapter(body: Any, config: LMConfig) -> Any:
    """The body with LoRA matrices to train (Hu et al. 2021, arXiv 2106.09685).

    Raises
    ------
    ConfigError
        If the base has no such modules.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.targets)
    try:
        adapted: Any = get_peft_model(body, settings)
    except ValueError as unknown:
        raise ConfigError(f"lm.targets does not fit the base model: {unknown}") from unknown
    # peft notes the folder, which says nothing on another machine.
    adapted.peft_config["default"].base_model_name_or_path = config.base
    return fused(adapted)


def kept_adapter(body: Any, folder: Path, *, trainable: bool = False) -> Any:
    """The body with the LoRA matrices that `write_adapter` wrote, for serving or to train them further.

    Raises
    ------
    ModelError
        If they are damaged, or are not of such a body.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted = PeftModel.from_pretrained(body, str(folder), is_trainable=trainable)
        # peft leaves out what the file lacks, and what the body has no place for.
        needed, there = set(get_peft_model_state_dict(adapted)), set(read_tensors(folder / LORA)[0])
        if needed != there:
            odd = ", ".join(sorted(needed ^ there)[:3])
            raise ValueError(f"{LORA} is of another body: {len(needed ^ there)} matrices differ, {odd}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as broken:
        raise ModelError(f"{folder} holds no complete adapter: {broken}") from broken
    return fused(adapted)


def write_adapter(
    folder: Path, body: Any, head: Mapping[str, Tensor], config: LMConfig, card: Card | None
) -> None:
    """Write adapter (peft's own files), head and card into a folder; safetensors, JSON and a page of text.

    Raises
    ------
    ModelError
        If there is no card: the model is not trained.
    """
    if card is None:
        raise ModelError("only a trained language model can be saved")
    folder.mkdir(parents=True, exist_ok=True)
    body.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # peft's own page has fields to fill in.
    (folder / PAGE).write_text(model_card(config, card), encoding="utf-8")
    write_tensors(folder / HEAD, head, {})
    written = {"config": config.model_dump(), "card": asdict(card)}
    (folder / CARD).write_text(json.dumps(written, indent=1), encoding="utf-8")


def export_adapter(folder: Path, base: Path, out: Path) -> None:
    """Write the LoRA matrices as an inference server loads them: named from the whole causal LM.

    Ours are named from its inner transformer, which is all that is trained.

    Raises
    ------
    ModelError
        If the folder holds no complete adapter, or one of fewer layers than the server would run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config, _, _ = read_adapter(folder)
    if config.layers is not None:
        raise ModelError(f"{folder} was tuned on the first {config.layers} layers; a server runs all of them")
    with torch.device("meta"):
        inner = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).base_model_prefix
    tensors, _ = read_tensors(folder / LORA)
    start = "base_model.model."
    named = {name.replace(start, f"{start}{inner}.", 1): tensor for name, tensor in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / LORA, named, {})
    shutil.copyfile(folder / SETTINGS, out / SETTINGS)


def read_adapter(folder: Path) -> tuple[ItemTokensConfig | WordsConfig, Card, dict[str, Tensor]]:
    """Settings, card and head of what `write_adapter` wrote.

    Raises
    ------
    ModelError
        If anything is missing or damaged.
    """
    try:
        stored = json.loads((folder / CARD).read_text(encoding="utf-8"))
        config: ItemTokensConfig | WordsConfig = TypeAdapter(LMConfig).validate_python(stored["config"])
        card = Card(**stored["card"])
        head, _ = read_tensors(folder / HEAD)
        for name in ("counts", "late", "scale" if isinstance(config, WordsConfig) else "unseen"):
            if name not in head:
                raise ValueError(f"{HEAD} has no {name}")
        for name in (LORA, SETTINGS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as broken:
        raise ModelError(f"{folder} holds no complete adapter: {broken}") from broken
    return config, card, head


def adapter_hash(folder: Path) -> str:
    """SHA-256 of what was trained: LoRA matrices and head."""
    digest = hashlib.sha256()
    for name in (LORA, HEAD):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def on_device(model: nn.Module) -> nn.Module:
    """The model for serving, on a GPU where there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
