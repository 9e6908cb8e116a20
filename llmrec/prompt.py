"""Prompts as data: text files with named slots, filled strictly and known by their hash."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from llmrec.errors import ConfigError

_SLOT = re.compile(r"\{([a-z_]+)\}")
_PACKAGED = Path(__file__).parent / "prompts"
_SOURCE_TREE = Path(__file__).parent.parent / "prompts"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt text with slots such as ``{history}``."""

    name: str
    text: str

    @classmethod
    def load(cls, name: str) -> Prompt:
        """Load a prompt by name from the package, or from a path that ends in ``.md``.

        Raises
        ------
        ConfigError
            If there is no such prompt; the message names the known ones.
        """
        # An editable install does not see the wheel's mapping of prompts/ into the package.
        folder = _PACKAGED if _PACKAGED.is_dir() else _SOURCE_TREE
        path = Path(name) if name.endswith(".md") else folder / f"{name}.md"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.md")))
            raise ConfigError(f"no prompt {name!r}; known prompts: {known}; or give a path that ends in .md")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as broken:
            raise ConfigError(f"the prompt {path} is not UTF-8: {broken}") from broken
        return cls(name=path.stem, text=text.strip())

    @property
    def sha256(self) -> str:
        """Hash of the text; an adapter refuses to load with another prompt than it was trained with."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots in order."""
        return tuple(_SLOT.findall(self.text))

    def around(self, slot: str, *later: str) -> tuple[str, str]:
        """Return the words before and after a slot that occurs once, without the spaces beside it.

        `later` are the slots in the words after it.
        """
        if self.slots != (slot, *later):
            wanted = " and ".join(f"{{{name}}}" for name in (slot, *later))
            raise ConfigError(f"prompt {self.name!r} must have the slots {wanted}, got {self.slots}")
        before, after = self.text.split(f"{{{slot}}}")
        return before.rstrip(), after.lstrip()
