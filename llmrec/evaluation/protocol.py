"""The protocol of an evaluation: how the log is split, who is asked, what is ranked."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmrec.errors import ConfigError, DataError
from llmrec.evaluation.split import Split, cold_item_split, cold_user_split, leave_last_out, time_split
from llmrec.events import EventLog

SplitName = Literal["leave-last", "time", "cold-item", "cold-user"]
SHARE = 0.1
"""Of events, items or users that are held out in validation, and in test."""

Moment = int | datetime.datetime | datetime.date


class ProtocolConfig(BaseModel):
    """Which events are held out, which users are reported, and which items are ranked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: SplitName = Field("leave-last", description="what is held out")
    validation_from: Moment | None = Field(None, description="split by time: seconds, date or ISO text")
    test_from: Moment | None = Field(None, description="split by time: end of validation")
    share: float = Field(
        SHARE,
        gt=0,
        lt=0.5,
        description="of events, items or users in validation, and in test, where no time is given",
    )
    core: int | None = Field(None, ge=1, description="keep the k-core of the log and its items")
    users: int | None = Field(None, ge=1, description="seeded sample for systems with the language model")
    seed: int = Field(0, ge=0, description="of samples and drawn splits")
    negatives: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="rank among so many drawn items instead of all; not comparable",
    )
    candidates: Path | None = Field(None, description="table user_id, candidates: rank only these")
    candidate_source: str | None = Field(None, description="rows of that table whose source is this")
    candidate_part: Literal["validation", "test", "any"] = Field(
        "test", description="part that the lists were made for; 'any' if they were drawn without a model"
    )
    candidate_count: int | None = Field(
        None, ge=2, description="length of each list, target included; the target replaces the last"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ProtocolConfig:
        problems = []
        if (self.validation_from is None) != (self.test_from is None):
            problems.append("validation_from and test_from belong together")
        if self.validation_from is not None and self.split != "time":
            problems.append(f"validation_from is for split = 'time', not {self.split!r}")
        if self.negatives is not None and self.candidates is not None:
            problems.append("negatives and candidates exclude each other")
        if self.candidates is None and (
            self.candidate_source is not None or self.candidate_count is not None
        ):
            problems.append("candidate_source and candidate_count need candidates")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def full_ranking(self) -> bool:
        """Whether the whole catalogue is ranked."""
        return self.negatives is None and self.candidates is None

    @property
    def ranking(self) -> str:
        """What is ranked, in words, as results and tables name it."""
        if self.negatives is not None:
            return f"sampled: target and at most {self.negatives} drawn (not comparable with full ranking)"
        if self.candidates is not None:
            source = f", source {self.candidate_source}" if self.candidate_source else ""
            count = f", {self.candidate_count} a user" if self.candidate_count else ""
            return f"candidates of {self.candidates.name}{source}{count} (not comparable with full ranking)"
        return "full catalogue"


def make_split(log: EventLog, protocol: ProtocolConfig) -> Split:
    """Split a log as the protocol says.

    Raises
    ------
    ConfigError
        If the protocol has a share that the split has no use for.
    DataError
        If the log has no clock and needs one, or a part would be empty.
    """
    if protocol.share != SHARE and (protocol.split == "leave-last" or protocol.validation_from is not None):
        fixed = "leave-last" if protocol.split == "leave-last" else "times that are given"
        raise ConfigError(f"share is of splits that are drawn, or by time without times, not of {fixed}")
    if protocol.split == "leave-last":
        return leave_last_out(log)
    if protocol.split == "time":
        stamps = log.require_clock("the split by time")
        if protocol.validation_from is not None and protocol.test_from is not None:
            return time_split(log, _seconds(protocol.validation_from), _seconds(protocol.test_from))
        # "higher": an event at the boundary is held out whole, with all of the same second.
        low, high = np.quantile(stamps, [1 - 2 * protocol.share, 1 - protocol.share], method="higher")
        if low == high:
            raise DataError(
                f"the split by time cannot hold out a share of {protocol.share:g} twice: too many events "
                "are of one moment; set validation_from and test_from, or another share"
            )
        return time_split(log, int(low), int(high))
    split = cold_item_split if protocol.split == "cold-item" else cold_user_split
    return split(log, protocol.share, protocol.seed)


def _seconds(moment: Moment) -> int:
    """Seconds since 1970; what names no time zone is UTC."""
    if isinstance(moment, int):
        return moment
    if not isinstance(moment, datetime.datetime):
        moment = datetime.datetime(moment.year, moment.month, moment.day)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())
