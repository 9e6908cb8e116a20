"""Several processes that answer on one socket, each with the model mapped from the same files.

A worker that ends is replaced. When another model is saved in the directory, or on SIGHUP, the workers are
exchanged one by one: a new one has answered its first request before the old one stops taking any.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from llmrec.errors import LLMRecError, ModelError
from llmrec.persistence import manifest_of
from llmrec.recommender import Recommender
from llmrec.saved import model_of
from llmrec.serve import GRACE_SECONDS, create_app, run_app
from llmrec.serve.config import ServeConfig

READY_SECONDS = 600
"""How long a worker may take to load the model and to answer its first request."""

LOOK_SECONDS = 0.5
"""How often the workers and the directory are looked at."""

AGAIN_SECONDS = 30
"""How long to wait, at most, before a worker that does not start is started again."""


@dataclass(frozen=True)
class Job:
    """What every worker serves.

    Parameters
    ----------
    model
        Directory of a saved recommender.
    store, index
        URLs of the servers for events and vectors; see `Recommender.load`.
    counted
        Folder in which the workers leave what they count.
    """

    model: Path
    settings: ServeConfig
    store: str | None = None
    index: str | None = None
    counted: Path | None = None


def load(job: Job) -> Recommender:
    """Load the recommender with the adapters that the settings name."""
    rec = Recommender.load(job.model, store=job.store, index=job.index)
    try:
        for name, adapter in job.settings.adapters.items():
            rec.add_adapter(name, adapter.folder, adapter.weight)
    except BaseException:
        rec.close()
        raise
    return rec


def work(job: Job, listening: socket.socket, told: Connection) -> None:
    """Serve in this process; send "" once the first request is answered, or what is wrong."""
    # Ctrl-C reaches all processes; the parent passes its wish on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        rec = load(job)
        app = create_app(rec, job.settings, counted=job.counted)
        app.state.service.warm_up()
    except LLMRecError as error:
        told.send(str(error))
        return
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")
        raise
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, end)
    told.send("")
    try:
        run_app(app, listening)
    finally:
        rec.close()


def end(number: int, frame: FrameType | None) -> None:
    """As a handler of a signal: end this process so that what is to be done last is done."""
    raise SystemExit(0)


def _end_with_parent() -> None:
    """Ask this process to end once the one that started it is gone, even by a kill."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Worker:
    """One process, and the pipe on which it says that it is ready."""

    def __init__(self, job: Job, listening: socket.socket) -> None:
        context = multiprocessing.get_context("spawn")
        self._told, sent = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=work, args=(job, listening, sent))
        self.process.start()
        sent.close()

    def wait(self, until: Callable[[], bool]) -> str:
        """Wait until it is ready and return ""; else what is wrong. Given up when `until` says so."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and not until():
            try:
                if self._told.poll(0.1):
                    return str(self._told.recv())
            except EOFError:
                self.process.join()
                return f"the worker ended with {self.process.exitcode}"
        return f"the worker was not ready within {READY_SECONDS} s"

    def end(self) -> None:
        """Let it finish what is under way, and end it."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(GRACE_SECONDS + 10)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class Workers:
    """Keeps so many workers running; `run` returns when SIGINT or SIGTERM comes.

    Parameters
    ----------
    say
        Told what happens, for people.
    """

    def __init__(self, job: Job, listening: socket.socket, say: Callable[[str], None]) -> None:
        self._job, self._listening, self._say = job, listening, say
        self._workers: list[_Worker] = []
        self._ending = threading.Event()
        self._asked = threading.Event()
        self._model = ""

    def run(self, ready: Callable[[], None]) -> None:
        """Start, call `ready` once all can answer, and look after them.

        Raises
        ------
        ModelError
            If the first workers do not start.
        """
        before = {
            number: signal.signal(number, lambda *_: self._ending.set())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        signal.signal(signal.SIGHUP, lambda *_: self._asked.set())
        with tempfile.TemporaryDirectory(prefix="llmrec-serve-") as folder:
            self._job = replace(self._job, counted=Path(folder))
            try:
                if self._job.store or self._job.index:
                    # What is moved or written there first is moved once.
                    Recommender.load(self._job.model, store=self._job.store, index=self._job.index).close()
                self._model = model_of(manifest_of(self._job.model))
                self._workers = [self._start() for _ in range(self._job.settings.workers)]
                for worker in self._workers:
                    wrong = worker.wait(self._ending.is_set)
                    if wrong and not self._ending.is_set():
                        raise ModelError(wrong)
                if not self._ending.is_set():
                    ready()
                self._look_after()
            finally:
                for worker in self._workers:
                    worker.process.terminate()
                for worker in self._workers:
                    worker.end()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _start(self) -> _Worker:
        return _Worker(self._job, self._listening)

    def _look_after(self) -> None:
        pause = 1.0
        while not self._ending.wait(LOOK_SECONDS):
            for i, worker in enumerate(self._workers):
                if not worker.process.is_alive() and not self._ending.is_set():
                    self._say(f"a worker ended with {worker.process.exitcode}; another one is started")
                    if self._exchange(i):
                        self._say("the new worker answers")
                        pause = 1.0
                    else:
                        pause = min(2 * pause, AGAIN_SECONDS)
                        self._ending.wait(pause)
            model = model_of(manifest_of(self._job.model))
            if self._asked.is_set() or (model and model != self._model):
                self._asked.clear()
                # One that does not start is not tried again until the next one is saved.
                self._model = model
                self._swap()

    def _swap(self) -> None:
        self._say("taking over the model that was saved")
        done = 0
        for i in range(len(self._workers)):
            if not self._exchange(i):
                break
            done += 1
        if done == len(self._workers):
            self._say("all workers have it")
        elif done:
            # It starts: what kept one from starting may pass, and nobody is to be answered by two models.
            self._say(f"{done} of {len(self._workers)} workers have it; trying again")
            self._ending.wait(AGAIN_SECONDS)
            self._asked.set()

    def _exchange(self, i: int) -> bool:
        """Put a new worker in the place of one; the old one goes on if that does not start."""
        made = self._start()
        wrong = made.wait(self._ending.is_set)
        if wrong:
            made.end()
            if not self._ending.is_set():
                self._say(f"a worker does not start: {wrong}")
            return False
        old, self._workers[i] = self._workers[i], made
        old.end()
        return True
