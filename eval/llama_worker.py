"""Scores prompts with llama.cpp; started by speed_llama.py in an environment with xllamacpp.

    python llama_worker.py MODEL.gguf THREADS

Says ``"ready"``, then reads a line of JSON a request, ``{"prompts": [[ids], ...], "labels": [yes, no]}``, and
answers with the scores, yes minus no, one prompt after another. What a prompt shares with the one before is
not read again: that is llama.cpp's own cache.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

LONGEST = 4096
"""Tokens of a prompt, at most."""

RAISED = 100.0
"""Added to the logits of the labels: what is read off are the two of them alone."""


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
    # Prompts of earlier requests are not kept beside the last one: each request has another history.
    params.cache_ram_mib = 0
    for cores in (params.cpuparams, params.cpuparams_batch):
        # Threads that wait do not spin: other systems are timed meanwhile.
        cores.n_threads, cores.poll = threads, 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        scores = [answered(server, prompt, asked["labels"]) for prompt in asked["prompts"]]
        print(json.dumps(scores), flush=True)


if __name__ == "__main__":
    main()
