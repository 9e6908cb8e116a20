"""Where the vectors of the items are searched."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from llmrec.database import UrlConfig, with_driver
from llmrec.errors import StoreError
from llmrec.index.faiss_index import EXACT_UP_TO

VECTORS = "vector index"


class IndexConfig(UrlConfig):
    """Vectors are searched in memory with FAISS, or on a server by URL.

    ``postgresql+psycopg://...`` is a database with pgvector, ``http://host:19530`` a Milvus server, and a
    path that ends in ``.db`` a file of Milvus Lite, which one process may open.
    """

    section: ClassVar[str] = "index"
    variable: ClassVar[str] = "LLMREC_INDEX_URL"

    exact_up_to: int = Field(EXACT_UP_TO, ge=0, description="vectors above which FAISS walks a graph (HNSW)")
    compressed_above: int | None = Field(
        None,
        ge=1000,
        description="vectors above which FAISS keeps short codes (IVF-PQ) instead; never if not set",
    )

    @field_validator("url")
    @classmethod
    def _known(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            check_url(url.get_secret_value())
        return url


def of_milvus(url: str) -> bool:
    """Whether a URL is one of Milvus."""
    web = url.startswith(("http://", "https://"))
    return (web and not url.endswith(".db")) or ("://" not in url and url.endswith(".db"))


def check_url(url: str) -> None:
    """Make sure that a URL is of a kind that can be used.

    Raises
    ------
    ValueError
        If it is not. The message does not repeat it: it may hold a password.
    """
    if of_milvus(url):
        return
    try:
        with_driver(url, VECTORS)
    except StoreError as wrong:
        raise ValueError(f"{wrong}; http:// and https:// are Milvus, and so is a path to a .db") from None
