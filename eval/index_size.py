"""From which size on is a graph index worth it? Exact search against HNSW, side by side in one process.

    python eval/index_size.py --sizes 20000 100000 200000

Vectors are drawn around 1,000 centres (384 dimensions, as the default encoder's). Prints and writes
eval/results/index_size.json: milliseconds a query, seconds to build, recall@100 of the graph.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from llmrec.environment import environment
from llmrec.index.faiss_index import FaissIndex


def vectors(n: int, dim: int, rng: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    """Unit vectors around the centres, shape (n, dim)."""
    drawn = centres[rng.integers(0, len(centres), n)] + rng.normal(0, 0.5, (n, dim)) / np.sqrt(dim)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 100_000, 200_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "index_size.json"))
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, 384)) / np.sqrt(384)
    asked = vectors(args.queries, 384, rng, centres)
    rows = []
    for size in args.sizes:
        data = vectors(size, 384, rng, centres)
        row: dict[str, float] = {"items": size}
        found = {}
        for name, limit in (("exact", size), ("graph", 0)):
            index = FaissIndex(384, exact_up_to=limit)
            begun = time.perf_counter()
            index.add(data)
            row[f"{name}_build_seconds"] = round(time.perf_counter() - begun, 2)
            times = []
            hits = []
            for query in asked:
                begun = time.perf_counter()
                hits.append(index.search(query[None], 100, [None])[0])
                times.append(time.perf_counter() - begun)
            row[f"{name}_ms"] = round(1000 * float(np.median(times)), 3)
            found[name] = [set(h.items.tolist()) for h in hits]
        shared = [len(a & b) / len(a) for a, b in zip(found["exact"], found["graph"], strict=True)]
        row["graph_recall@100"] = round(float(np.mean(shared)), 4)
        rows.append(row)
        print(json.dumps(row))
    Path(args.out).write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
