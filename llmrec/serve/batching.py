"""Requests that arrive together are answered together, and no more are taken than can be answered."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llmrec.errors import OverloadError, RequestError
from llmrec.timing import Timing

Q = TypeVar("Q")
A = TypeVar("A")

CLOSED = "the service is stopping and takes no more requests; try again in a moment"


class Load:
    """Counts what is under way and how long that will take; refuses what is beyond a limit. Thread-safe.

    Parameters
    ----------
    limit
        How many may be under way, waiting ones included.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending = 0
        self.timing = Timing()
        self._units = 0
        self._lock = threading.Lock()

    def expected(self, units: int = 1) -> float:
        """Seconds until one more of so many units would be finished; 0 before anything was measured."""
        return self.timing.estimate(self._units + units, idle=self.pending == 0) or 0.0

    def enter(self, units: int = 1) -> None:
        """Take one more, which costs as much as `units` plain ones.

        Raises
        ------
        OverloadError
            If as many as the limit are under way.
        """
        with self._lock:
            if self.pending >= self.limit:
                seconds = max(1, math.ceil(self.expected()))
                raise OverloadError(
                    f"{self.pending} requests are waiting and no more are taken; try again in {seconds} s",
                    seconds,
                )
            self.pending += 1
            self._units += units

    def leave(self, count: int, seconds: float | None = None, units: int | None = None) -> None:
        """Note that some are done; `seconds` is how long they took together, None says nothing."""
        units = count if units is None else units
        with self._lock:
            self.pending -= count
            self._units -= units
        if seconds is not None and count:
            self.timing.note(units, seconds)


@dataclass(frozen=True, slots=True)
class _Job(Generic[Q, A]):
    request: Q
    units: int = 1
    future: Future[A] = field(default_factory=Future)


class Batcher(Generic[Q, A]):
    """Gathers requests for a moment and has one thread answer them as a batch.

    Parameters
    ----------
    answer
        Returns one answer for each request, in their order. Where it raises a `RequestError` the batch is
        halved until the requests that cannot be answered stand alone: only they get the error.
    batch
        Most requests that are answered at once.
    wait
        Seconds that the first request waits for others.
    limit
        Most requests that are under way.
    """

    def __init__(
        self, answer: Callable[[Sequence[Q]], Sequence[A]], *, batch: int, wait: float, limit: int
    ) -> None:
        self.load = Load(limit)
        self._answer, self._batch, self._wait = answer, batch, wait
        self._waiting: queue.SimpleQueue[_Job[Q, A] | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="llmrec-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Q, units: int = 1) -> Future[A]:
        """Return the answer to come; `units` says how many plain requests it costs as much as.

        Raises
        ------
        OverloadError
            If too many requests are under way, or the batcher is closed.
        """
        job: _Job[Q, A] = _Job(request, units)
        with self._closing:
            if self._closed:
                raise OverloadError(CLOSED)
            self.load.enter(units)
            self._waiting.put(job)
        return job.future

    def close(self) -> None:
        """Answer what is waiting, then end the thread."""
        with self._closing:
            closed, self._closed = self._closed, True
        if not closed:
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            job = self._waiting.get()
            if job is None:
                return
            jobs = [job]
            until = time.monotonic() + self._wait
            while len(jobs) < self._batch:
                try:
                    job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if job is None:
                    ended = True
                    break
                jobs.append(job)
            began = time.monotonic()
            asked = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            answered = self._settle(asked) if asked else False
            units = sum(job.units for job in jobs)
            self.load.leave(len(jobs), time.monotonic() - began if answered else None, units)

    def _settle(self, jobs: Sequence[_Job[Q, A]]) -> bool:
        """Answer all; return whether the first attempt succeeded, so that its time means something."""
        try:
            answers = self._answer([job.request for job in jobs])
        except RequestError as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                self._settle(jobs[: len(jobs) // 2])
                self._settle(jobs[len(jobs) // 2 :])
            return False
        except Exception as error:  # whatever it is, those who wait must hear of it
            for job in jobs:
                job.future.set_exception(error)
            return False
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)
        return True


class Pool:
    """Threads for calls that are not batched; as many may wait as the limit says.

    Parameters
    ----------
    workers
        Threads.
    limit
        Most calls that are under way.
    """

    def __init__(self, workers: int, limit: int) -> None:
        self.load = Load(limit)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="llmrec-worker")

    def submit(self, call: Callable[..., A], *arguments: Any) -> Future[A]:
        """Return the result to come; OverloadError if too many calls are under way."""
        self.load.enter()
        try:
            future = self._threads.submit(self._timed, call, *arguments)
        except RuntimeError:
            self.load.leave(1)
            raise OverloadError(CLOSED) from None
        # A call that is cancelled while it waits never runs.
        future.add_done_callback(lambda done: self.load.leave(int(done.cancelled())))
        return future

    def close(self) -> None:
        """Finish what is under way."""
        self._threads.shutdown()

    def _timed(self, call: Callable[..., A], *arguments: Any) -> A:
        began = time.monotonic()
        try:
            return call(*arguments)
        finally:
            self.load.leave(1, time.monotonic() - began)
