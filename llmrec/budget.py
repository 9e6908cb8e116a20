"""What a configuration says of how long to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps_alone(given: Any) -> Any:
    """Values of a section; TOML has no word for None: who sets steps and no minutes has a run of steps."""
    if isinstance(given, Mapping) and given.get("steps") is not None and "minutes" not in given:
        return {**given, "minutes": None}
    return given
