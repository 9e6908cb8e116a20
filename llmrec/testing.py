"""Small data and a small language model, for tests of whatever is built on llmrec."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrec.quiet import quiet_transformers
from llmrec.types import AttributeValue, Event, Item

_COLOURS = ("Amber", "Blue", "Copper", "Golden", "Green", "Ivory", "Red", "Silver", "Violet", "White")
_THINGS = (
    "Anchor",
    "Bridge",
    "Engine",
    "Garden",
    "Island",
    "Lantern",
    "Mirror",
    "Ocean",
    "Piano",
    "River",
    "Tower",
    "Winter",
)
_GENRES = ("Action", "Comedy", "Crime", "Drama", "Family", "Horror", "Romance", "Western")
_BRANDS = ("Acme", "Borealis", "Corvid", "Dune")
_START, _HOUR = 1_700_000_000, 3_600

_SPECIAL = ["<bos>", "<eos>", "<pad>"]
_LINES = (
    "What this person chose, oldest first:",
    "The Golden Anchor; Drama, Comedy; 1994",
    "A wish typed in words, and the next item that this person will choose.",
)


def toy_data(users: int = 60, items: int = 40, seed: int = 0) -> tuple[list[Item], list[Event]]:
    """Make a catalogue and a log with a planted rule: after item i, four times of five, comes item i + 1.

    Item ids are ``i0``, ``i1``, ... and user ids ``u0``, ``u1``, ...; the item after the last is the
    first. A user has 4 to 12 events an hour apart, no item twice. Titles are words, all different;
    attributes are genres (a tuple), year and brand.

    Returns
    -------
    tuple
        Items, and events in the order of users and time. The same seed gives the same data.
    """
    rng = np.random.default_rng(seed)
    catalogue = []
    for code in range(items):
        number, thing = divmod(code, len(_THINGS))
        colour = _COLOURS[(code * 3 + number) % len(_COLOURS)]
        title = f"{colour} {_THINGS[thing]}" + (f" {number}" if number >= len(_COLOURS) else "")
        genres = tuple(sorted(str(g) for g in rng.choice(_GENRES, int(rng.integers(1, 4)), replace=False)))
        attributes: dict[str, AttributeValue] = {
            "genres": genres,
            "year": int(rng.integers(1950, 2020)),
            "brand": _BRANDS[code % 4],
        }
        catalogue.append(Item(f"i{code}", title, attributes=attributes))
    events = []
    for user in range(users):
        length = min(items, int(rng.integers(4, 13)))
        seen: list[int] = [int(rng.integers(items))]
        while len(seen) < length:
            following = (seen[-1] + 1) % items
            if following in seen or rng.random() < 0.2:
                following = int(rng.choice([code for code in range(items) if code not in seen]))
            seen.append(following)
        start = _START + int(rng.integers(0, 1000)) * _HOUR
        events += [Event(f"u{user}", f"i{code}", start + n * _HOUR) for n, code in enumerate(seen)]
    return catalogue, events


Make = Literal["llama", "gpt2", "qwen"]
"""Make of a tiny language model."""


def tiny_lm(folder: Path, *, make: Make = "llama", layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """Write a random causal LM with a tokenizer of its own, and return the folder.

    Float32 safetensors and a tokenizer well under 100 kB; ``AutoModelForCausalLM`` and ``AutoTokenizer``
    read it without a network. The makes differ in positions, attention, tied heads and tokenizer:
    byte-level BPE with and without a begin-of-text token, and pieces with marked spaces.

    Parameters
    ----------
    folder
        Made if it is missing.
    layers, hidden
        Shape of the model; `hidden` is a multiple of 4, the number of attention heads.
    seed
        Of the weights; the random state of torch is left as it was.

    Raises
    ------
    ImportError
        If torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as missing:
        raise ImportError('a tiny language model needs: pip install "llmrec[lm]"') from missing

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _save_pieces(folder) if make == "qwen" else _save_bytes(folder, begins=make == "llama")
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if make == "gpt2":
        shape = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 512}
    config = AutoConfig.for_model(
        {"llama": "llama", "gpt2": "gpt2", "qwen": "qwen2"}[make],
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def _save_bytes(folder: Path, *, begins: bool) -> int:
    """Train a byte-level BPE tokenizer, which knows every text, save it, and return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_LINES, trainer)
    if begins:
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return _write_tokenizer(folder, bpe, {"bos_token": "<bos>"} if begins else {})


def _save_pieces(folder: Path) -> int:
    """The same for a tokenizer of pieces with marked spaces, which knows no line end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    letters = [f"{letter} {letter}" for letter in string.ascii_uppercase]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*_SPECIAL, "<unk>"],
        initial_alphabet=list(string.printable.split(" ")[0]),
        show_progress=False,
    )
    pieces.train_from_iterator([*_LINES, *letters, "Yes No Yes No"], trainer)
    return _write_tokenizer(folder, pieces, {"unk_token": "<unk>"})


def _write_tokenizer(folder: Path, tokenizer: Any, named: Mapping[str, str]) -> int:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=512, **named
    )
    wrapped.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())
