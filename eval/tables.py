"""Write the results tables of README.md, eval/README.md and docs/results.md from eval/results/*.json.

python eval/tables.py            # rewrites what is between the results marks
python eval/tables.py --check    # fails if a table is not what the results say
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from tables_speed import speed
from tables_trials import ablations, added_items

from llmrec.candidates import Weights

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MEASURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20")
NAMES = {
    "merge": "merge (retrieval)",
    "lm": "language model alone",
    "lm_top100": "language model on the merge's top 100",
    "default": "blend, as served",
}


def results_like(pattern: str) -> list[Path]:
    """Results files of this form of name, in order."""
    return sorted((ROOT / "eval" / "results").glob(pattern))


def read_json(path: Path) -> dict[str, Any]:
    """What a results file holds."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def source(found: dict[str, Any]) -> str:
    """Whether a stranger can repeat the result, or has to bring the data."""
    return "registry only" if found.get("registry") else "bring data"


def commit(found: dict[str, Any]) -> str:
    """What a result was made from: a commit, and whether the tree had changes beside it."""
    name, changed, _ = str(found["git"]).partition("-dirty")
    return f"commit `{name}`{' with uncommitted changes' if changed else ''}"


def difference(comparison: dict[str, Any]) -> str:
    """One comparison with its interval, and in words if it shows nothing."""
    low, high = comparison["ci95"]
    verdict = comparison.get("verdict", "" if low > 0 or high < 0 else ": no difference shown")
    return f"{comparison['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{verdict}"


def marked(protocol: dict[str, Any]) -> str:
    """What was ranked, in capitals where it is not comparable with full ranking."""
    return protocol["ranking"] if protocol.get("comparable", True) else protocol["ranking"].upper()


