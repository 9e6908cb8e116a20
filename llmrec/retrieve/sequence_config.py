"""Settings of the sequence models; here, so that a configuration is read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["gru4rec", "caser", "sasrec"]


class SequenceConfig(BaseModel):
    """Settings of a sequence model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1, description="length of item vectors and states")
    layers: int = Field(2, ge=1, description="of the recurrent or attention encoder")
    heads: int = Field(2, ge=1, description="of attention; must divide dim")
    width: int = Field(5, ge=1, description="latest items that the convolutions see")
    window: int = Field(50, ge=1, description="latest items of a history that are read")
    dropout: float = Field(0.3, ge=0, lt=1)
    text: bool = Field(True, description="add a projection of the text vector to each item vector")
    epochs: int = Field(60, ge=1, description="most passes over the events")
    patience: int = Field(4, ge=1, description="epochs without a better validation before it stops")
    minutes: float | None = Field(None, gt=0, description="most minutes of training")
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    tokens_per_step: int = Field(2048, ge=1, description="padded positions in one step")
    negatives: int = Field(4096, ge=1, description="drawn items a step in a catalogue above 50,000")
    seed: int = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> SequenceConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got {self.heads} and {self.dim}")
        return self


class GRU4RecConfig(SequenceConfig):
    """Settings of GRU4Rec: one wide layer that learns fast."""

    dim: int = Field(128, ge=1, description="length of item vectors and states")
    layers: int = Field(1, ge=1, description="of the recurrent encoder")
    dropout: float = Field(0.5, ge=0, lt=1)
    learning_rate: float = Field(5e-3, gt=0)
