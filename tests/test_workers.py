"""`llmrec serve --workers N`: real processes, killed and exchanged while they are asked."""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llmrec import Event, Recommender
from llmrec.errors import ModelError
from llmrec.persistence import load_arrays, map_array, save_arrays
from llmrec.testing import toy_data

httpx = pytest.importorskip("httpx2")
metrics = pytest.importorskip("llmrec.serve.metrics")
workers = pytest.importorskip("llmrec.serve.workers")

CONFIG = {"encoder": {"name": "light", "dim": 16}, "retrieval": {"families": ["transitions"]}}


class Server:
    """A server in processes of its own, with what it says."""

    def __init__(self, model, workers):
        command = [sys.executable, "-m", "llmrec.cli", "serve", str(model), "--port", "0", "--workers"]
        self.process = subprocess.Popen([*command, str(workers)], stderr=subprocess.PIPE, text=True)
        self.said = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        line = self.hear("serving on")
        self.url = re.search(r"http://[\d.]+:\d+", line)[0]

    def _read(self):
        for line in self.process.stderr:
            with self._changed:
                self.said.append(line)
                self._changed.notify_all()
        with self._changed:
            self.said.append("")
            self._changed.notify_all()

    def hear(self, words, times=1):
        """Wait until it has said something so often; return the last of those lines."""

        def heard():
            return [line for line in self.said if words in line]

        with self._changed:
            assert self._changed.wait_for(lambda: len(heard()) >= times or "" in self.said, 120), self.said
        assert len(heard()) >= times, self.said
        return heard()[-1]

    def workers(self):
        found = []
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
        return found


@pytest.fixture
def model(tmp_path):
    rec = Recommender.fit(*toy_data(), CONFIG)
    rec.save(tmp_path / "model")
    rec.close()
    return tmp_path / "model"


@pytest.fixture
def serve(model):
    if not Path("/proc/self/task").exists():
        pytest.skip("the workers are found by /proc")
    servers = []

    def start(workers):
        servers.append(Server(model, workers))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()


@contextlib.contextmanager
def load(url, threads=4):
    """Requests one after another in each thread, on kept connections; yields their answers or errors."""
    ended, got = threading.Event(), []

    def ask():
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                try:
                    answer = client.post("/v1/recommend", json={"user": "u1", "k": 3})
                    got.append(answer.status_code)
                except httpx.HTTPError as error:
                    got.append(repr(error))

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield got
    finally:
        ended.set()
        for thread in running:
            thread.join()


def test_a_model_is_exchanged_under_load_without_a_failed_request_and_all_are_counted(model, serve):
    server = serve(2)
    first = server.workers()
    assert len(first) == 2
    with httpx.Client(base_url=server.url) as client:
        ask = {"history": ["i1"], "k": 1, "seen": "include"}
        before = client.post("/v1/recommend", json=ask).json()["items"][0]["item_id"]
    rec = Recommender.load(model)
    rec.observe_many(Event(f"n{n}", item) for n in range(400) for item in ("i1", "i30"))
    rec.refit()
    with load(server.url) as got:
        time.sleep(1)
        rec.save(model)
        server.hear("all workers have it")
        time.sleep(1)
    rec.close()
    assert set(got) == {200} and len(got) > 20
    assert not set(first) & set(server.workers()) and len(server.workers()) == 2
    with httpx.Client(base_url=server.url) as client:
        after = client.post("/v1/recommend", json=ask).json()["items"][0]["item_id"]
        assert before != "i30" and after == "i30"
        time.sleep(1.5)
        text = client.get("/metrics").text
    answered = re.findall(r'^llmrec_requests_total\{.*route="/v1/recommend".*\} (\S+)$', text, re.M)
    # Of two processes that are there, and two that have ended.
    assert sum(map(float, answered)) == len(got) + 2
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]


def test_a_worker_that_is_killed_is_replaced_and_a_model_that_does_not_start_changes_nothing(model, serve):
    server = serve(2)
    victim, other = server.workers()
    os.kill(victim, signal.SIGKILL)
    server.hear("a worker ended with -9")
    server.hear("the new worker answers")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/v1/users").status_code < 500
        now = server.workers()
        assert len(now) == 2 and victim not in now and other in now
        manifest = json.loads((model / "manifest.json").read_text())
        good = dict(manifest)
        manifest |= {"model": "another", "state": "state-000000000000"}
        (model / "manifest.json").write_text(json.dumps(manifest))
        server.hear("a worker does not start")
        assert sorted(server.workers()) == sorted(now)
        assert client.post("/v1/recommend", json={"user": "u1"}).status_code == 200
        (model / "manifest.json").write_text(json.dumps(good))
        os.kill(server.process.pid, signal.SIGHUP)
        server.hear("all workers have it")
    # Nobody is left behind, even by a kill.
    left = server.workers()
    server.process.kill()
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in left):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive the server")


