"""What a process knows of the directory that its recommender was loaded from or saved into."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec import persistence
from llmrec.config import Config
from llmrec.errors import ConfigError, ConflictError, ModelError, StoreError
from llmrec.families import Texts
from llmrec.fetch import resolve
from llmrec.index.config import IndexConfig, check_url
from llmrec.index.making import server_index
from llmrec.store.places import Store, copied, in_database, new_name, open_store, remove
from llmrec.store.postgres import PostgresStore
from llmrec.store.sqlite import SQLiteStore

if TYPE_CHECKING:
    from llmrec.language_model import TunedModel

logger = logging.getLogger(__name__)


class Saved:
    """The directory as this process left or found it, to notice what others do to it.

    Parameters
    ----------
    manifest
        That it was loaded from, or that was written.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.events = str(manifest["events"])
        self.model = model_of(manifest)
        self.changes = int(manifest.get("changes", 0))
        self._seen: tuple[int, int] | None = None

    def check_model(self) -> None:
        """Make sure that saving here replaces what was read here, with items put since at most.

        Raises
        ------
        ConflictError
            If another process has saved another model meanwhile, or the events are kept elsewhere now.
        """
        found = persistence.manifest_of(self.folder)
        if model_of(found) != self.model or found.get("events") != self.events:
            raise ConflictError(
                f"nothing was saved: another process has fitted or fine-tuned what is in {self.folder}, or "
                f"moved its events, since it was loaded here, and that would be lost; save into another "
                f"directory, or load it again"
            )

    def check_events(self) -> None:
        """Make sure that what is stored now is read by whoever loads the directory next.

        The manifest is read only when the file has changed.

        Raises
        ------
        StoreError
            If the directory is gone, or its events are kept elsewhere now.
        """
        try:
            found = (self.folder / persistence.MANIFEST).stat()
            seen = (found.st_mtime_ns, found.st_ino)
            if seen != self._seen:
                same = persistence.read_manifest(self.folder)["events"] == self.events
                self._seen = seen if same else None
        except (OSError, ModelError):
            self._seen = None
        if self._seen is None:
            raise StoreError(
                f"{self.folder} was replaced or removed since it was loaded here, so that nobody would find "
                f"what is stored now: load it again"
            )


def model_of(manifest: Mapping[str, Any]) -> str:
    """Id of the model that a manifest is about: the same while items are put, another once it is fitted."""
    return str(manifest.get("model") or manifest.get("state", ""))


def open_events(folder: Path, store: str | None) -> tuple[dict[str, Any], Store, str | None]:
    """Open the store of a saved recommender.

    Parameters
    ----------
    store
        URL of the database that keeps the events, or that they are moved into; None for where they are.

    Returns
    -------
    tuple
        The manifest, the store, and the URL of its database.

    Raises
    ------
    StoreError
        If the store cannot be opened, or is in a database of which nothing says the URL.
    """
    manifest = persistence.read_manifest(folder)
    if store is not None and not in_database(manifest["events"]):
        manifest = _moved(folder, store)
    url = None
    if in_database(manifest["events"]):
        url = store or Config.of(manifest["config"]).store.known()
    return manifest, open_store(manifest["events"], folder, url), url


def _moved(folder: Path, url: str) -> dict[str, Any]:
    """Move the events from a file into a database; return the new manifest."""
    with persistence.saving(folder):
        manifest = persistence.read_manifest(folder)
        old = manifest["events"]
        if not in_database(old):
            new = new_name(url)
            # Nobody writes there from the copy on: who waits to is refused, and told to load again.
            sealed = SQLiteStore(folder / old)
            with open_store(old, folder, None) as source, sealed, sealed.sealing():
                copied(source, new, folder, url, after=manifest.get("changes", 0)).close()
                manifest |= {"events": new, "changes": 0}
                persistence.replace_manifest(folder, manifest)
            remove(old, folder, None)
    return manifest


def drop_replaced(before: Mapping[str, Any], events: str, url: str | None) -> None:
    """Remove the store that a replaced manifest named from its database: nobody could erase a user there."""
    old = before.get("events", events)
    if old == events or not in_database(old):
        return
    said: object = "nothing says in which database"
    for known in dict.fromkeys((Config.of(before["config"]).store.known(), url)):
        if known is None:
            continue
        try:
            with open_store(old, Path(), known) as store:
                assert isinstance(store, PostgresStore)
                store.drop()
        except StoreError as error:
            said = error
        else:
            return
    logger.warning("the events of the recommender that was replaced are still there as %s: %s", old, said)


def index_of(manifest: Mapping[str, Any], folder: Path, given: str | None) -> tuple[str | None, str | None]:
    """URL of the server on which the vectors of a saved recommender are searched, and the name there.

    Both are None for an index in memory. `given` is a URL to move one to.

    Raises
    ------
    ConfigError
        If `given` is no URL that can be used.
    """
    if given is not None:
        try:
            check_url(given)
        except ValueError as wrong:
            raise ConfigError(str(wrong)) from None
    name = manifest.get("index")
    if name is None and given is None:
        return None, None
    url = given or Config.of(manifest["config"]).index.known()
    if url is None:
        logger.warning(
            "the vectors of %s are on a server, and nothing says which: set %s; they are searched in memory",
            folder,
            IndexConfig.variable,
        )
        return None, None
    # The name of the events stays when the model is fitted or fine-tuned again.
    own = re.sub("[^0-9a-f]", "", str(manifest["events"]).removesuffix(".sqlite").rpartition("llmrec_")[2])
    return url, name or f"llmrec_vectors_{own[-12:]}"


def drop_index(name: str | None, url: str | None, shown: object = "") -> None:
    """Remove a collection of vectors that nobody will open again."""
    if name is None:
        return
    said: object = "nothing says on which server"
    if url is not None:
        try:
            with server_index(url, name, 1) as index:
                index.drop()
        except StoreError as error:
            said = error
        else:
            return
    logger.warning("the vectors %s%s are still there: %s", name, shown, said)


def load_tuned(
    config: Config,
    folder: Path,
    texts: Texts,
    ids: Sequence[str],
    data: str | None,
    served: str,
    *,
    shares: bool = False,
) -> TunedModel:
    """Load the language model of an adapter's folder, run here or on the server that is configured.

    Parameters
    ----------
    texts, ids
        Of the catalogue, which begins with the items that it should have been trained on.
    data
        Fingerprint of the log that it should have been trained on; None for any.
    served
        Its name on the server.
    shares
        Whether it stands on the same weights of the base as others do; see `load_language_model`.

    Raises
    ------
    ModelError, FetchError, ImportError
        If it does not fit, or the base model or its packages cannot be had.
    """
    try:
        from llmrec.score.engine import engine_of
        from llmrec.several import load_models
    except ImportError as missing:
        raise ImportError('the language model needs: pip install "llmrec[lm]"') from missing
    base = resolve(config.lm.base, allow_hub=config.allow_hub)
    engine = engine_of(config.engine)
    return load_models(folder, base, texts, data, shares=shares, engine=engine, served=served, ids=ids)


def adapter_in(folder: Path) -> Path:
    """Folder of the adapter of a saved recommender; any other folder is taken for that of an adapter.

    Raises
    ------
    ModelError
        If the recommender has no language model.
    """
    manifest = persistence.manifest_of(folder)
    if not manifest:
        return folder
    if not manifest["language_model"]:
        raise ModelError(f"{folder} has no tuned language model; make one with llmrec finetune")
    adapter: Path = folder / manifest["state"] / "adapter"
    return adapter
