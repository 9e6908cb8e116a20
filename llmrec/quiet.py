"""Loading models without the bars and tables that transformers draws on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmrec.errors import ModelError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers below errors, progress bars included; before and after it speaks as it was set."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading_from(folder: Path) -> Iterator[None]:
    """Say of what transformers cannot load which folder it is.

    Raises
    ------
    ModelError
        If files are missing or damaged, or of a model that this version of transformers does not know.
    """
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as broken:
        said = str(broken).strip().split("\n")[0]
        raise ModelError(f"{folder} holds no base model that transformers can load: {said}") from broken
