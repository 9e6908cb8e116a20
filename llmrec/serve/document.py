"""What the OpenAPI document says beyond the types: examples, the ways to give a key, the errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.serve.gate import OPEN, PROBLEM
from llmrec.serve.models import Problem

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
    "SeedsRequest": [{"k": 4}, {"chosen": ["i1"], "passed": ["i2", "i3"]}],
    "EventIn": [{"user_id": "42", "item_id": "i1", "timestamp": 1700000000, "event_id": "order 17, line 1"}],
    "ItemIn": [{"title": "Alien", "text": "In space.", "attributes": {"year": 1979, "genres": ["Horror"]}}],
    "RerankRequest": [
        {"query": "space horror", "documents": ["Alien (1979)", {"text": "Toy Story"}], "top_n": 1},
        {"query": "", "user": "42", "documents": [{"id": "i1"}, {"id": "i2"}], "return_documents": True},
    ],
    "TextsRequest": [{"query": "space horror", "texts": ["Alien", "Toy Story"]}],
    "EmbeddingsRequest": [{"model": "llmrec", "input": ["space horror"]}],
}

ERRORS = {
    "400": "the body is no text in UTF-8, or nested too deep",
    "401": "no key that the server knows",
    "403": "the key may only read",
    "404": "unknown item",
    "408": "the body did not come in time",
    "421": "a server without keys answers this machine alone",
    "413": "the body is too large",
    "422": "the body is no JSON, breaks its schema or a limit, or names what is not there",
    "500": "an error inside the server; its log has it under the request id",
    "503": "too much to do, or the event store cannot be reached; see Retry-After",
}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Add examples, the ways to give a key, and the errors of each operation."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema()
    for name, examples in EXAMPLES.items():
        schemas[name]["examples"] = examples
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    answer = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            for code in _errors_of(path, method, operation):
                operation["responses"][code] = {"description": ERRORS[code], "content": answer}
            if path not in OPEN:
                operation["security"] = [{}, {"key": []}]
    return document


def _errors_of(path: str, method: str, operation: Mapping[str, Any]) -> list[str]:
    """Return the statuses with which an operation refuses."""
    if path in OPEN:
        return ["413", "500", "503"] if path == "/ready" else ["413", "500"]
    codes = {"401", "421", "500"}
    if operation["tags"] != ["operate"]:
        codes |= {"422", "503"}
    if "requestBody" in operation:
        codes |= {"400", "408", "413"}
    if "change" in operation["tags"]:
        codes |= {"403"}
    if "204" in operation["responses"] or (path.startswith("/v1/items/{") and method == "get"):
        codes |= {"404"}
    return sorted(codes)
