"""Write the results tables of README.md and eval/README.md from eval/results/*.json.

python eval/tables.py            # rewrites what is between the results marks
python eval/tables.py --check    # fails if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MEASURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20")
NAMES = {
    "merge": "merge (retrieval)",
    "lm": "language model alone",
    "lm_top100": "language model on the merge's top 100",
    "default": "blend, as served",
}


def table(path: Path) -> str:
    """One results file as a Markdown table with its comparisons."""
    found = json.loads(path.read_text(encoding="utf-8"))
    data, protocol, training = found["dataset"], found["protocol"], found["training"]
    lines = [
        f"**{path.stem}** ({protocol['part']}, {protocol['users']:,} users, {data['items']:,} items, "
        f"{data['events']:,} events; {protocol['split']}, full ranking, seen items {protocol['seen_items']}, "
        f"ties by {protocol['ties']}; `{found['command']}`)",
        "",
        "| system | " + " | ".join(MEASURES) + " |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for name, values in found["systems"].items():
        cells = " | ".join(f"{values[m]:.4f}" for m in MEASURES)
        lines.append(f"| {NAMES.get(name, name)} | {cells} |")
    lines.append("")
    for c in found["comparisons"]:
        low, high = c["ci95"]
        verdict = "" if low > 0 or high < 0 else ": no difference shown"
        lines.append(
            f"- {c['a']} - {c['b']}, {c['metric']}: {c['difference']:+.4f}, 95 % interval "
            f"[{low:+.4f}, {high:+.4f}]{verdict}"
        )
    if training:
        weight = found["recipe"]["history"]["lm"]
        blend, merge = found["latency"]["blend"], found["latency"]["merge"]
        lines.append(
            f"- trained {training['minutes']:g} minutes, {training['events_per_second']:.0f} events/s; "
            f"weight in the blend {weight:g}"
        )
        lines.append(
            f"- milliseconds a request with 20 history items, merge / with the language model: single, cold "
            f"{1000 * merge['single_seconds']:.0f} / {1000 * blend['single_seconds']:.0f}; in a batch of 32 "
            f"{1000 * merge['batch32_seconds_per_request']:.0f} / "
            f"{1000 * blend['batch32_seconds_per_request']:.0f}; peak memory of the run "
            f"{found['peak_memory_mb']:,} MB"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    results = sorted((ROOT / "eval" / "results").glob("*-test-*.json"))
    body = "\n\n".join(table(path) for path in results) or "No results yet."
    for page in (ROOT / "README.md", ROOT / "eval" / "README.md"):
        text = page.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        new = f"{before}{BEGIN}\n{body}\n{END}{after}"
        if args.check and new != text:
            sys.exit(f"{page.name} does not say what eval/results says; run python eval/tables.py")
        if not args.check:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