@pytest.mark.parametrize(
    ("outcomes", "again"), [([True, False], True), ([False], False), ([True] * 3, False)]
)
def test_an_exchange_that_stops_half_way_is_tried_again(monkeypatch, outcomes, again):
    monkeypatch.setattr(workers, "AGAIN_SECONDS", 0)
    said, left = [], iter(outcomes)
    served = workers.Workers(None, None, said.append)
    served._workers = [None] * 3
    served._exchange = lambda i: next(left)
    served._swap()
    assert served._asked.is_set() == again and next(left, "all asked") == "all asked"
    assert ("1 of 3 workers have it" in said[-1]) == again


def test_workers_that_do_not_start_end_the_server_with_the_reason(model):
    (model / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "llmrec.cli", "serve", str(model), "--port", "0", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "damaged" in done.stderr and "Traceback" not in done.stderr


def test_values_of_several_processes_are_summed_and_nothing_is_under_way_in_one_that_ended(tmp_path):
    scope = {"method": "GET"}
    one = metrics.Metrics(tmp_path)
    for _ in range(3):
        one.on_done(scope, 200, 0.2)
    one.on_batch(5, 1)
    left = (
        "# HELP llmrec_requests_total x\n# TYPE llmrec_requests_total counter\n"
        'llmrec_requests_total{method="GET",route="other",status="200"} 4.0\n'
        "# HELP llmrec_pending x\n# TYPE llmrec_pending gauge\n"
        'llmrec_pending{lane="lm"} 7.0\n'
    )
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    (tmp_path / f"{int(ended.stdout)}.prom").write_text(left)
    text = one.text().decode()
    assert 'llmrec_requests_total{method="GET",route="other",status="200"} 7.0' in text
    assert "llmrec_pending{" not in text
    (tmp_path / f"{os.getppid()}.prom").write_text(left)
    text = one.text().decode()
    assert 'status="200"} 11.0' in text and 'llmrec_pending{lane="lm"} 7.0' in text
    assert 'llmrec_request_seconds_sum{route="other"} 0.6' in text
    assert 'llmrec_batch_size_bucket{le="8.0"} 1.0' in text


def is_mapped(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return isinstance(array, mmap.mmap)


def test_what_was_fitted_is_mapped_by_whoever_loads_it(model):
    rec = Recommender.load(model)
    matrix = rec._state.retrievers["transitions"].matrix
    assert is_mapped(matrix.data) and is_mapped(matrix.indices) and is_mapped(rec.texts.vectors)
    rec.close()


def test_arrays_of_a_saved_model_are_mapped_not_read(tmp_path):
    rng = np.random.default_rng(0)
    groups = {
        "ease": {"data": rng.random((50, 3), dtype=np.float32), "n": np.array(7)},
        "other": {
            "bytes": np.arange(5, dtype=np.uint8),
            "flags": np.array([True, False]),
            "none": rng.random((0, 4)),
        },
    }
    save_arrays(tmp_path / "a.safetensors", groups)
    loaded = load_arrays(tmp_path / "a.safetensors")
    for group, arrays in groups.items():
        for name, array in arrays.items():
            found = loaded[group][name]
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype and found.shape == array.shape and found.flags.aligned
            assert is_mapped(found) or not found.size
    np.save(tmp_path / "v.npy", groups["ease"]["data"])
    mapped = map_array(tmp_path / "v.npy")
    np.testing.assert_array_equal(mapped, groups["ease"]["data"])
    mapped[0] = 5
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), groups["ease"]["data"])
    whole = (tmp_path / "a.safetensors").read_bytes()
    for broken in (b"", whole[:7], whole[:40], whole[:-3], b"\xff" * 100):
        (tmp_path / "a.safetensors").write_bytes(broken)
        with pytest.raises(ModelError, match="missing or damaged"):
            load_arrays(tmp_path / "a.safetensors")
