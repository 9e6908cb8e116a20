"""The configuration: one pydantic model, from TOML or a dict, validated whole before anything is loaded."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmrec import fetch
from llmrec.encode.config import EncoderConfig
from llmrec.errors import ConfigError
from llmrec.evaluation.protocol import ProtocolConfig
from llmrec.events import Clock, Ties
from llmrec.index.config import IndexConfig
from llmrec.recipe import RetrievalConfig
from llmrec.rows import Policy
from llmrec.score.config import TAG, ItemTokensConfig, LMConfig, TrainingConfig, WordsConfig
from llmrec.score.engine import EngineConfig
from llmrec.store.config import StoreConfig


class DataConfig(BaseModel):
    """How items and events are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    items_mapping: dict[str, str] = Field(
        default_factory=dict, description="source column -> contract column"
    )
    events_mapping: dict[str, str] = Field(
        default_factory=dict, description="source column -> contract column"
    )
    items_ignore: tuple[str, ...] = Field((), description="columns of the items that are left out")
    lists: dict[str, str] = Field(
        default_factory=dict, description="attribute of which texts are lists -> what parts them, as '|'"
    )
    timestamp_format: str | None = Field(
        None, description="of time stamps in text, as strptime has it: '%m/%d/%Y %H:%M'"
    )
    policy: Policy = Field("raise", description="what to do with bad rows")
    clock: Clock = Field("time", description="'none': the order of rows is the order of events")
    ties: Ties = Field("input", description="order of events with equal time stamps")
    rating_threshold: float | None = Field(
        None, allow_inf_nan=False, description="ratings below are no positive events"
    )
    event_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None, description="weight of each event type; 0 leaves its events out"
    )


class BesideConfig(BaseModel):
    """A further language model beside the first, trained after it; it stays in the blend if it pays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMConfig
    training: TrainingConfig = TrainingConfig()


class Config(BaseModel):
    """Everything that can be set, with defaults that work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    lm: LMConfig = ItemTokensConfig()
    training: TrainingConfig = TrainingConfig()
    beside: tuple[BesideConfig, ...] = Field((), description="further language models in the blend")
    protocol: ProtocolConfig = ProtocolConfig()
    store: StoreConfig = StoreConfig()
    index: IndexConfig = IndexConfig()
    engine: EngineConfig = EngineConfig()
    allow_hub: bool = Field(False, description="models may be fetched from a model hub")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.data.clock == "none" and self.protocol.split == "time":
            raise ValueError("protocol.split = 'time' needs a clock, and data.clock is 'none'")
        return self

    @classmethod
    def of(cls, source: Config | Mapping[str, Any] | str | Path | None) -> Config:
        """Make a configuration from a TOML file, a mapping, another configuration, or defaults.

        Raises
        ------
        ConfigError
            With every problem at once.
        """
        if source is None:
            return cls()
        if isinstance(source, Config):
            return source
        if not isinstance(source, Mapping | str | Path):
            raise ConfigError(f"a configuration is a TOML file or a mapping, got {source!r:.100}")
        values, where = (source, "the configuration") if isinstance(source, Mapping) else _read(Path(source))
        try:
            return cls.model_validate(dict(values))
        except ValidationError as invalid:
            problems = [_problem(error) for error in invalid.errors()]
            raise ConfigError(f"{len(problems)} problem(s) in {where}:\n  " + "\n  ".join(problems)) from None

    def with_flags(self, **sections: Mapping[str, Any]) -> Config:
        """The same with settings of sections replaced where they are not None.

        Raises
        ------
        ConfigError
            With every problem at once.
        """
        values = self.model_dump()
        for section in ("store", "index", "engine"):
            values[section]["url"] = getattr(self, section).url  # which no dump holds
        for section, flags in sections.items():
            values[section] |= {name: value for name, value in flags.items() if value is not None}
        return Config.of(values)


def located(config: Config) -> Config:
    """The same with folders of models and files of prompts by whole paths, which what is saved needs."""
    known = {artifact.name for artifact in fetch.known()}

    def whole(name: str) -> str:
        return str(Path(name).expanduser().absolute())

    def folder(name: str) -> str:
        return whole(name) if name not in known and Path(name).expanduser().is_dir() else name

    def own(lm: Any) -> Any:
        prompt = whole(lm.prompt) if lm.prompt.endswith(".md") else lm.prompt
        return lm.model_copy(update={"base": folder(lm.base), "prompt": prompt})

    return config.model_copy(
        update={
            "encoder": config.encoder.model_copy(update={"name": folder(config.encoder.name)}),
            "lm": own(config.lm),
            "beside": tuple(more.model_copy(update={"lm": own(more.lm)}) for more in config.beside),
        }
    )


def one_base(config: Config) -> None:
    """Make sure that language models beside each other have one base.

    Raises
    ------
    ConfigError
        If they have not.
    """
    bases = {config.lm.base, *(more.lm.base for more in config.beside)}
    if len(bases) > 1:
        raise ConfigError(f"language models beside each other need one base, got {sorted(bases)}")


def _keys(place: Sequence[int | str]) -> list[str]:
    """The keys that lead to a value, as they were written."""
    return [str(key) for key in place if not str(key).startswith(TAG)]


def _problem(error: Mapping[str, Any]) -> str:
    """One thing that is wrong; for a key that there is not, those that there are."""
    place, where = error["loc"], ".".join(_keys(error["loc"])) or "together"
    if error["type"] == "extra_forbidden":
        known = _settings(place[:-1])
        near = get_close_matches(str(place[-1]), known, 1)
        # Not the value: what is nearly called url may hold a password too.
        return f"{where}: no such setting; " + (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        )
    said = f"{where}: {error['msg'].removeprefix('Value error, ')}"
    # A URL may hold a password, and may be given where its section is wanted.
    secret = place[-1:] == ("url",) or place in (("store",), ("index",), ("engine",))
    return said if not place or secret else f"{said} (got {error['input']!r:.200})"


def _settings(place: Sequence[int | str]) -> list[str]:
    """Names of the settings of a section."""
    section: Any = Config
    for key in place:
        if isinstance(key, str) and key.startswith(TAG):
            section = ItemTokensConfig if key == f"{TAG}item_tokens" else WordsConfig
        elif isinstance(key, str):
            kind = section.model_fields[key].annotation
            section = next((one for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")), section)
    return list(section.model_fields)


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    try:
        with path.open("rb") as opened:
            return tomllib.load(opened), str(path)
    except OSError as missing:
        raise ConfigError(f"cannot read the configuration {path}: {missing.strerror}") from missing
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{path} is not valid TOML: {broken}") from broken
