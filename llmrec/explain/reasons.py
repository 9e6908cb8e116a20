"""From evidence to reasons: a sentence by template, which names nothing but the evidence beside it."""

from __future__ import annotations

from collections.abc import Sequence

from llmrec.candidates import READS_WORDS
from llmrec.catalog import Catalog
from llmrec.explain.evidence import influences, matched_words, shared_values
from llmrec.explain.meanings import MEANINGS
from llmrec.protocols import Codes, Floats, Mask, Query
from llmrec.types import Influence, Reason, Recommendation, Shared

COUNTED = ("popularity", "recent", "trending")
"""Components that propose items for being chosen, and every other item after those."""

MENTIONED = 2
"""Most history items that a sentence names."""

PINNED = "Pinned by the request."
_WHOLE = "Fits your history as a whole."
_NOTHING = "Nothing in particular speaks for it."


def explain(
    shown: Sequence[Recommendation],
    query: Query,
    left_out: Codes,
    changes: Floats,
    catalog: Catalog,
    chosen: Mask,
) -> list[Reason]:
    """Return a reason for each shown item.

    Parameters
    ----------
    query
        What was asked.
    left_out
        History items that were left out, one at a time, shape (m,).
    changes
        What each added to the score of each shown item, shape (m, len(shown)).
    chosen
        Whether an item was ever chosen, shape (items,).
    """
    reasons = []
    for column, one in enumerate(shown):
        code = catalog.code(one.item_id)
        history = influences(left_out, changes[:, column], one.score, catalog)
        # An item that is chosen again has itself in evidence; to say what it shares with itself says nothing.
        others = [h.item_id for h in history if h.item_id != one.item_id]
        shared = shared_values(code, catalog.codes(others).tolist(), catalog)
        reads = any(source.name in READS_WORDS and source.rank > 0 for source in one.sources)
        words = matched_words(query.text, catalog.line(code)) if reads else ()
        names = [source.name for source in one.sources]
        named = [name for name in names if chosen[code] or name not in COUNTED]
        sentence = phrase(named, words, history, shared, asked_by_history=len(query.history) > 0)
        reasons.append(Reason(sentence, history, shared, words, one.sources))
    return reasons


def phrase(
    sources: Sequence[str],
    words: Sequence[str],
    history: Sequence[Influence],
    shared: Sequence[Shared],
    *,
    asked_by_history: bool,
) -> str:
    """Return one sentence.

    Parameters
    ----------
    sources
        Names, the one that added most first.
    asked_by_history
        Whether the request had a history.
    """
    if "pin" in sources:
        return PINNED
    clauses = []
    if words:
        clauses.append(f"for your word{'s' * (len(words) > 1)} {_listed([_quoted(w) for w in words])}")
    if history:
        named = history[:MENTIONED]
        clause = f"because you chose {_listed([_quoted(h.title) for h in named])}"
        clauses.append(clause + _alike(named, shared))
    if clauses:
        whole = ", and ".join(clauses)
        return whole[0].upper() + whole[1:] + "."
    first = next(iter(sources), "")
    if first in MEANINGS and MEANINGS[first].alone:
        return MEANINGS[first].alone
    return _WHOLE if asked_by_history and first else _NOTHING


def _alike(named: Sequence[Influence], shared: Sequence[Shared]) -> str:
    """What the item shares with all that the sentence names, or else with the first of them."""
    if of_all := common(shared, named):
        return f"; like {'them' if len(named) > 1 else 'it'}: {_values(of_all)}"
    first = common(shared, named[:1])
    return f"; like {_quoted(named[0].title)}: {_values(first)}" if first else ""


def common(shared: Sequence[Shared], named: Sequence[Influence]) -> list[Shared]:
    """What the item shares with each of some history items; nothing where there are none."""
    ids = {influence.item_id for influence in named}
    return [one for one in shared if ids and ids <= set(one.item_ids)]


def value_text(shared: Shared) -> str:
    """A value as it is said."""
    return f"{shared.value:g}" if isinstance(shared.value, float) else str(shared.value)


def _values(shared: Sequence[Shared]) -> str:
    by_name: dict[str, list[str]] = {}
    for one in shared:
        by_name.setdefault(one.name, []).append(value_text(one))
    return ", ".join(f"{name} {_listed(values)}" for name, values in by_name.items())


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _quoted(text: str) -> str:
    return f'"{text}"'
