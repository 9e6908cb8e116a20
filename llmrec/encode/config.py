"""Settings of the text encoder and its fine-tuning; here, so that a configuration is read without torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmrec.budget import steps_alone


class EncoderTrainingConfig(BaseModel):
    """How `finetune/encoder.py` tunes the text encoder; nothing else reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float | None = Field(10.0, gt=0, description="time to train; None trains `steps`")
    steps: int = Field(100_000, ge=1, description="most optimiser steps")
    batch: int = Field(64, ge=2, description="pairs in a step; the others' items are the negatives")
    learning_rate: float = Field(5e-5, gt=0)
    scale: float = Field(20.0, gt=0, description="of the cosine in the softmax: the inverse temperature")
    window: int = Field(3, ge=1, description="furthest step between two events of a pair")
    history: int = Field(0, ge=0, description="latest items read as one text for the next one; 0 for none")
    length: int = Field(64, ge=8, description="tokens of a text that are read")
    lora: bool = Field(False, description="train LoRA matrices and merge them, instead of all weights")
    rank: int = Field(16, ge=1, description="of the LoRA matrices")
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _steps_alone(cls, given: Any) -> Any:
        return steps_alone(given)


class EncoderConfig(BaseModel):
    """The text encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("all-minilm-l6-v2", description="'light' (TF-IDF + SVD), a name, hub id or folder")
    dim: int = Field(128, ge=1, description="length of the light encoder's vectors")
    training: EncoderTrainingConfig = EncoderTrainingConfig()
