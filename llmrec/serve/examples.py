"""An example of each request, shown in the OpenAPI document."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "RecommendRequest": [
        {"user": "42", "k": 5},
        {"history": ["i1", "i2"], "where": {"year": {"gte": 1990}}, "exclude": ["i7"]},
        {"query": "something like Alien, but funny", "budget_ms": 200},
    ],
    "SearchRequest": [{"query": "waterproof eyeliner", "user": "42", "k": 5}],
    "SimilarRequest": [{"item_id": "i1", "k": 5}],
    "RankRequest": [{"items": ["i3", "i1", "i2"], "user": "42"}],
    "PredictRequest": [{"items": ["i1", "i2"], "history": ["i0"]}],
    "EventIn": [{"user_id": "42", "item_id": "i1", "timestamp": 1700000000}],
    "ItemIn": [{"title": "Alien", "text": "In space.", "attributes": {"year": 1979, "genres": ["Horror"]}}],
    "RerankRequest": [
        {"query": "space horror", "documents": ["Alien (1979)", {"text": "Toy Story"}], "top_n": 1},
        {"query": "", "user": "42", "documents": [{"id": "i1"}, {"id": "i2"}], "return_documents": True},
    ],
    "TextsRequest": [{"query": "space horror", "texts": ["Alien", "Toy Story"]}],
    "EmbeddingsRequest": [{"model": "llmrec", "input": ["space horror"]}],
}
