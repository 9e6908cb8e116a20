"""The tables of eval/speed.py: how long candidates take, beside other ways to ask the same model."""

from __future__ import annotations

from typing import Any


def speed(found: dict[str, Any], *, short: bool) -> str:
    """One table a precision and number of candidates; in short the first of them alone."""
    machine = ", ".join(filter(None, (found["environment"].get(key) for key in ("machine", "instructions"))))
    lines = [
        f"`{found['command']}`: {found['base']} after {found['history']} items of {found['data']} "
        f"({found['items']:,} items), {machine}, {found['threads']} threads. All "
        "systems answer a request before the next one, slow ones only the first; a ratio is the median over "
        "the requests that both answer; of less than twenty requests, p95 is about the slowest. The limit is "
        "the time of the products that a system needs.",
    ]
    kinds = dict.fromkeys((row["precision"], row["candidates"]) for row in found["systems"])
    for precision, candidates in list(kinds)[: 1 if short else None]:
        lines += [
            "",
            f"| {precision}, {candidates} candidates | median, ms | p95, ms | requests "
            "| times as fast as the CrossEncoder | positions read | share of the limit | memory, MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in found["systems"]:
            if (row["precision"], row["candidates"]) == (precision, candidates):
                share = f"{row['share_of_limit']:.2f}" if row["positions"] else ""
                # What another process reads and holds was not looked at.
                # Of an answer that was kept nothing is computed: that is no speed.
                ratio = f"{row['times_as_fast_as_cross_encoder']:,.1f}" if row["positions"] != 0 else "kept"
                read, held = ("" if row[k] is None else f"{row[k]:,}" for k in ("positions", "memory_mb"))
                lines.append(
                    f"| {row['system']} | {row['median_ms']:,.1f} | {row['p95_ms']:,.1f} | {row['requests']} "
                    f"| {ratio} | {read} | {share} | {held} |"
                )
    return "\n".join(lines)
