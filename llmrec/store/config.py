"""Where the events of a recommender are kept."""

from __future__ import annotations

from typing import ClassVar

from pydantic import SecretStr, field_validator

from llmrec.database import UrlConfig, with_driver
from llmrec.errors import StoreError

URL_VARIABLE = "LLMREC_STORE_URL"


class StoreConfig(UrlConfig):
    """Events are kept in a SQLite file beside the model, or in a PostgreSQL database by URL."""

    section: ClassVar[str] = "store"
    variable: ClassVar[str] = URL_VARIABLE

    @field_validator("url")
    @classmethod
    def _of_postgres(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                with_driver(url.get_secret_value())
            except StoreError as wrong:
                raise ValueError(str(wrong)) from None
        return url
