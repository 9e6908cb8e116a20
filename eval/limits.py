"""Where the parts of one process end: EASE solved at once or among neighbours, and the trie of many titles.

    python eval/limits.py                                    # 2,500 to 20,000 items; 100,000 and 1 M titles
    python eval/limits.py --items 2500 5000 --titles 100000

EASE is fitted both ways on the synthetic log of scale.py, and asked for the last event of each history. The
trie is built from titles of drawn words in the tokens of the default language model, written, and mapped.
State vectors of the language model's size search items around 2,000 centres, with a bias by popularity.
Every measurement has a process of its own. Prints and writes eval/results/limits.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
from scale import synthetic
from threadpoolctl import threadpool_limits

from llmrec.assembly import encode, read_log
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.evaluation.run import peak_memory_mb
from llmrec.evaluation.split import tail
from llmrec.fetch import resolve
from llmrec.index.faiss_index import FaissIndex
from llmrec.metrics import summary
from llmrec.persistence import load_arrays, save_arrays
from llmrec.protocols import Floats
from llmrec.ranking import top
from llmrec.recipe import ranks_in
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.score.config import WordsConfig
from llmrec.score.lines import TokenLines
from llmrec.score.nearest import Nearest
from llmrec.score.trie import ItemTrie
from llmrec.score.words import Vocabulary

HERE = Path(__file__).resolve().parent
JUDGES = 2000

Row = dict[str, float | int | str]


def ease(items: int, together: bool) -> Row:
    """Seconds, peak memory and quality of EASE over so many items, fifty events each."""
    tables = synthetic(50 * items, items, 2 * items, seed=0)
    catalog = Catalog.load(tables[0])
    config = Config.of({"encoder": {"name": "light"}})
    train, part = tail(read_log(tables[1], catalog, config.data))
    texts = encode(catalog.lines(), config, lambda stage: None)
    held_out = part.sample(JUDGES, 0).held_out(catalog.active, exclude_seen=True)
    settings = EASEConfig(max_items=items if together else 1)
    before, begun = peak_memory_mb(), time.perf_counter()
    model = EASERetriever.fit(train.histories, items, settings, train.weights, texts.vectors)
    seconds = time.perf_counter() - begun
    ranks = ranks_in((hits.items for hits in model.retrieve(held_out.queries, 100)), held_out.targets)
    return {
        "items": items,
        "solved": "at once" if together else "among neighbours",
        "seconds": round(seconds, 2),
        "memory_mb": round(peak_memory_mb() - before),
        "ndcg@10": round(summary(ranks, ["ndcg@10"])["ndcg@10"], 4),
    }


def titles(n: int) -> list[str]:
    """Titles of two to eight words, frequent words more often."""
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}" for a in ("ar", "bel", "con", "der", "el") for b in range(4000)])
    lengths = rng.integers(2, 9, n)
    drawn = words[np.minimum(rng.zipf(1.2, lengths.sum()), len(words)) - 1]
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]


def tokens(n: int, path: str, base: str) -> Row:
    """Tokenise so many titles and write their lines."""
    vocabulary = Vocabulary(resolve(base))
    begun = time.perf_counter()
    lines = vocabulary.lines(titles(n), WordsConfig(mode="likelihood").line_tokens)
    seconds = time.perf_counter() - begun
    arrays = {"tokens": lines.tokens, "offsets": lines.offsets, "end": np.array([vocabulary.end])}
    save_arrays(Path(path), {"lines": arrays})
    return {
        "titles": n,
        "stage": "tokenise",
        "seconds": round(seconds, 2),
        "memory_mb": round(peak_memory_mb()),
    }


def build(n: int, path: str) -> Row:
    """Build the trie of mapped lines and write it."""
    kept = load_arrays(Path(path))["lines"]
    lines, before, begun = TokenLines(kept["tokens"], kept["offsets"]), peak_memory_mb(), time.perf_counter()
    trie = ItemTrie.of(lines, int(kept["end"][0]), np.ones(n))
    seconds, memory = time.perf_counter() - begun, peak_memory_mb() - before
    save_arrays(Path(f"{path}.trie"), {"trie": trie.arrays()})
    return {
        "titles": n,
        "stage": "build the trie",
        "seconds": round(seconds, 2),
        "memory_mb": round(memory),
        "nodes": len(trie),
        "file_mb": round(Path(f"{path}.trie").stat().st_size / 2**20),
    }


def opened(n: int, path: str) -> Row:
    """Map the trie, with counts."""
    before, begun = peak_memory_mb(), time.perf_counter()
    trie = ItemTrie(load_arrays(Path(f"{path}.trie"))["trie"], np.ones(n))
    seconds = time.perf_counter() - begun
    trie.to_score(np.arange(100, dtype=np.int32))
    memory = round(peak_memory_mb() - before)
    return {"titles": n, "stage": "open the trie", "seconds": round(seconds, 2), "memory_mb": memory}


def states(items: int) -> Row:
    """Milliseconds in which a state vector finds its best 100, by product and by graph, on one core."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2000, 256)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), items)]
    vectors += rng.normal(0, 0.5, vectors.shape).astype(np.float32)
    bias = np.log1p(np.minimum(rng.zipf(1.3, items), 100_000)).astype(np.float32)
    asked = centres[:100] + rng.normal(0, 0.5, (100, 256)).astype(np.float32)
    begun = time.perf_counter()
    nearest = Nearest.of(vectors, bias, graph)
    built = time.perf_counter() - begun
    took: dict[str, list[float]] = {"product": [], "graph": []}
    shared = []
    with threadpool_limits(1):
        faiss.omp_set_num_threads(1)
        for state in asked:
            begun = time.perf_counter()
            exact = top(vectors @ state + bias, 100, None)
            took["product"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            found = nearest.search(state[None], 100, [None])[0]
            took["graph"].append(time.perf_counter() - begun)
            shared.append(float(np.isin(exact.items, found.items).mean()))
    return {
        "items": items,
        "build_seconds": round(built, 1),
        **{f"{name}_ms": round(1000 * float(np.median(times)), 2) for name, times in took.items()},
        "recall@100": round(float(np.mean(shared)), 4),
    }


def graph(vectors: Floats) -> FaissIndex:
    """A graph over all of these vectors."""
    index = FaissIndex(vectors.shape[1], exact_up_to=0)
    index.add(vectors)
    return index


def alone(measure: Callable[[], Row]) -> Row:
    """Run in a new process, so that peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        row = pool.submit(measure).result()
    print(json.dumps(row), flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--items", type=int, nargs="*", default=[2500, 5000, 10_000, 20_000])
    parser.add_argument("--titles", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--states", type=int, nargs="*", default=[200_000, 1_000_000])
    parser.add_argument(
        "--base", default=Config().lm.base, help="name or folder of the LM with the tokenizer"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "limits.json")
    args = parser.parse_args(argv)
    solved = [alone(partial(ease, items, way)) for items in args.items for way in (True, False)]
    trie = []
    with tempfile.TemporaryDirectory(prefix="llmrec-limits-") as folder:
        for n in args.titles:
            path = f"{folder}/{n}"
            stages = partial(tokens, n, path, args.base), partial(build, n, path), partial(opened, n, path)
            trie += [alone(stage) for stage in stages]
    searched = [alone(partial(states, n)) for n in args.states]
    result = {"ease": solved, "trie": trie, "states": searched, "environment": environment()}
    draft = args.out.with_name(f".{args.out.name}")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(args.out)


if __name__ == "__main__":
    main()
