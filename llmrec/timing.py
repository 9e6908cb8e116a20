"""How long something will take, from how long it took."""

from __future__ import annotations

import threading
import time

HALF_LIFE = 10.0
"""Seconds in which an estimate that nothing renews falls to half, so that it is measured again."""

SMOOTHING = 0.2
"""Share of the newest measurement in the exponential average."""


class Timing:
    """Averages the time of batches by their size, in classes of 1, 2, 3 to 4, 5 to 8, ... units. Thread-safe.

    A batch has a cost of its own beside that of what is in it: a share of a large one says too little of a
    lone request. So a size is promised what its own class took; else, since a smaller batch takes no longer,
    what the next larger class took; else as many times the largest class as there are units.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._measured = 0.0
        self._lock = threading.Lock()

    def note(self, units: int, seconds: float) -> None:
        """Take in that a batch of so many units took so long."""
        size = _class_of(units)
        with self._lock:
            before = self._seconds.get(size)
            self._seconds[size] = seconds if before is None else before + SMOOTHING * (seconds - before)
            self._measured = time.monotonic()

    def estimate(self, units: int, *, idle: bool = False) -> float | None:
        """Seconds that so many units would take; None before anything was measured.

        Parameters
        ----------
        idle
            Whether nothing is under way. Then what was measured long ago counts for less: an estimate that
            keeps requests away would never be renewed otherwise.
        """
        size = _class_of(units)
        with self._lock:
            if not self._seconds:
                return None
            larger = [known for known in self._seconds if known >= size]
            known = min(larger) if larger else max(self._seconds)
            seconds = self._seconds[known] * (1.0 if larger else units / 2**known)
            age = time.monotonic() - self._measured if idle else 0.0
        return float(seconds * 0.5 ** (age / HALF_LIFE))


def _class_of(units: int) -> int:
    return (max(1, units) - 1).bit_length()
