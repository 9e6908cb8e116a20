"""How long does it take to score candidates? Our modes beside other ways to ask the same causal LM.

    python eval/speed.py                                       # MovieLens, 20 and 100 candidates
    python eval/speed.py --data ../shared/data/ml-latest-small --requests 50

All in one run: the same base weights, threads, histories of 20 items and drawn candidates, each system in
float32 and in bfloat16, and one request after another: all systems answer it before the next one, so that a
machine that is slower for a while is so for all of them. The model is not tuned, which changes no time.
Ours have their LoRA matrices merged, as a recommender's own model is served. Systems:

- item tokens: the whole catalogue at once, all layers and the three of the default; cold, and with the
  state of the history kept.
- yes_no, likelihood, letters: the candidates packed behind one history; cold, and with the history kept.
- generate: twenty items of the catalogue are proposed, whatever the candidates.
- CrossEncoder: sentence-transformers with `LogitScore`, a prompt a candidate, sorted by length, its best
  batch size.
- one by one: plain transformers, a prompt a candidate.
- letters, plain: all candidates in one prompt, as LlamaRec reads them, by plain transformers.
- titles as text: the model writes as many tokens as ten titles have, greedily.
- llama.cpp: the 4-bit file of the same weights in every table, a prompt a candidate, what they share read
  once.

The limit is the time of the multiply-adds that a system needs, as a matrix product: that of the linear
layers alone for the tokens that it reads, same type and shapes, on the same cores, and at that rate the
products of the queries with the keys that they see. Writes eval/results/speed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_cross import cross_encoder
from rich.console import Console
from speed_llama import PACKAGES, Llama, started

from llmrec.assembly import read_catalog, read_log
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.errors import ConfigError
from llmrec.evaluation.cache import StageCache
from llmrec.families import Texts
from llmrec.fetch import resolve
from llmrec.language_model import LanguageModel
from llmrec.lora import merge
from llmrec.offline import core_of
from llmrec.protocols import Codes, Query
from llmrec.score.config import ItemTokensConfig, Precision, WordsConfig
from llmrec.score.labels import letter_labels, yes_no_labels
from llmrec.score.loading import body_dtype
from llmrec.score.words import WordsModel
from llmrec.stages import cached_texts
from llmrec.word_model import WordLanguageModel

HERE = Path(__file__).resolve().parent
HISTORY = 20
BATCHES = (4, 16, 64)
PROPOSED = 20
"""Items that `generate` proposes."""
SLOW = 3
"""Requests that slow systems are timed on, at most."""

ONE_BY_ONE = "one by one, plain transformers"

console = Console(stderr=True)
Asked = tuple[Query, Codes]
Answer = Callable[[Query, Codes], Any]


@dataclass(frozen=True)
class System:
    """One way to score candidates.

    Parameters
    ----------
    answer
        Gives the scores of a request.
    body
        The inner transformer that it runs; None where that is in another process.
    begin
        Drops what was kept before the first request; each request has another history, so all are cold.
    before
        Run ahead of each request, untimed: reads its history, where that is what is to be kept.
    slow
        Timed on a few requests only.
    """

    name: str
    answer: Answer
    body: Any
    begin: Callable[[], None] = lambda: None
    before: Answer = lambda query, items: None
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """Positions of one forward, padding included, and pairs of a query and a key that it sees."""

    positions: int
    pairs: int


@contextmanager
def reads_of(body: Any) -> Iterator[list[Read]]:
    """What each forward of a body reads; nothing of a body in another process."""
    read: list[Read] = []
    if body is None:
        yield read
        return

    def note(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = named.get("inputs_embeds")
        given = named.get("input_ids", args[0] if args else None) if given is None else given
        rows, n = given.shape[:2]
        mask, past = named.get("attention_mask"), named.get("past_key_values")
        if mask is not None and mask.dim() == 4:
            pairs = int((mask == 0).sum())
        else:
            pairs = rows * n * (n + 1) // 2 + rows * n * (0 if past is None else past.get_seq_length())
        read.append(Read(rows * n, pairs))

    handle = body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Most resident memory meanwhile beyond that of the beginning, MB; looked at every 5 ms.

    What is free is given back first: memory that another system left would be used again and not be seen.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    page, done, found = 4096 / 2**20, threading.Event(), [0.0]

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    start = resident()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def limit_seconds(body: Any, reads: Sequence[Read], dtype: torch.dtype) -> float:
    """Time of the products that some forwards need, LoRA not counted; those of attention at the same rate."""
    if not reads:
        return 0.0
    shapes: dict[tuple[int, int], int] = {}
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora" not in name:
            shapes[module.in_features, module.out_features] = (
                shapes.get((module.in_features, module.out_features), 0) + 1
            )
    config, total, done, pairs = body.config, 0.0, 0, 0
    for read in reads:
        n = read.positions
        pairs += read.pairs
        for (inputs, outputs), count in shapes.items():
            done += count * n * inputs * outputs
            x, w = torch.randn(n, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
            torch.nn.functional.linear(x, w)
            times = []
            for _ in range(5):
                begun = time.perf_counter()
                torch.nn.functional.linear(x, w)
                times.append(time.perf_counter() - begun)
            total += count * float(np.median(times))
    # Each pair is multiplied once for the product and once for the sum of values.
    attended = pairs * 2 * config.num_hidden_layers * config.hidden_size
    return total * (1 + attended / done)


def timed(systems: Sequence[System], requests: Sequence[Asked], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Milliseconds a request of each; the first request warms up.

    Positions and the share of the limit are medians over the requests that all systems answer.
    """
    seconds: list[list[float]] = [[] for _ in systems]
    reads: list[list[list[Read]]] = [[] for _ in systems]
    memory = [0.0] * len(systems)
    for system in systems:
        system.begin()
    for number, (query, items) in enumerate(requests):
        for at, system in enumerate(systems):
            if system.slow and number > SLOW:
                continue
            # Memory is that of the first request, which is not timed: new pages take longer.
            watched = nullcontext([0.0]) if number else peak_memory()
            with torch.inference_mode(), watched as peak, reads_of(system.body) as read:
                system.before(query, items)
                read.clear()
                begun = time.perf_counter()
                system.answer(query, items)
                seconds[at].append(time.perf_counter() - begun)
            memory[at] = max(memory[at], peak[0])
            reads[at].append(read)
    rows = []
    for system, took, most, read_by in zip(systems, seconds, memory, reads, strict=True):
        # Not the first, and none that only fast systems answer.
        shared = range(1, min(SLOW + 1, len(took)))
        shares = [limit_seconds(system.body, read_by[n], dtype) / took[n] for n in shared]
        seen = system.body is not None
        rows.append(
            {
                "median_ms": round(1000 * float(np.median(took[1:])), 2),
                "p95_ms": round(1000 * float(np.quantile(took[1:], 0.95)), 2),
                "requests": len(took) - 1,
                "memory_mb": round(most) if seen else None,
                "positions": int(np.median([sum(one.positions for one in read_by[n]) for n in shared]))
                if seen
                else None,
                "share_of_limit": round(float(np.median(shares)), 3) if seen else None,
                "shared_ms": [round(1000 * took[n], 2) for n in shared],
            }
        )
    return rows


