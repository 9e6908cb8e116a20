"""Which tokens a language model may write next, so that its sentence is one of those that are true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A way to read what was written: how much of which option of which slot of which pattern."""

    pattern: int
    slot: int
    option: Tokens = ()
    read: int = 0
    used: frozenset[Tokens] = frozenset()


class Grammar:
    """Sentences that follow one of some patterns: a choice of options for each slot, no option twice.

    Parameters
    ----------
    patterns
        For each pattern its slots, for each slot its options in tokens; an empty option leaves the slot out.
    """

    def __init__(self, patterns: Sequence[Sequence[Sequence[Sequence[int]]]]) -> None:
        self._patterns = [[[tuple(option) for option in slot] for slot in pattern] for pattern in patterns]
        begun = {place for number in range(len(patterns)) for place in self._options(_Place(number, 0))}
        self._read: dict[Tokens, frozenset[_Place]] = {(): frozenset(begun)}

    def next(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow; none where a sentence has ended, or nothing begins like this."""
        return sorted({place.option[place.read] for place in self._places(tuple(written)) if place.option})

    def ended(self, written: Sequence[int]) -> bool:
        """Whether this is a whole sentence."""
        return any(not place.option for place in self._places(tuple(written)))

    def _places(self, written: Tokens) -> frozenset[_Place]:
        if written not in self._read:
            token = written[-1]
            reached: set[_Place] = set()
            for place in self._places(written[:-1]):
                if not place.option or place.option[place.read] != token:
                    continue
                if place.read + 1 < len(place.option):
                    reached.add(_Place(place.pattern, place.slot, place.option, place.read + 1, place.used))
                else:
                    used = place.used | {place.option}
                    reached.update(self._options(_Place(place.pattern, place.slot + 1, used=used)))
            self._read[written] = frozenset(reached)
        return self._read[written]

    def _options(self, place: _Place) -> Iterator[_Place]:
        """The ways to go on at the beginning of a slot; a place without option where there is none left."""
        slots = self._patterns[place.pattern]
        if place.slot == len(slots):
            yield place
            return
        for option in slots[place.slot]:
            if not option:
                yield from self._options(_Place(place.pattern, place.slot + 1, used=place.used))
            elif option not in place.used:
                yield _Place(place.pattern, place.slot, option, 0, place.used)
