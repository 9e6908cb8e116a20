"""The report: one HTML page that says whether the language model pays, for whom, and at what cost.

A pure function of a results dictionary and some examples. The page needs no network and no script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmrec.candidates import LM, Weights
from llmrec.evaluation.charts import Bar, bars, curve, intervals
from llmrec.evaluation.insight import Example
from llmrec.evaluation.verdict import METRIC, answer, interval, lm_weight, name_of, seconds_trained, signed

MEASURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "recall@20")
BEYOND = {
    "coverage@10": "share of the catalogue that is shown to anybody",
    "gini@10": "how unevenly items are shown: 0 alike, 1 one item alone",
    "novelty@10": "bits of surprise an item, by its popularity",
    "diversity@10": "how unlike each other the items of a list are, by text",
    "serendipity@10": "right, and not what popularity would have shown",
    "popularity_lift@10": "how much more popular than the history: 0.5 is half more",
    "miscalibration@10": "how far the mix of groups is from that of the history",
}


def render(result: Mapping[str, Any], examples: Sequence[Example] = (), command: str = "") -> str:
    """The page of one evaluation.

    Parameters
    ----------
    result
        What `llmrec.offline.evaluate` measured.
    examples
        Users side by side; titles are shown, no user ids.
    command
        The command that made the result.
    """
    sections = [
        answer(result),
        _systems(result),
        _costs(result),
        _ceiling(result),
        _segments(result),
        _search(result),
        _order(result),
        _beyond(result),
        _lean(result),
        _probabilities(result),
        _examples(examples),
        _protocol(result, command),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    data = result["dataset"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Does the language model pay?</title>"
        f"<style>{style}</style></head><body><header>"
        "<h1>Does the language model pay?</h1>"
        f'<p class="soft">{data["users"]:,} users, {data["items"]:,} items, {data["events"]:,} events; '
        f"{_words(result['protocol'])}</p></header><main>{''.join(sections)}</main></body></html>\n"
    )


def _words(protocol: Mapping[str, Any]) -> str:
    seen = f"seen items {protocol['seen_items']}"
    ranking = protocol["ranking"] if protocol.get("comparable", True) else protocol["ranking"].upper()
    return escape(
        f"{protocol['part']} events, {protocol['split']}, {protocol['users']:,} users, {ranking}, {seen}"
    )


def _systems(result: Mapping[str, Any]) -> str:
    systems = result["systems"]
    shown = [n for n in systems if n not in ("merge", "default", LM) and not n.startswith(f"{LM}_top")]
    order = [*shown, *(n for n in systems if n not in shown)]
    rows = [
        Bar(name_of(n), systems[n][METRIC], f"{systems[n][METRIC]:.4f}", strong=n == "default") for n in order
    ]
    compared = [
        Bar(
            f"{name_of(c['a'])}",
            c["difference"],
            signed(c["difference"]),
            c["ci95"][0],
            c["ci95"][1],
            strong=c["a"] == "default",
        )
        for c in result["comparisons"]
        if c["metric"] == METRIC and c["b"] == "merge"
    ]
    drawn = "<h3>NDCG@10 less that of retrieval, with 95 % interval over users</h3>" if compared else ""
    return (
        "<h2>Every stage, full list</h2><h3>NDCG@10</h3>"
        + bars(rows, "NDCG@10 of every system")
        + (drawn + intervals(compared, "Differences to retrieval") if compared else "")
        + _table(("", *MEASURES), ((name_of(n), *(f"{systems[n][m]:.4f}" for m in MEASURES)) for n in order))
    )


def _costs(result: Mapping[str, Any]) -> str:
    latency = result["latency"]
    rows = []
    for name, label in (("merge", "retrieval"), ("blend", "with the language model")):
        timed = latency.get(name)
        if not timed:
            continue
        single, batch = timed["single_seconds"], timed["batch32_seconds_per_request"]
        rows.append(
            (
                label,
                f"{1000 * single:.1f}",
                f"{1000 * timed['repeated_seconds']:.1f}",
                f"{1000 * batch:.1f}",
                f"{1000 * single:.0f} s / {1000 * batch:.0f} s",
            )
        )
    training = result["training"]
    further = training.get("beside", ())
    trained = (
        f"<p>Training took {seconds_trained(training) / 60:.1f} minutes"
        + "".join(f", {escape(more['mode'])} beside the first model among them" for more in further)
        + f" ({training['events_per_second']:,.0f} events a second)"
        + (
            f", and ended early, since {escape(training.get('reason') or 'it began to learn by heart')}"
            if training.get("early")
            else ""
        )
        + ".</p>"
        if training
        else ""
    )
    told = (result["environment"].get(key) for key in ("machine", "instructions"))
    machine = escape(", ".join(filter(None, told)))
    return (
        "<h2>What it costs</h2>"
        + _table(
            (
                f"a request with {latency.get('history_items', 20):.0f} history items",
                "new, ms",
                "asked again, ms",
                "in a batch of 32, ms",
                "1,000",
            ),
            rows,
        )
        + trained
        + f'<p class="soft">{machine}; the whole run held {result["peak_memory_mb"]:,} MB at most.</p>'
    )


def _ceiling(result: Mapping[str, Any]) -> str:
    found = result.get("ceiling")
    if not found:
        return ""
    rows = [Bar(f"first {k}", share, f"{100 * share:.1f} %") for k, share in found.items()]
    return (
        "<h2>What is the ceiling?</h2><p>Share of users whose target is among the first candidates of "
        "retrieval: a reranker of so many can reach no more.</p>"
        + bars(rows, "Share of users whose target is found")
    )


def _segments(result: Mapping[str, Any]) -> str:
    masks = result["segments"]
    systems = [n for n in ("merge", LM, "default") if n in result["systems"]]
    rows = (
        (name, f"{of['users']:,}", *(f"{of['systems'][n][METRIC]:.4f}" for n in systems))
        for name, of in masks.items()
    )
    found = result.get("segment_differences", {})
    parts = []
    for a, by in found.items():
        if a == "default" and not lm_weight(result):
            continue
        drawn = [Bar(name, d["difference"], signed(d["difference"]), *d["ci95"]) for name, d in by.items()]
        parts.append(
            f"<h3>NDCG@10 of {name_of(a)} less that of retrieval</h3>" + intervals(drawn, name_of(a))
        )
    return (
        "<h2>For whom?</h2><p>By length of history, and by how popular the item is that came next. Intervals "
        "are not corrected for the number of segments.</p>"
        + "".join(parts)
        + _table(("NDCG@10", "users", *(name_of(n) for n in systems)), rows)
    )


SEARCHES = {
    "known_item": ("A known item is sought", "Two or three words of the item that was chosen next."),
    "anybody": ("A known item is sought without a history", "The same words, of somebody not known."),
    "attribute": ("A value of an attribute is typed", "All items that have it are right."),
}
"""Kinds of typed queries: what happens, and what counts."""


def _search(result: Mapping[str, Any]) -> str:
    blocks = []
    for kind, (title, told) in SEARCHES.items():
        found = result["search"].get(kind)
        if not found or not found["systems"]:
            continue
        queries = f" {found['queries']:,} queries." if "queries" in found else ""
        rows = [
            Bar(name_of(n), values[METRIC], f"{values[METRIC]:.4f}", strong=n == "default")
            for n, values in found["systems"].items()
        ]
        tested = interval(found)
        blocks.append(
            f"<h3>{title}, NDCG@10</h3><p>{told}{queries}"
            + (f" What is served less retrieval:{tested}." if tested else "")
            + "</p>"
            + bars(rows, f"NDCG@10, {title.lower()}")
        )
    return "<h2>When words are typed</h2>" + "".join(blocks) if blocks else ""


def _order(result: Mapping[str, Any]) -> str:
    found = result.get("order_bias")
    if not found or not found["users"]:
        return ""
    words = (
        "No order bias: scores are the same in every order"
        if found["largest_change"] < 1e-3
        else f"Another candidate comes first in {100 * found['top_changes']:.1f} % of the orders"
    )
    return (
        f"<h2>Does the order of candidates matter?</h2><p>{words}. {found['users']:,} users, "
        f"{found['candidates']} candidates, {found['orders']} random orders each; the largest change of a "
        f"score is {found['largest_change']:.2g}.</p>"
    )


def _beyond(result: Mapping[str, Any]) -> str:
    beyond = result["beyond"]
    systems = [n for n in ("popularity", "merge", LM, "default") if n in beyond]
    measures = [m for m in BEYOND if m in next(iter(beyond.values()))]
    rows = ((m, *(f"{beyond[n][m]:.3f}" for n in systems)) for m in measures)
    meanings = "".join(f"<li>{m}: {BEYOND[m]}</li>" for m in measures)
    return (
        "<h2>Besides being right</h2>"
        + _table(("first ten", *(name_of(n) for n in systems)), rows)
        + f'<ul class="soft">{meanings}</ul>'
    )


def _lean(result: Mapping[str, Any]) -> str:
    """Weights of the blend by length of history."""
    weights = Weights.from_dict(result["recipe"]["history"])
    segments = [(0, weights), *weights.longer]
    used = sorted({n for _, w in segments for of in (w.retrievers, w.found, w.rank) for n in of})
    if any(w.lm for _, w in segments) and LM not in used:
        used.append(LM)

    def cell(w: Weights, n: str) -> str:
        score = w.lm if n == LM else w.retrievers.get(n, 0.0)
        return " / ".join(f"{v:.2f}" for v in (score, w.found.get(n, 0.0), w.rank.get(n, 0.0)))

    rows = [(f"{least}+ items", *(cell(w, n) for n in used)) for least, w in segments]
    return (
        "<h2>What the blend leans on</h2><p>Weight of the score, of having proposed an item, and of its "
        "rank, by length of history; chosen on validation events.</p>"
        + _table(("history", *(name_of(n) for n in used)), rows)
    )


def _probabilities(result: Mapping[str, Any]) -> str:
    found = result["probabilities"]
    if not found:
        return ""
    measures = ("nats", "brier", "calibration_error")
    rows = ((name_of(n), *(f"{values[m]:.4f}" for m in measures)) for n, values in found.items())
    drawn = ""
    if "default" in result["reliability"]:
        points = [(float(x), float(y)) for x, y in result["reliability"]["default"]]
        drawn = curve(points, "Reliability of what is served", "said", "came true")
    return (
        "<h2>Are the probabilities true?</h2><p>Of the item that is most probable to come next: how sure, "
        "and how often right.</p>"
        + drawn
        + _table(("", "log-loss, nats", "Brier", "calibration error"), rows)
    )


def _examples(found: Sequence[Example]) -> str:
    if not found:
        return ""
    blocks = []
    for number, one in enumerate(found, start=1):
        systems = list(one.lists)
        longest = max((len(one.lists[n]) for n in systems), default=0)

        def shown(title: str, target: str = one.target) -> str:
            return f"<mark>{escape(title)}</mark>" if title == target else escape(title)

        head = "".join(
            f"<th>{escape(name_of(n))}<br>target at {one.ranks[n] or 'none of 100'}</th>" for n in systems
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td class="text">{shown(one.lists[n][i]) if i < len(one.lists[n]) else ""}</td>'
                for n in systems
            )
            + "</tr>"
            for i in range(longest)
        )
        history = "; ".join(escape(title) for title in one.history)
        blocks.append(
            f"<details{' open' if number == 1 else ''}><summary>User {number}: then came "
            f"<mark>{escape(one.target)}</mark></summary><p>{history}</p>"
            f'<div class="wide"><table><tr>{head}</tr>{body}</table></div></details>'
        )
    return f"<h2>{len(blocks)} users, side by side</h2><p>Drawn at random, not chosen.</p>" + "".join(blocks)


def _protocol(result: Mapping[str, Any], command: str) -> str:
    shown = {
        "command": command,
        "protocol": result["protocol"],
        "dataset": result["dataset"],
        "leaks": result["leaks"],
        "seconds": result["seconds"],
        "environment": result["environment"],
        "config": result["config"],
    }
    rows = "".join(
        f"<details><summary>{name}</summary><p><code>"
        f"{escape(value if isinstance(value, str) else json.dumps(value, indent=1))}</code></p></details>"
        for name, value in shown.items()
        if value
    )
    checked = escape(", ".join(result["leaks"]["checked"]))
    unchecked = ", ".join(result["leaks"]["unchecked"])
    chosen = (
        "Settings and weights were chosen on the validation events that are reported here: what follows from "
        "them is an upper estimate."
        if result["protocol"].get("part") == "validation"
        else "Settings and weights were chosen on validation events; what was checked has not seen what is "
        "reported."
    )
    # These keep nothing that could be counted again, or do not say what they saw.
    left = f" Not checked: {escape(unchecked)}." if unchecked else ""
    return f"<h2>How this was measured</h2><p>{chosen} Checked in this run: {checked}.{left}</p>{rows}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'
