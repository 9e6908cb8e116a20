"""Settings of the language model and of its training. Importing them loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from llmrec.budget import steps_alone
from llmrec.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


class ItemTokensConfig(BaseModel):
    """Shape of the `item_tokens` model; everything here is fixed once an adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["item_tokens"] = "item_tokens"
    base: str = Field("smollm2-135m-instruct-q41", description="name, hub id or folder of the causal LM")
    layers: int | None = Field(
        3, ge=1, description="keep only the first layers; their number, or None, keeps all"
    )
    prompt: str = Field("item_tokens", description="name or path of the instruction")
    window: int = Field(100, ge=1, description="latest items of a history that the model reads")
    rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    alpha: int = Field(32, ge=1, description="scale of the LoRA update, alpha / rank")
    targets: str | list[str] = Field("all-linear", description="modules that get LoRA matrices")
    head_dim: int = Field(256, ge=1, description="length of state and output vectors")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on the item input vectors")
    id_dropout: float = Field(0.5, ge=0, lt=1, description="share of read items left without their id vector")
    id_out_dropout: float = Field(0.3, ge=0, lt=1, description="the same of the output vectors, each step")
    wishes: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training windows whose last item is asked for in words; 0: none are read",
    )
    precision: Precision = Field("auto", description="of the LM body; the head is always float32")

    @property
    def prompt_name(self) -> str:
        """The prompt that is used."""
        return self.prompt


class WordsConfig(BaseModel):
    """Shape of a model that reads items as words; everything here is fixed once an adapter is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["likelihood", "generate", "yes_no", "letters"]
    base: str = Field("smollm2-135m-instruct-q41", description="name, hub id or folder of the causal LM")
    layers: int | None = Field(None, ge=1, description="keep only the first layers; None keeps all")
    prompt: str = Field("", description="name or path of the prompt; that of the mode if empty")
    window: int = Field(20, ge=1, description="latest items of a history that the model reads")
    line_tokens: int = Field(16, ge=1, description="tokens of an item's line that are read")
    rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    alpha: int = Field(32, ge=1, description="scale of the LoRA update, alpha / rank")
    targets: str | list[str] = Field("all-linear", description="modules that get LoRA matrices")
    precision: Precision = Field("auto", description="of the LM body; the word head is always float32")
    candidates: int = Field(20, ge=2, description="first candidates of the merge that the model scores")
    listed: int = Field(20, ge=2, le=26, description="candidates in a list of yes_no and letters")
    orders: int = Field(
        1,
        ge=1,
        le=26,
        description="orders of the candidates that letters averages, each in a prompt of its own",
    )
    mined: int = Field(20_000, ge=1, description="events that yes_no and letters learn from, at most")
    wishes: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of windows, or of events that candidates are looked for, asked for in words",
    )
    normalise: Literal["trie", "vocabulary"] = Field(
        "trie",
        description="of likelihood: a word is one among those that lead to items, or one among all words",
    )
    smoothing: float = Field(1.0, ge=1e-6, description="added to each item's count in the trie of likelihood")
    beam: int = Field(20, ge=1, description="ways that generate follows at once; it proposes about as many")
    judged: int = Field(500, ge=2, description="held-out users that choose its weight")
    memory_mb: int = Field(512, ge=0, description="memory for what was read of histories")

    def model_post_init(self, _context: Any) -> None:
        """Refuse a search along the trie without it."""
        if self.normalise == "vocabulary" and self.mode != "likelihood":
            raise ConfigError(f"normalise = 'vocabulary' is for the mode likelihood, not for {self.mode}")

    @property
    def prompt_name(self) -> str:
        """The prompt that is used."""
        return self.prompt or ("likelihood" if self.mode == "generate" else self.mode)


WORDS = ("likelihood", "generate", "yes_no", "letters")
"""Modes that read an item as words; `WordsConfig` describes them all."""

TAG = "mode:"
"""Begins the names by which a validator tells the two apart; they are no keys of a configuration."""


def _kind(values: Any) -> str | None:
    """Which class describes a language model, None for an unknown mode."""
    mode = values.get("mode", "item_tokens") if isinstance(values, Mapping) else getattr(values, "mode", None)
    known = {"item_tokens": f"{TAG}item_tokens"} | dict.fromkeys(WORDS, f"{TAG}words")
    return known.get(mode) if isinstance(mode, str) else None


LMConfig = Annotated[
    Annotated[ItemTokensConfig, Tag(f"{TAG}item_tokens")] | Annotated[WordsConfig, Tag(f"{TAG}words")],
    Discriminator(
        _kind,
        custom_error_type="mode",
        custom_error_message=f"mode must be one of item_tokens, {', '.join(WORDS)}",
    ),
]
"""Settings of a language model, by mode."""


class TrainingConfig(BaseModel):
    """How the adapter and the head are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float | None = Field(
        20.0,
        gt=0,
        allow_inf_nan=False,
        description="time to train, 20 if no steps are set; the learning rate falls with it",
    )
    steps: int | None = Field(
        None, ge=1, description="optimiser steps; besides minutes, the sooner of the two ends the run"
    )
    learning_rate: float = Field(1e-3, gt=0, description="of the LoRA matrices")
    head_learning_rate: float = Field(5e-3, gt=0, description="of item projections and id vectors")
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(
        30, ge=0, description="over which the learning rate rises; a tenth of the budget at most"
    )
    tokens_per_step: int = Field(
        900, ge=1, description="items of histories in one step, in each process and for each `accumulate`"
    )
    accumulate: int = Field(
        1, ge=1, description="parts in which a step is read one after the other: so many times as large"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the layers twice instead of keeping them: less memory, same gradients"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    negatives: int = Field(8192, ge=1, description="drawn items a step in a catalogue above 50,000")
    validations: int = Field(
        8,
        ge=1,
        description="validations over the budget, at least; in a run by minutes fewer if they are slow",
    )
    patience: int | None = Field(
        None, ge=1, description="end after so many validations without a better state; None: never"
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="between checkpoints")
    log_steps: int = Field(50, ge=1, description="steps between lines of the log; validations have their own")
    tensorboard: bool = Field(False, description="write curves for TensorBoard too")
    replay: float = Field(
        0.5, ge=0, lt=1, description="share of old events where a tuned model is continued on new ones"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, given: Any) -> Any:
        return steps_alone(given)

    @property
    def learned(self) -> dict[str, Any]:
        """The settings that decide what is learned, as values."""
        how = {"log_steps", "tensorboard", "checkpoint_seconds", "gradient_checkpointing"}
        return self.model_dump(exclude=how)

    def lasting(self, minutes: float | None) -> TrainingConfig:
        """The same for a run of so many minutes; as it is for None."""
        if minutes is None:
            return self
        try:
            given = float(minutes)
        except (TypeError, ValueError):
            given = float("nan")
        if not 0 < given < float("inf"):
            raise ConfigError(f"training needs more than 0 minutes and an end, got {minutes!r}")
        return TrainingConfig(**{**self.model_dump(), "minutes": given, "steps": None})

    def model_post_init(self, _context: Any) -> None:
        """Refuse a run without an end."""
        if self.minutes is None and self.steps is None:
            raise ConfigError("training needs an end: set minutes or steps")
