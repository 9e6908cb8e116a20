"""A log that does not fit into memory: read anew in each epoch, a portion of whole users at a time.

The files are read by Hugging Face `datasets` as a stream. Each portion becomes an event log as any other, so
that columns, time stamps, ratings and event types mean what they mean elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmrec.assembly import read_log
from llmrec.catalog import Catalog
from llmrec.config import DataConfig
from llmrec.errors import DataError
from llmrec.evaluation.split import training_log
from llmrec.families import TrainingLog
from llmrec.retrieve.popularity import newest
from llmrec.rows import id_strings
from llmrec.sequences import Portions, Window, windows

logger = logging.getLogger(__name__)

PORTION = 1_000_000
"""Rows that are held at once, about."""

ROWS = 65_536
"""Rows that are read at once."""

KINDS = {".parquet": "parquet", ".jsonl": "json"}
"""Readers of `datasets` by the end of a file's name."""


class StreamedLog:
    """Events in files, or in an iterable dataset, sorted by user.

    Parameters
    ----------
    source
        A parquet or jsonl file, a folder or a pattern of such, or a `datasets.IterableDataset`. The
        rows of a user stand together, users in ascending order within a file, and each user in one file.
    catalog, data
        What `read_log` takes; the columns are those of any log.
    without
        Ids of users that are left out: those on whom the result is judged.
    portion
        Rows that are held at once, about; one user's rows are always held together.

    Raises
    ------
    DataError
        If there are no such files, or of an unknown kind.
    """

    def __init__(
        self,
        source: Any,
        catalog: Catalog,
        data: DataConfig,
        without: Collection[str] = (),
        portion: int = PORTION,
    ) -> None:
        self.catalog, self.data, self.portion = catalog, data, portion
        self.without = frozenset(without)
        self._files: list[Path] | None = None
        self._dataset: Any = None
        if isinstance(source, str | Path):
            self._files = _files(str(source))
        else:
            self._dataset = source
        names = {theirs: ours for ours, theirs in data.events_mapping.items()}
        self._user = names.get("user_id", "user_id")

    def logs(self, rng: np.random.Generator | None = None) -> Iterator[TrainingLog]:
        """Training logs of all portions, one at a time.

        Files come in an order that is drawn, if `rng` is given.

        Raises
        ------
        DataError
            If rows are not sorted by user, or are what no event log may hold.
        """
        if self._files is None:
            yield from self._portions(lambda: self._dataset, "the dataset")
            return
        order = range(len(self._files)) if rng is None else rng.permutation(len(self._files)).tolist()
        for at in order:
            path = self._files[at]
            yield from self._portions(partial(_opened, path), str(path))

    def _portions(self, opened: Callable[[], Any], name: str) -> Iterator[TrainingLog]:
        held: list[pl.DataFrame] = []
        last: Any = None
        for frame in itertools.chain(_frames(opened, name, min(ROWS, self.portion)), [None]):
            if frame is not None:
                if self._user not in frame.columns:
                    raise DataError(f"{name}: no column {self._user!r}; have {', '.join(frame.columns)}")
                if frame[self._user].null_count() and self.data.policy == "raise":
                    raise DataError(f"{name}: rows without {self._user}; drop these with policy='drop'")
                frame = frame.filter(pl.col(self._user).is_not_null())
                users = frame[self._user]
                if not users.is_sorted() or (last is not None and len(users) and users[0] < last):
                    raise DataError(
                        f"{name} is not sorted by {self._user}: sort it once, which needs no memory for the "
                        f"whole: polars.scan_parquet(...).sort({self._user!r}, ...).sink_parquet(...)"
                    )
                last = users[-1] if len(users) else last
                held.append(frame)
                if sum(map(len, held)) < self.portion:
                    continue
            if not held:
                return
            rows = pl.concat(held, how="vertical_relaxed")
            # The last user may go on in what is read next.
            whole = rows if frame is None else rows.filter(pl.col(self._user) != last)
            held = [] if frame is None else [rows.filter(pl.col(self._user) == last)]
            kept = whole.filter(~id_strings(whole[self._user], name).is_in(list(self.without)))
            log = read_log(kept, self.catalog, self.data, empty=True) if len(kept) else None
            if log is not None and len(log):
                yield training_log(log)

    def portions(self, rng: np.random.Generator, length: int) -> Iterator[list[Window]]:
        """Windows of at most `length` items, portion after portion; see `llmrec.sequences.Source`."""
        for log in self.logs(rng):
            yield windows(log.histories, length, rng, log.weights)

    @cached_property
    def _counted(self) -> tuple[NDArray[np.float64], int, int, str, int | None]:
        """Weight of each item, users, events, a hash of all, and the last time stamp, from one pass.

        Raises
        ------
        DataError
            If there are no events.
        """
        logger.info("counting the events of the stream")
        ends = []
        counts = np.zeros(len(self.catalog))
        users, events, digest = 0, 0, hashlib.sha256()
        for log in self.logs():
            counts += log.counts(len(self.catalog))
            users, events = users + log.users, events + log.events
            digest.update(log.sha256().encode())
            if log.stamps is not None:
                ends += [newest(stamps) for stamps in log.stamps if len(stamps)]
        if not events:
            raise DataError("no events to train on: the stream has none of users who are not held out")
        return counts, users, events, digest.hexdigest(), newest(np.array(ends)) if ends else None

    def counts(self, items: int) -> NDArray[np.float64]:
        """Weight of the events of each item, shape (items,)."""
        return self._counted[0]

    @property
    def users(self) -> int:
        """Users with events."""
        return self._counted[1]

    @property
    def events(self) -> int:
        """Events of all users."""
        return self._counted[2]

    def sha256(self) -> str:
        """Hash of all histories, in the order of the files."""
        return self._counted[3]

    @property
    def until(self) -> int | None:
        """Time of the last event, in seconds since 1970; None without a clock."""
        return self._counted[4]

    def source(self) -> Portions:
        """What a training run draws its windows from."""
        return self


def _files(pattern: str) -> list[Path]:
    place = Path(pattern)
    there = place.iterdir() if place.is_dir() else place.parent.glob(place.name)
    # Other programs leave marks and checksums beside their files.
    found = sorted(path for path in there if path.suffix in KINDS and not path.name.startswith((".", "_")))
    if not found:
        raise DataError(f"{pattern}: no {' or '.join(KINDS)} file, from which a stream is read")
    return found


def _opened(path: Path) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as missing:
        raise ImportError('a stream needs: pip install "llmrec[datasets]"') from missing

    return load_dataset(KINDS[path.suffix], data_files=str(path), split="train", streaming=True)


def _frames(opened: Callable[[], Any], name: str, rows: int) -> Iterator[pl.DataFrame]:
    """Rows of a dataset as tables of so many.

    Raises
    ------
    DataError
        If they cannot be read.
    """
    try:
        for table in opened().with_format("arrow").iter(batch_size=rows):
            yield pl.DataFrame(pl.from_arrow(table))
    except (AttributeError, OSError, ValueError, TypeError) as broken:
        raise DataError(
            f"{name} cannot be read: {(str(broken) or type(broken).__name__).splitlines()[0]}"
        ) from broken