def best_batch(systems: Sequence[System], query: Query, items: Codes) -> System:
    """The one that answers a request in the least time, after a small one."""
    seconds = []
    with torch.inference_mode():
        for system in systems:
            system.answer(query, items[:4])
            begun = time.perf_counter()
            system.answer(query, items)
            seconds.append(time.perf_counter() - begun)
    return systems[int(np.argmin(seconds))]


def worded(mode: str, base: Path, texts: Texts, counts: Any, precision: Precision) -> WordLanguageModel:
    """An untrained model that reads words."""
    config = WordsConfig(mode=mode, base=str(base), precision=precision, window=HISTORY, line_tokens=32)
    made = WordLanguageModel.new(config, base, texts.lines, counts)
    made.words.eval()
    return made


def ours(base: Path, texts: Texts, counts: Any, precision: Precision, few: int) -> list[System]:
    """Our modes, untrained."""
    models: dict[str, LanguageModel | WordLanguageModel] = {}
    for layers, name in ((None, "item tokens, all layers"), (few, f"item tokens, {few} layers")):
        config = ItemTokensConfig(base=str(base), layers=layers, precision=precision)
        models[name] = LanguageModel.new(config, base, texts.vectors, counts)
    for mode in ("yes_no", "likelihood", "letters", "generate"):
        models[mode] = worded(mode, base, texts, counts, precision)
    systems = []
    for name, made in models.items():
        body = made.words.body if isinstance(made, WordLanguageModel) else made.model.body
        merge(body)

        def ask(query: Query, items: Codes, scorer: Any = made.scorer) -> Any:
            return scorer.score([query], [items])

        def read(query: Query, items: Codes, scorer: Any = made.scorer) -> None:
            scorer.score([query], [items[:1]])

        def propose(query: Query, items: Codes, scorer: Any = made.scorer) -> Any:
            return scorer.retrieve([query], PROPOSED)

        answer = propose if name == "generate" else ask
        systems.append(System(f"{name}, cold", answer, body, begin=made.scorer.forget))
        systems.append(System(f"{name}, history kept", answer, body, begin=made.scorer.forget, before=read))
    return systems


