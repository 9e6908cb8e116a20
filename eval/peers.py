"""Our sequence models beside Cornac's, on the same split and users.

    python eval/peers.py --data ../shared/data/ml-latest-small --config eval/configs/ml-latest-small.toml

Cornac is installed into a virtual environment of its own, under runs/peers. Every model is trained on
the training part, its lists are judged by our evaluator on validation events: full ranking, seen items
excluded. Ours are trained for as many seconds as Cornac's took, or until validation of a quarter of the
users stops it; the other users are reported. The defaults of ours were chosen on validation events of
amazon-beauty, so there the comparison is an upper estimate. Writes eval/results/NAME-peers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np

from llmrec.assembly import read_catalog, read_log
from llmrec.config import Config
from llmrec.environment import environment
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.protocol import make_split
from llmrec.metrics import compare, holm, summary
from llmrec.offline import core_of
from llmrec.protocols import Codes
from llmrec.recipe import HeldOut, ranks_in
from llmrec.retrieve.sequence import SequenceRetriever
from llmrec.retrieve.sequence_config import Kind, SequenceConfig
from llmrec.search import quality
from llmrec.stages import cached_texts

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
CORNAC = ("cornac==3.0.1", "torch")
EPOCHS = {"gru4rec": 10, "sasrec": 20}


def environment_of(packages: tuple[str, ...], name: str) -> Path:
    """Python of a virtual environment with these packages; made if it is not there."""
    folder = RUNS / "peers" / "-".join([name, *packages]).replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python


def flat(histories: list[Codes]) -> tuple[np.ndarray, np.ndarray]:
    """Histories one after another, and their lengths."""
    return np.concatenate(histories), np.array([len(h) for h in histories])


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder")
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--models", nargs="+", default=["gru4rec", "sasrec"], choices=["gru4rec", "sasrec"])
    parser.add_argument("--users", type=int, default=5000, help="validation users, at most")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    config = Config.of(args.config)
    catalog = read_catalog(args.data / "items.parquet", config.data)
    log = read_log(args.data / "events.parquet", catalog, config.data)
    if config.protocol.core is not None:
        catalog, log = core_of(catalog, log, config.protocol.core)
    split = make_split(log, config.protocol)
    texts = cached_texts(catalog, config, StageCache(RUNS / args.data.name), print)
    everyone = split.validation.sample(args.users, 0).held_out(catalog.active, exclude_seen=True)
    quarter = np.arange(len(everyone.queries)) % 4 == 0
    judging, asked = (
        HeldOut([everyone.queries[i] for i in rows], everyone.targets[rows])
        for rows in (np.flatnonzero(quarter), np.flatnonzero(~quarter))
    )

    folder = RUNS / "peers" / args.data.name
    folder.mkdir(parents=True, exist_ok=True)
    train, train_lengths = flat([h for h in split.train if len(h)])
    rows, lengths = flat([query.history for query in asked.queries])
    np.savez(
        folder / "split.npz", train=train, train_lengths=train_lengths, asked=rows, asked_lengths=lengths
    )
    python, ranks, seconds = environment_of(CORNAC, "cornac"), {}, {}
    for name in args.models:
        worker = [str(python), str(HERE / "peer_cornac.py"), str(folder), name, str(EPOCHS[name])]
        subprocess.run(worker, check=True)
        found = np.load(folder / f"{name}.npz")
        ranks[f"cornac {name}"] = ranks_in(found["lists"], asked.targets)
        seconds[f"cornac {name}"] = round(float(found["seconds"]), 1)
        for text in (True, False):
            own = name if text else f"{name} without texts"
            given: SequenceConfig = getattr(config.retrieval, name)
            # A quarter of the users is few: what they say of one epoch is noise.
            limit = {"minutes": max(seconds[f"cornac {name}"] / 60, 0.05), "text": text, "patience": 10}
            kind: Kind = "gru4rec" if name == "gru4rec" else "sasrec"
            begun = time.perf_counter()
            model = SequenceRetriever.fit(
                kind,
                split.train,
                texts.vectors,
                given.model_copy(update=limit),
                validate=lambda model: quality(model, judging),
            )
            seconds[own] = round(time.perf_counter() - begun, 1)
            hits = model.retrieve(asked.queries, 100)
            ranks[own] = ranks_in((h.items for h in hits), asked.targets)
        print({n: {m: round(v, 4) for m, v in summary(r).items()} for n, r in ranks.items()}, flush=True)
    compared = [
        compare(ranks, own, f"cornac {name}", metric)
        for name in args.models
        for own in (name, f"{name} without texts")
        for metric in ("ndcg@10", "recall@10")
    ]
    compared = holm(compared)
    result = {
        "data": args.data.name,
        "part": "validation",
        "users": len(asked.targets),
        "epochs of cornac": {name: EPOCHS[name] for name in args.models},
        "systems": {name: summary(r) for name, r in ranks.items()},
        "training_seconds": seconds,
        "comparisons": [c.as_dict() for c in compared],
        "environment": {**environment(), "peers": list(CORNAC)},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.data.name}-peers.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
    draft.replace(path)
    for comparison in compared:
        print(comparison)


if __name__ == "__main__":
    sys.exit(main())
