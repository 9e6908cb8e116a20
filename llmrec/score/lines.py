"""The lines of a catalogue in tokens, in two flat arrays: a million of them are no million lists."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TokenLines(Sequence[list[int]]):
    """Tokens of lines by code.

    Parameters
    ----------
    tokens
        Those of all lines, one after another, int32, shape (tokens,).
    offsets
        Line i is ``tokens[offsets[i]:offsets[i + 1]]``; int64, shape (lines + 1,).
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, lines: Iterable[Sequence[int]]) -> TokenLines:
        """Pack lines; each is let go of once it is packed."""
        tokens, offsets = array.array("i"), array.array("q", [0])
        for line in lines:
            tokens.extend(line)
            offsets.append(len(tokens))
        return cls(np.array(tokens, np.int32), np.array(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, code: int) -> list[int]: ...
    @overload
    def __getitem__(self, code: slice) -> list[list[int]]: ...
    def __getitem__(self, code: int | slice) -> list[int] | list[list[int]]:
        if isinstance(code, slice):
            return [self[i] for i in range(*code.indices(len(self)))]
        if not -len(self) <= code < len(self):
            raise IndexError(f"line {code} of {len(self)}")
        place = code % len(self)
        line: list[int] = self.tokens[self.offsets[place] : self.offsets[place + 1]].tolist()
        return line

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each line, shape (lines,)."""
        lengths: NDArray[np.int64] = np.diff(self.offsets)
        return lengths

    def table(self, end: int) -> NDArray[np.int32]:
        """All lines, each with its end, as rows padded with -1: shape (lines, longest + 1)."""
        lengths = self.lengths()
        table = np.full((len(self), int(lengths.max(initial=0)) + 1), -1, np.int32)
        inside = np.arange(table.shape[1]) < lengths[:, None]
        table[inside] = self.tokens
        table[np.arange(len(self)), lengths] = end
        return table

    def changed(self, codes: Sequence[int], lines: Iterable[Sequence[int]], total: int) -> TokenLines:
        """The same with other lines at some codes, in a catalogue of `total` items; what is new is empty."""
        fresh = dict(zip(codes, lines, strict=True))
        lengths = np.pad(self.lengths(), (0, total - len(self)))
        for code, line in fresh.items():
            lengths[code] = len(line)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.empty(offsets[-1], np.int32)
        # What lies between two changed lines is copied in one piece.
        at = 0
        for code in [*sorted(fresh), total]:
            low, high = (int(self.offsets[min(i, len(self))]) for i in (at, code))
            tokens[offsets[at] : offsets[at] + high - low] = self.tokens[low:high]
            if code < total:
                tokens[offsets[code] : offsets[code + 1]] = fresh[code]
            at = code + 1
        return TokenLines(tokens, offsets)
