"""Whether the language model pays, in words: what the report begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.candidates import LM, Weights

METRIC = "ndcg@10"
NAMES = {
    "merge": "retrieval (merge)",
    LM: "language model alone",
    "default": "as served",
    "popularity": "popularity",
    "bm25": "words alone (BM25)",
    "text": "meaning alone (text vectors)",
}


def name_of(system: str) -> str:
    """What a system is called on the page."""
    if system.startswith(f"{LM}_top"):
        return f"language model, top {system.removeprefix(f'{LM}_top')}"
    return NAMES.get(system, system)


def lm_weight(result: Mapping[str, Any]) -> float:
    """The most that the language model counts in lists by history."""
    return Weights.from_dict(result["recipe"]["history"]).most_lm


def _compared(result: Mapping[str, Any], a: str, metric: str = METRIC) -> Mapping[str, Any] | None:
    found = (c for c in result["comparisons"] if (c["a"], c["b"], c["metric"]) == (a, "merge", metric))
    return next(found, None)


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}"


def answer(result: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    served = _compared(result, "default")
    if not result["training"] or served is None:
        return (
            '<p class="answer">No language model took part in this run. '
            "Evaluate without <code>--no-lm</code> to learn whether one pays on this log.</p>"
        )
    low, high = served["ci95"]
    gain = f"NDCG@10 {signed(served['difference'])} [{signed(low)}, {signed(high)}]"
    minutes = seconds_trained(result["training"]) / 60
    if result["protocol"].get("part") == "validation":
        words = (
            f"<b>Not judged.</b> Settings and weights were chosen on these very events; on them the "
            f"difference is {gain}, an upper estimate. Evaluate on the test events for an answer."
        )
    elif lm_weight(result) == 0:
        words = (
            f"<b>No, not after {minutes:.0f} minutes of training.</b> On held-out events it added nothing "
            "that exceeds noise for lists by history, so its weight is 0 there: it is left out, and what is "
            "served is retrieval alone."
        )
    elif (low > 0 or high < 0) and served.get("verdict", ""):
        words = (
            f"<b>Not shown.</b> Validation gave it a weight; on these events the difference is {gain}, which "
            "is not shown among all comparisons of this run."
        )
    elif low > 0:
        words = f"<b>Yes.</b> What is served beats retrieval alone: {gain}."
    elif high < 0:
        words = (
            f"<b>No.</b> Validation gave it a weight, but on these events it costs quality: {gain}. "
            "Leave it out, or train it longer and evaluate again."
        )
    else:
        words = (
            f"<b>Not shown.</b> Validation gave it a weight, and on these events the difference is within "
            f"noise: {gain}."
        )
    words += _against_one(result)
    if result["protocol"].get("part") != "validation":
        words += _typed(result)
    good = "yes" if words.startswith("<b>Yes") else ""
    return f'<p class="answer {good}" id="answer">{words}</p>'


def _against_one(result: Mapping[str, Any]) -> str:
    """What is served against the retriever that was best alone."""
    found = [
        c for c in result["comparisons"] if c["a"] == "default" and c["b"] not in ("merge", "popularity")
    ]
    told = ", ".join(
        f"{c['metric']} {signed(c['difference'])} [{signed(c['ci95'][0])}, {signed(c['ci95'][1])}]"
        f"{c.get('verdict', '')}"
        for c in found
    )
    return f" Against {name_of(found[0]['b'])} alone: {told}." if found else ""


def seconds_trained(training: Mapping[str, Any]) -> float:
    """Seconds that all language models of a run were trained for."""
    return float(training["seconds"] + sum(more["seconds"] for more in training.get("beside", ())))


def _typed(result: Mapping[str, Any]) -> str:
    """What the model brings where words are typed, if it has a weight there."""
    if not Weights.from_dict(result["recipe"]["query"]).most_lm:
        return ""
    told = []
    for kind, what in (
        ("known_item", "known items are found"),
        ("anybody", "known items of people without a history"),
        ("attribute", "values of attributes"),
    ):
        found = result["search"].get(kind)
        if found and found["systems"]:
            served, plain = (found["systems"][name][METRIC] for name in ("default", "merge"))
            told.append(f"{what} at NDCG@10 {served:.4f}, and at {plain:.4f} without it{interval(found)}")
    return f" Where words are typed it takes part: {'; '.join(told)}."


def interval(found: Mapping[str, Any]) -> str:
    """Interval of the difference, if there is one."""
    for c in found.get("comparisons", ()):
        low, high = c["ci95"]
        return f" ({signed(c['difference'])} [{signed(low)}, {signed(high)}]{c['verdict']})"
    return ""