def prompts(words: WordsModel, query: Query, items: Codes, last: list[int]) -> list[list[int]]:
    """One prompt a candidate, the very tokens that `yes_no` reads."""
    beginning = words.beginning(query.history) + words.stem(query)
    return [[*beginning, *words.lines[code], words.vocabulary.end, *last] for code in items]


def others(
    base: Path, texts: Texts, counts: Any, precision: Precision, llama: Llama | None
) -> tuple[list[System], list[System]]:
    """The same model asked by other means: the CrossEncoder by size of its batches, and all others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = body_dtype(precision)
    scorer: Any = worded("yes_no", base, texts, counts, precision).scorer
    letters: Any = worded("letters", base, texts, counts, precision).scorer
    words: WordsModel = scorer.words
    yes, no = yes_no_labels(words.vocabulary)
    labels = torch.tensor(letter_labels(words.vocabulary))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    decode = AutoTokenizer.from_pretrained(base).decode
    cross = cross_encoder(base, words.vocabulary, dtype=dtype)

    def crossed(size: int) -> Answer:
        def answer(query: Query, items: Codes) -> Any:
            pairs = [(decode(tokens), "") for tokens in prompts(words, query, items, scorer.last)]
            return cross.predict(
                pairs, batch_size=size, show_progress_bar=False, activation_fn=torch.nn.Identity()
            )

        return answer

    def one_by_one(query: Query, items: Codes) -> list[float]:
        scores = []
        for tokens in prompts(words, query, items, scorer.last):
            logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1, use_cache=False).logits
            scores.append(float(logits[0, -1, yes] - logits[0, -1, no]))
        return scores

    def listed(query: Query, items: Codes) -> Any:
        tree, _ = letters.asks(query, items[: len(labels)])
        tokens = torch.tensor([[*letters.words.beginning(query.history), *tree.tokens.tolist()]])
        return model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits[0, -1, labels]

    new = int(10 * np.mean([len(line) + 1 for line in words.lines]))

    def written(query: Query, items: Codes) -> Any:
        tokens = torch.tensor([words.beginning(query.history)])
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=words.vocabulary.end,
        )

    def four_bit(query: Query, items: Codes) -> Any:
        assert llama is not None
        return llama.score(prompts(words, query, items, scorer.last), [yes, no])

    body = cross[0].model.base_model
    batched = [System(f"CrossEncoder, batches of {n}", crossed(n), body, slow=True) for n in BATCHES]
    return batched, [
        System(ONE_BY_ONE, one_by_one, model.base_model, slow=True),
        System("letters, plain transformers, at most 26", listed, model.base_model, slow=True),
        System("ten titles written as text", written, model.base_model, slow=True),
        *([System("llama.cpp, 4 bits", four_bit, None, slow=True)] if llama is not None else []),
    ]


def requests_of(histories: Sequence[Codes], items: int, candidates: int, n: int, seed: int) -> list[Asked]:
    """The latest 20 items of n + 1 users, and drawn candidates."""
    rng = np.random.default_rng(seed)
    long = [history[-HISTORY:] for history in histories if len(history) >= HISTORY]
    chosen = rng.permutation(len(long))[: n + 1]
    return [(Query(long[i]), rng.choice(items, candidates, replace=False).astype(np.int32)) for i in chosen]


def apart(systems: Sequence[System], query: Query, items: Codes) -> dict[str, float]:
    """Largest difference of a score from plain transformers, of the systems that ask the same question."""
    with torch.inference_mode():
        found = {
            s.name: np.ravel(s.answer(query, items))
            for s in systems
            if s.name == ONE_BY_ONE or s.name.startswith(("CrossEncoder", "yes_no, cold", "llama.cpp"))
        }
    truth = found.pop(ONE_BY_ONE)
    return {name: round(float(np.abs(values - truth).max()), 6) for name, values in found.items()}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how many times faster than the CrossEncoder of the same precision, over the requests of both."""
    for row in rows:
        (rival,) = (
            other["shared_ms"]
            for other in rows
            if other["system"].startswith("CrossEncoder")
            and all(other[key] == row[key] for key in ("precision", "candidates"))
        )
        ratios = [theirs / ours for theirs, ours in zip(rival, row["shared_ms"], strict=True)]
        row["times_as_fast_as_cross_encoder"] = round(float(np.median(ratios)), 1)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="movielens", help="folder, or a name that llmrec fetch knows")
    parser.add_argument("--base", default=ItemTokensConfig().base, help="causal LM: name, hub id or folder")
    parser.add_argument("--layers", type=int, default=3, help="of the item tokens with few layers")
    parser.add_argument("--encoder", default=None, help="text encoder of the item tokens")
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--llama", action=argparse.BooleanOptionalAction, default=True, help="with llama.cpp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed.json")
    args = parser.parse_args(argv)
    folder = Path(args.data) if Path(args.data).is_dir() else resolve(args.data)
    flags = {"name": args.encoder} if args.encoder else {}
    config = Config.of({"data": {"policy": "drop"}}).with_flags(encoder=flags)
    catalog = read_catalog(folder / "items.parquet", config.data)
    log = read_log(folder / "events.parquet", catalog, config.data)
    catalog, log = core_of(catalog, log, 5)
    texts = cached_texts(catalog, config, StageCache(HERE.parent / "runs" / folder.name), console.print)
    base = resolve(args.base)
    counts = np.bincount(log.item, minlength=len(catalog))
    histories = [log.history(user) for user in range(log.n_users)]
    llama = None
    try:
        llama = (
            started(args.base, HERE.parent / "runs" / "llama", torch.get_num_threads())
            if args.llama
            else None
        )
    except (ConfigError, subprocess.CalledProcessError) as error:
        console.print(f"without llama.cpp: {error}")
    rows: list[dict[str, Any]] = []
    differences: dict[str, dict[str, float]] = {}
    for precision in args.precisions:
        own = ours(base, texts, counts, precision, args.layers)
        batched, plain = others(base, texts, counts, precision, llama)
        for candidates in args.candidates:
            asked = requests_of(histories, len(catalog), candidates, args.requests, args.seed)
            systems = [*own, best_batch(batched, *asked[0]), *plain]
            for system, measured in zip(systems, timed(systems, asked, body_dtype(precision)), strict=True):
                row = {"system": system.name, "precision": precision, "candidates": candidates}
                rows.append(row | measured)
                console.print(rows[-1])
        differences[precision] = apart(systems, *asked[0])
    if llama is not None:
        llama.close()
    result = {
        "command": " ".join(["python eval/speed.py", *(sys.argv[1:] if argv is None else argv)]),
        "data": folder.name,
        "items": len(catalog),
        "base": args.base,
        "history": HISTORY,
        "threads": torch.get_num_threads(),
        "yes_no_apart_from_one_by_one": differences,
        "systems": with_ratios(rows),
        "environment": {**environment(), "llama.cpp": PACKAGES if llama else None},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draft = args.out.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out)


if __name__ == "__main__":
    main()
