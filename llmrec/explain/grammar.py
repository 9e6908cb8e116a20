"""Which tokens a language model may write next, so that its sentence names nothing but given facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PLAIN = -1
"""Stands for a word that is no fact."""


@dataclass(slots=True)
class _Node:
    """A place in the tree of everything that may be written whole."""

    children: dict[int, int] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Place:
    """A way to read what was written: a place in the tree, and the facts that were named before."""

    node: int
    named: frozenset[int]


class Grammar:
    """Sentences of plain words and facts in any order, each fact at most once, with evidence among them.

    Parameters
    ----------
    plain
        Tokens of each word that names nothing.
    facts
        Tokens of each fact in each spelling, with a number that the spellings of one fact share.
    evidence
        Numbers of the facts of which a sentence has to name one.
    stops
        Tokens that end a sentence.
    """

    def __init__(
        self,
        plain: Sequence[Sequence[int]],
        facts: Sequence[tuple[int, Sequence[int]]],
        evidence: Sequence[int],
        stops: Sequence[int],
    ) -> None:
        self._nodes = [_Node()]
        self._evidence, self._stops = frozenset(evidence), tuple(stops)
        self._read: dict[tuple[int, ...], frozenset[_Place]] = {(): frozenset({_Place(0, frozenset())})}
        for tokens in plain:
            self._add(tokens, PLAIN)
        for number, tokens in facts:
            self._add(tokens, number)

    def _add(self, tokens: Sequence[int], number: int) -> None:
        if not tokens:
            return
        node = self._nodes[0]
        for token in tokens:
            if token not in node.children:
                node.children[token] = len(self._nodes)
                self._nodes.append(_Node())
            node = self._nodes[node.children[token]]
        node.ends.add(number)

    def next(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow; none where the sentence has ended or cannot be read."""
        allowed: set[int] = set()
        for place in self._places(tuple(written)):
            allowed.update(self._nodes[place.node].children)
            for named in self._ended(place):
                allowed.update(self._nodes[0].children)
                if named & self._evidence:
                    allowed.update(self._stops)
        return sorted(allowed)

    def _places(self, written: tuple[int, ...]) -> frozenset[_Place]:
        known = self._read.get(written)
        if known is not None:
            return known
        *before, token = written
        reached: set[_Place] = set()
        for place in self._places(tuple(before)):
            starts = [_Place(0, named) for named in self._ended(place)]
            for at in [place, *starts]:
                child = self._nodes[at.node].children.get(token)
                if child is not None:
                    reached.add(_Place(child, at.named))
        self._read[written] = found = frozenset(reached)
        return found

    def _ended(self, place: _Place) -> list[frozenset[int]]:
        """What was named in all, for each word or fact that ends here and was not named before."""
        return [
            place.named if number == PLAIN else place.named | {number}
            for number in self._nodes[place.node].ends
            if number == PLAIN or number not in place.named
        ]
