"""Loading a causal LM: its inner transformer, its first layers alone, its word head."""

from __future__ import annotations

import copy
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrec.errors import ConfigError, ModelError
from llmrec.quiet import loading_from, quiet_transformers
from llmrec.score.attention import use_blocks
from llmrec.score.config import Precision
from llmrec.score.packed import takes_branches

_shared: weakref.WeakValueDictionary[tuple[str, int | None, torch.dtype, bool], nn.Module] = (
    weakref.WeakValueDictionary()
)
_loading = threading.Lock()


def body_dtype(precision: Precision) -> torch.dtype:
    """Return bfloat16 where the processor multiplies it fast (or on a GPU) and `precision` allows it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if fast else torch.float32


def load_body(folder: Path, layers: int | None, dtype: torch.dtype) -> nn.Module:
    """Load the inner transformer of a causal LM, without its vocabulary head.

    Raises
    ------
    ModelError
        If weights are missing, if the model has fewer layers than asked for, keeps them where we do not
        know, or cannot read packed prompts.
    """
    from transformers import AutoModel

    with loading_from(folder):
        body, info = AutoModel.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
    return _readable(body, layers, folder)


def _readable(body: nn.Module, layers: int | None, folder: Path) -> nn.Module:
    """The first layers of an inner transformer that can read packed prompts."""
    with quiet_transformers():
        use_blocks(body)
    body = first_layers(body, layers, folder)
    why = "their states are not those of prompts of their own"
    try:
        able = takes_branches(body.eval())
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        able, why = False, f"{type(error).__name__}: {error}"
    if not able:
        raise ModelError(
            f"{type(body).__name__} in {folder} cannot read several candidates behind one history ({why}); "
            "use a base model with plain causal attention"
        )
    return body


def first_layers(body: nn.Module, layers: int | None, folder: Path) -> nn.Module:
    """Keep only the first layers of an inner transformer, all for None.

    Raises
    ------
    ModelError
        If it has fewer, or keeps them where we do not know.
    """
    attribute = next((name for name in ("layers", "h") if hasattr(body, name)), None)
    if layers is not None:
        if attribute is None:
            raise ModelError(
                f"{type(body).__name__} keeps its layers in an unknown place; set layers to None"
            )
        blocks: Any = getattr(body, attribute)
        if layers > len(blocks):
            raise ModelError(f"asked for {layers} layers, but {folder} has {len(blocks)}")
        setattr(body, attribute, blocks[:layers])
        config: Any = body.config
        config.num_hidden_layers = layers
    return body


def need_positions(body: nn.Module, tokens: int, what: str) -> None:
    """Refuse prompts that are longer than what a model was made to read.

    Parameters
    ----------
    tokens
        Of the longest prompt.
    what
        Settings that make it so long.

    Raises
    ------
    ConfigError
        If the model says that it has fewer positions.
    """
    config: Any = body.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ConfigError(
            f"a prompt may have {tokens} tokens, and the base model reads {positions}: lower {what}"
        )


def load_causal(folder: Path, layers: int | None, dtype: torch.dtype) -> tuple[nn.Module, nn.Parameter]:
    """Load a causal LM: its inner transformer, and the output vectors of its words (words, hidden).

    Raises
    ------
    ModelError
        If weights are missing, or the model is built in a way that we do not know.
    """
    from transformers import AutoModelForCausalLM

    with loading_from(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{type(model).__name__} has no plain word head; use another base model")
    # Given as it is: adapters of one base share it on any device, as they share all that does not change.
    return _readable(model.base_model, layers, folder), head.weight.requires_grad_(False)


def shared_body(folder: Path, layers: int | None, dtype: torch.dtype) -> nn.Module:
    """As `load_body`, with the weights that others of this process have: an adapter costs its own size.

    The modules are its own, so that adapters need no switch. The weights must not be changed.
    """
    return _twin(folder, layers, dtype, words=False)


def shared_causal(folder: Path, layers: int | None, dtype: torch.dtype) -> tuple[nn.Module, nn.Parameter]:
    """As `load_causal`, with the weights that others of this process have; see `shared_body`."""
    body: Any = _twin(folder, layers, dtype, words=True)
    return body, body.word_head


def _twin(folder: Path, layers: int | None, dtype: torch.dtype, *, words: bool) -> nn.Module:
    key = (str(folder.resolve()), layers, dtype, words)
    with _loading:
        body = _shared.get(key)
        if body is None:
            if words:
                body, head = load_causal(folder, layers, dtype)
                body.register_parameter("word_head", head)
            else:
                body = load_body(folder, layers, dtype)
            _shared[key] = body
        weights = {id(tensor): tensor for tensor in (*body.parameters(), *body.buffers())}
        twin: nn.Module = copy.deepcopy(body, weights)
    # The weights are looked up as long as anyone has them; past the registry of nn.Module.
    object.__setattr__(twin, "shared_with", body)
    return twin
