"""From a purchase log to recommendations reranked by a LoRA-tuned language model."""

from __future__ import annotations

from llmrec.errors import LLMRecError
from llmrec.recommender import Recommender
from llmrec.types import Event, Influence, Item, Reason, Recommendation, Request, Shared, Source

__version__ = "0.1.0"

__all__ = [
    "Event",
    "Influence",
    "Item",
    "LLMRecError",
    "Reason",
    "Recommendation",
    "Recommender",
    "Request",
    "Shared",
    "Source",
    "__version__",
]
