"""From a purchase log to recommendations reranked by a LoRA-tuned language model."""

from __future__ import annotations

from llmrec.errors import LLMRecError
from llmrec.recommender import Recommender
from llmrec.types import Event, Item, Recommendation, Request, Source

__version__ = "0.1.0"

__all__ = [
    "Event",
    "Item",
    "LLMRecError",
    "Recommendation",
    "Recommender",
    "Request",
    "Source",
    "__version__",
]
