"""Prompts are data: strict slots, known by their hash."""

import pytest

from llmrec.errors import ConfigError
from llmrec.prompt import Prompt


def test_a_prompt_splits_around_its_only_slot_and_its_hash_follows_the_words(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text("Bought before: {history}\n")
    first = Prompt.load(str(path))
    assert first.around("history") == ("Bought before:", "")
    path.write_text("Bought earlier: {history}")
    assert Prompt.load(str(path)).sha256 != first.sha256


def test_unknown_prompts_and_wrong_slots_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="item_tokens"):
        Prompt.load("nothing like it")
    path = tmp_path / "mine.md"
    path.write_text("{history} {wish}")
    with pytest.raises(ConfigError, match=r"must have the slots \{history\}, got"):
        Prompt.load(str(path)).around("history")