def short(results: dict[Path, dict[str, Any]]) -> str:
    """One row a results file: what the language model adds to the merge."""
    lines = [
        "| data | minutes at most | users | merge, R@10 and N@10 | LM alone, N@10 | blend, R@10 and N@10 "
        "| blend - merge, N@10 | blend - the retriever that is best alone, R@10; N@10 "
        "| known items by typed words, N@10: merge → served "
        "| items of a typed attribute, N@10: merge → served |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path, found in results.items():
        systems, training = found["systems"], found["training"]
        if not training or not found["protocol"].get("comparable", True):
            continue
        merge, lm, blend = systems["merge"], systems["lm"], systems["default"]
        of_served = [c for c in found["comparisons"] if c["a"] == "default"]
        compared = next(c for c in of_served if c["metric"] == "ndcg@10" and c["b"] == "merge")
        alone = [
            c
            for metric in ("recall@10", "ndcg@10")
            for c in of_served
            if c["b"] != "merge" and c["metric"] == metric
        ]
        weight = lm_weight(found)
        typed = " | ".join(searched(found, kind) for kind in ("known_item", "attribute"))
        added = difference(compared) if weight else "weight 0: left out"
        lines.append(
            f"| {path.stem.split('-test-')[0]} ({source(found)}) | {_minutes(found):g} "
            f"| {found['protocol']['users']:,} | {merge['recall@10']:.4f}, {merge['ndcg@10']:.4f} "
            f"| {lm['ndcg@10']:.4f} | {blend['recall@10']:.4f}, {blend['ndcg@10']:.4f} | {added} "
            f"| {'; '.join(map(difference, alone))} | {typed} |"
        )
    return "\n".join(lines)


def searched(found: dict[str, Any], kind: str) -> str:
    """NDCG@10 for typed words of one kind: of the merge, and as served, with its interval if it has one."""
    own = found["search"][kind]
    if not own["systems"]:
        return ""
    merge, served = (own["systems"][name]["ndcg@10"] for name in ("merge", "default"))
    tested = [f" ({difference(c)})" for c in own.get("comparisons", ())]
    return f"{merge:.4f}" if merge == served else f"{merge:.4f} → {served:.4f}{''.join(tested)}"


def table(path: Path, found: dict[str, Any]) -> str:
    """One results file as Markdown: every system, the comparisons, costs."""
    data, protocol, training = found["dataset"], found["protocol"], found["training"]
    lines = [
        f"### {path.stem} ({source(found)})",
        "",
        f"{protocol['part']}, {protocol['users']:,} users, {data['items']:,} items, "
        f"{data['events']:,} events; "
        f"{protocol['split']}, {marked(protocol)}, seen items {protocol['seen_items']}, "
        f"ties by {protocol['ties']}; `{found['command']}`, {commit(found)}",
        "",
        "| system | " + " | ".join(MEASURES) + " |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for name, values in found["systems"].items():
        cells = " | ".join(f"{values[m]:.4f}" for m in MEASURES)
        lines.append(f"| {NAMES.get(name, name)} | {cells} |")
    lines.append("")
    for c in found["comparisons"]:
        corrected = f", p {c['p']:.4f}, corrected {c['p_holm']:.4f}" if c.get("p_holm") is not None else ""
        lines.append(f"- {c['a']} - {c['b']}, {c['metric']}: {difference(c)}{corrected}")
    lines += costs(found) if training else []
    lines += more(found)
    return "\n".join(lines)


def retrieval(results: dict[Path, dict[str, Any]]) -> str:
    """One row a results file without the language model: what the recipe holds and how good its list is."""
    lines = [
        "Without a language model; 95 % intervals over users:",
        "",
        "| results | families in the blend | chosen in | users | R@10 | N@10 "
        "| coverage, novelty, popularity lift at 10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, found in results.items():
        if found["training"] or not found["protocol"].get("comparable", True):
            continue
        merge, beyond = found["systems"]["merge"], found["beyond"]["merge"]
        cells = []
        for metric in ("recall@10", "ndcg@10"):
            low, high = found["intervals"][metric]
            cells.append(f"{merge[metric]:.4f} [{low:.4f}, {high:.4f}]")
        minutes = found["seconds"]["fit_retrievers"] / 60
        chosen = "taken up" if found["cached"]["retrievers"] else f"{minutes:.1f} min"
        more = ", ".join(f"{beyond[f'{m}@10']:.3f}" for m in ("coverage", "novelty", "popularity_lift"))
        weights = Weights.from_dict(found["recipe"]["history"])
        families = ", ".join(name for name in found["recipe"]["settings"] if weights.ever_uses(name))
        lines.append(
            f"| {path.stem.replace('-test-', ', ')} ({source(found)}) | {families} "
            f"| {chosen} | {found['protocol']['users']:,} "
            f"| {' | '.join(cells)} | {more} |"
        )
    return "\n".join(lines + repeated(results))


def repeated(results: dict[Path, dict[str, Any]]) -> list[str]:
    """A line for each recipe that was chosen and fitted with several seeds: what the seed alone changes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, found in results.items():
        if found["training"] or not found["protocol"].get("comparable", True):
            continue
        # A name without a seed is that of the configuration, 0.
        groups.setdefault(re.sub(r"-seed\d+$", "", path.stem), []).append(found)
    lines = []
    for name, runs in groups.items():
        if len(runs) < 2:
            continue
        cells = []
        for metric in ("recall@10", "ndcg@10"):
            values = [run["systems"]["merge"][metric] for run in runs]
            mean = sum(values) / len(values)
            cells.append(f"{metric} {mean:.4f} on average, {min(values):.4f} to {max(values):.4f}")
        lines.append(f"- `{name}`, {len(runs)} seeds, merge: {'; '.join(cells)}")
    return ["", *lines] if lines else []


def lm_weight(found: dict[str, Any]) -> float:
    """Largest weight of the language model by history."""
    return Weights.from_dict(found["recipe"]["history"]).most_lm


def costs(found: dict[str, Any]) -> list[str]:
    """Training, latency, memory."""
    training, latency = found["training"], found["latency"]
    blend, merge = latency["blend"], latency["merge"]
    curve = [(row["events"], row["nats"], row["ndcg@10"]) for row in training["curve"]]
    shown = ", ".join(f"{events // 1000:,} k {nats:.2f}/{ndcg:.4f}" for events, nats, ndcg in curve)
    return [
        f"- trained {training['seconds'] / 60:.1f} of {_minutes(found):g} minutes, "
        f"{training['events_per_second']:.0f} events/s; "
        f"weight in the blend {lm_weight(found):g}",
        f"- events, validation nats/NDCG@10 of the language model alone: {shown}",
        f"- milliseconds a request with 20 history items, merge / with the language model: single, cold "
        f"{1000 * merge['single_seconds']:.0f} / {1000 * blend['single_seconds']:.0f}; in a batch of 32 "
        f"{1000 * merge['batch32_seconds_per_request']:.0f} / "
        f"{1000 * blend['batch32_seconds_per_request']:.0f}; peak memory of the run "
        f"{found['peak_memory_mb']:,} MB",
    ]


def more(found: dict[str, Any]) -> list[str]:
    """Probabilities, segments and lists beyond accuracy, where the file has them."""
    lines = []
    for name, values in found.get("probabilities", {}).items():
        lines.append(f"- {NAMES.get(name, name)}: " + ", ".join(f"{m} {v:.4f}" for m, v in values.items()))
    for name in ("merge", "default"):
        if name in found.get("beyond", {}):
            measures = ", ".join(f"{m} {v:.3f}" for m, v in found["beyond"][name].items())
            lines.append(f"- {NAMES.get(name, name)}: {measures}")
    bias = found.get("order_bias")
    if bias and bias["users"]:
        lines.append(
            f"- {bias['candidates']} candidates in {bias['orders']} other orders, {bias['users']} users: "
            f"a score changes by {bias['largest_change']:.4f} at most, and another candidate comes first in "
            f"{100 * bias['top_changes']:.1f} %"
        )
    if found.get("segments"):
        systems = [n for n in ("merge", "lm", "default") if n in found["systems"]]
        lines += [
            "",
            "| segment, NDCG@10 | users | " + " | ".join(NAMES.get(n, n) for n in systems) + " |",
            "|---|---|" + "---|" * len(systems),
        ]
        for name, segment in found["segments"].items():
            cells = " | ".join(f"{segment['systems'][n]['ndcg@10']:.4f}" for n in systems)
            lines.append(f"| {name} | {segment['users']:,} | {cells} |")
    return lines


def load() -> str:
    """What load a server carries, one row a measurement, from every load*.json."""
    lines = []
    for path in results_like("load*.json"):
        found = read_json(path)
        lines += [
            f"### {path.stem} (synthetic)",
            "",
            f"`{found['command']}`; {found['environment']['machine']}, server and clients on the same one.",
            "",
            "| items | language model | what | requests a second | p50, p95, p99 in ms | degraded | errors |",
            "|---|---|---|---|---|---|---|",
        ]
        for size in found["sizes"]:
            for name in ("without", "with"):
                part = size.get(f"{name}_language_model", {})
                rows = {f"{n} client{'s' * (n != '1')}": row for n, row in part.get("clients", {}).items()}
                rows |= {f"budget of {n} ms": row for n, row in part.get("budgets_ms", {}).items()}
                if "mixed" in part:
                    memory = part["mixed"]["memory_mb"]
                    told = f"mixed with writes, {found['mixed_minutes']:g} min; memory {memory[0]:,.0f} to "
                    rows[f"{told}{memory[-1]:,.0f} MB"] = part["mixed"]
                lines += [
                    f"| {size['items']:,} | {name} | {what} | {row['a_second']:.0f} "
                    f"| {row['p50_ms']:.0f}, {row['p95_ms']:.0f}, {row['p99_ms']:.0f} "
                    f"| {100 * row['degraded']:.0f} % | {sum(row['errors'].values())} |"
                    for what, row in rows.items()
                ]
                if "in_process" in part:
                    own = part["in_process"]
                    told = (
                        f"{own['single_ms']:.1f} ms one by one, {own['batch_of_32_ms']:.1f} in batches of 32"
                    )
                    lines.append(f"| {size['items']:,} | {name} | in the process: {told} | | | | |")
        lines.append("")
    return "\n".join(lines).strip()


def reasons() -> str:
    """How far items fall in the served list when what their reason names is deleted, from reasons.json."""
    found = stored("reasons.json")
    if found is None:
        return ""
    lines = [
        "### reasons (movielens, the model of `make demo`)",
        "",
        f"`{found['command']}`: {found['items']:,} shown items of {found['users']:,} users; "
        f"{100 * found['with_history_in_evidence']:.0f} % have a history item in evidence. A list takes "
        f"{found['median_ms']['without_reasons']:.1f} ms without reasons, "
        f"{found['median_ms']['with_reasons']:.1f} ms with them. Of {found['phrased']['asked']} sentences of "
        f"the language model {found['phrased']['kept']} are kept.",
        "",
        "| deleted from the history | pairs | doublings of the item's rank | the item that its reason names "
        "| difference, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["doublings_of_the_rank"].items():
        other = name.removeprefix("evidence against ")
        low, high = row["ci95"]
        lines.append(
            f"| {other} item | {row['pairs']:,} | {row[other]:.2f} | {row['evidence']:.2f} "
            f"| {row['difference']:+.2f} [{low:+.2f}, {high:+.2f}] |"
        )
    return "\n".join(lines)


def scale() -> str:
    """How long a large log takes, from scale.json."""
    found = stored("scale.json")
    if found is None:
        return ""
    stages = list(found["started_at_seconds"].items())
    took = ", ".join(
        f"{name} {later - begun:.0f} s" for (name, begun), (_, later) in itertools.pairwise(stages)
    )
    lines = [
        "### scale (synthetic)",
        "",
        f"`python eval/scale.py`: {found['events']:,} events, {found['items']:,} items, "
        f"{found['users']:,} users; {found['environment']['machine']}. Fitted in "
        f"{found['fit_seconds'] / 60:.1f} minutes with {found['peak_memory_mb'] / 1000:.1f} GB at most: "
        f"{took}.",
        "",
        "| returned | ms a request, single (p95) | ms a request, in batches of 64 |",
        "|---|---|---|",
    ]
    for what, name in (("ten best", "ten_returned"), (f"all {found['candidates']}", "all_returned")):
        row = found[name]
        lines.append(
            f"| {what} | {row['single_ms']:.1f} ({row['single_p95_ms']:.1f}) | {row['batch_ms']:.2f} |"
        )
    return "\n".join(lines)


def stored(name: str) -> dict[str, Any] | None:
    """A results file, if it is there."""
    path = ROOT / "eval" / "results" / name
    return read_json(path) if path.is_file() else None


IN_SHORT = {
    "fit, s": "fit, seconds",
    "fit, MB": "fit, peak MB",
    "vector index, s": "vector index, seconds",
    "request, ms": "request, ms",
    "request in batches, ms": "request in batches of 64, ms",
    "batch, MB": "`llmrec batch recommend`, peak MB",
}
"""Rows of the grid that docs/results.md shows, and what they are called there."""


def growth(*, short: bool) -> str:
    """How each stage grows with items and events, from scale-grid.json."""
    found = stored("scale-grid.json")
    if found is None:
        return ""
    lines = [] if short else ["### growth (synthetic)", ""]
    lines += [
        f"`python eval/scale.py --grid`, {found['environment']['machine']}, no language model, light "
        "encoder; requests on one core, 200 candidates from each retriever, ten returned. The exponent is "
        "the slope of log value over log size; stages of less than half a second are left out of it.",
    ]
    for axis in found["axes"]:
        fixed = "1 M events" if axis["by"] == "items" else "100 k items"
        sizes = " | ".join(f"{size:,}" for size in axis["sizes"])
        lines += ["", f"| {axis['by']} ({fixed}) | {sizes} | exponent |"]
        lines.append("|---|" + "---|" * (len(axis["sizes"]) + 1))
        for name, row in axis["rows"].items():
            if short and name not in IN_SHORT:
                continue
            cells = " | ".join(f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in row["values"])
            slope = "" if row["exponent"] is None else row["exponent"]
            lines.append(f"| {IN_SHORT.get(name, name)} | {cells} | {slope} |")
    batch = stored("scale-batch.json")
    if batch is not None:
        b = batch["batch"]
        lines += [
            "",
            f"`llmrec batch recommend` for {b['users']:,} users and {batch['items']:,} items, "
            f"{batch['events']:,} events: {b['seconds']:.0f} seconds in one process, "
            f"{b['ms_a_user']:.2f} ms a user with start and files, {b['peak_memory_mb'] or 0:,} MB at most.",
        ]
    return "\n".join(lines)


def limits() -> str:
    """EASE at once against among neighbours, and the trie of many titles, from limits.json."""
    found = stored("limits.json")
    if found is None:
        return ""
    lines = [
        "### limits (synthetic)",
        "",
        f"`python eval/limits.py`, {found['environment']['machine']}; 50 events an item.",
        "",
        "| items | EASE solved | seconds | MB more | NDCG@10 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['items']:,} | {r['solved']} | {r['seconds']:.1f} | {r['memory_mb']:,} | {r['ndcg@10']:.4f} |"
        for r in found["ease"]
    ]
    lines += ["", "| titles | stage | seconds | MB | nodes | file, MB |", "|---|---|---|---|---|---|"]
    for r in found["trie"]:
        nodes, size = (f"{r[key]:,}" if key in r else "" for key in ("nodes", "file_mb"))
        lines.append(
            f"| {r['titles']:,} | {r['stage']} | {r['seconds']:.2f} | {r['memory_mb']:,} | {nodes} | {size} |"
        )
    lines += [
        "",
        "| items | best 100 of a state: product, ms | graph, ms | recall@100 | graph built in, s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['items']:,} | {r['product_ms']:.1f} | {r['graph_ms']:.1f} | {r['recall@100']:.3f} "
        f"| {r['build_seconds']:.0f} |"
        for r in found["states"]
    ]
    return "\n".join(lines)


def compared(pattern: str, words: str) -> str:
    """Systems and their differences, from results files of other programs."""
    lines = []
    for path in results_like(pattern):
        found = read_json(path)
        lines += [
            f"### {path.stem} (bring data)",
            "",
            f"{words}; {found['part']}, {found['users']:,} users.",
            "",
            "| system | " + " | ".join(MEASURES) + " | seconds of training |",
            "|---|" + "---|" * (len(MEASURES) + 1),
        ]
        for name, values in found["systems"].items():
            seconds = found.get("training_seconds", {}).get(name)
            cells = " | ".join(f"{values[m]:.4f}" for m in MEASURES)
            lines.append(f"| {name} | {cells} | {'' if seconds is None else f'{seconds:.0f}'} |")
        lines += [
            "",
            *(f"- {c['a']} - {c['b']}, {c['metric']}: {difference(c)}" for c in found["comparisons"]),
        ]
        lines.append("")
    return "\n".join(lines).strip()


def pages() -> dict[Path, str]:
    """What has to stand between the marks of each page."""
    read = {path: read_json(path) for path in results_like("*-test-*.json")}
    # Numbers in names in the order of numbers: 10min before 30min.
    results = dict(sorted(read.items(), key=lambda kv: (kv[0].stem.split("-test-")[0], _minutes(kv[1]))))
    # That of a processor with bfloat16 first.
    timed = [read_json(path) for path in (*results_like("speed.json"), *results_like("speed-*.json"))]
    quick = "\n\n".join(speed(found, short=True) for found in timed[:1])
    slow = ["### speed (bring data)", *(speed(found, short=False) for found in timed)] if timed else []
    in_short = "\n".join([short(results), *repeated(results)])
    return {
        ROOT / "docs" / "results.md": "\n\n".join(
            [short(results), retrieval(results), quick, growth(short=True)]
        ),
        ROOT / "README.md": f"{in_short}\n\n{quick}",
        ROOT / "eval" / "README.md": "\n\n".join(
            [
                *(table(path, found) for path, found in results.items()),
                scale(),
                growth(short=False),
                limits(),
                load(),
                reasons(),
                *slow,
                *(ablations(path.stem, read_json(path)) for path in results_like("*-ablations.json")),
                *(added_items(path.stem, read_json(path)) for path in results_like("*-added-items.json")),
                compared("*-peers.json", "`eval/peers.py`: the systems below on one split, full ranking"),
                compared(
                    "*-encoder.json",
                    "`finetune/encoder.py`: items near the one before the target, by text, before and after",
                ),
            ]
        ),
    }


def _minutes(found: dict[str, Any]) -> float:
    training = found["training"]
    return round(float(training.get("minutes") or training["seconds"] / 60), 1) if training else 0.0


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    for page, body in pages().items():
        text = page.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        new = f"{before}{BEGIN}\n{body}\n{END}{after}"
        if args.check and new != text:
            sys.exit(f"{page.name} does not say what eval/results says; run python eval/tables.py")
        if not args.check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
