"""Where the events of a recommender are kept."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from llmrec.errors import StoreError
from llmrec.store.engine import with_driver

URL_VARIABLE = "LLMREC_STORE_URL"
"""Environment variable in which the URL is looked for when no other place names it."""


class StoreConfig(BaseModel):
    """Events are kept in a SQLite file beside the model, or in a PostgreSQL database by URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: SecretStr | None = Field(
        None,
        exclude=True,
        description="postgresql+psycopg://...; never saved, since it may hold a password",
    )
    url_env: str | None = Field(
        None, min_length=1, description="environment variable that holds the URL; its name is saved"
    )

    @field_validator("url")
    @classmethod
    def _of_postgres(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            try:
                with_driver(url.get_secret_value())
            except StoreError as wrong:
                raise ValueError(str(wrong)) from None
        return url

    def wanted(self) -> str | None:
        """Return the URL that this names, None for a file.

        Raises
        ------
        StoreError
            If the variable that should hold it is not set.
        """
        if self.url is not None:
            return self.url.get_secret_value()
        if self.url_env is None:
            return None
        if not os.environ.get(self.url_env):
            raise StoreError(f"store.url_env names the variable {self.url_env}, which is not set")
        return os.environ[self.url_env]

    def known(self) -> str | None:
        """Return the URL for a recommender whose events are in a database, None if nothing says it."""
        if self.url is not None:
            return self.url.get_secret_value()
        return os.environ.get(self.url_env or URL_VARIABLE) or None
