"""What each component looks at, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """One component.

    Parameters
    ----------
    clause
        What it found, as a clause about the item.
    alone
        A sentence for an item that nothing else speaks for; empty where the component only ever speaks
        together with items of the history or words of the query.
    """

    clause: str
    alone: str = ""


_ALIKE = Meaning("chosen by people whose histories are alike")
_ORDER = Meaning("what people chose next after such a history")
MEANINGS = {
    "again": Meaning("this person chose it before, and people here choose the same again"),
    "als": _ALIKE,
    "bm25": Meaning("words of the wish are in its text"),
    "caser": _ORDER,
    "ease": Meaning("chosen together with items of the history, or described like those that are"),
    "gru4rec": _ORDER,
    "lightgcn": _ALIKE,
    "lm": Meaning("the language model, having read the history, expects it"),
    "nearest": Meaning("its text is like that of an item of the history"),
    "popularity": Meaning("how many chose it", "Popular with others."),
    "profile": Meaning("its text is like those of the history"),
    "recent": Meaning("how many chose it of late", "Popular of late."),
    "sasrec": _ORDER,
    "text": Meaning("its text means what the wish says", "Close in meaning to your words."),
    "topics": Meaning("its topics are those of the history"),
    "transitions": Meaning("often chosen close to the latest items of the history"),
    "trending": Meaning("how much more it was chosen of late", "On the rise."),
}
"""By the name of the component."""
