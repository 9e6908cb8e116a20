from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llmrec import Item, Recommender, Request
from llmrec.errors import ConfigError, StoreError
from llmrec.index import faiss_index, making
from llmrec.index.aside import Aside, beside
from llmrec.index.config import IndexConfig
from llmrec.index.faiss_index import FaissIndex
from llmrec.index.making import make_index, new_name, recall, server_index
from llmrec.testing import toy_data

DIM = 64


def clustered(n, seed=0):
    """Unit vectors around 40 centres, and queries near some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, DIM))
    vectors = centres[rng.integers(0, 40, n)] + 0.5 * rng.normal(size=(n, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors, vectors[:30] + 0.05 * rng.normal(size=(30, DIM)).astype(np.float32)


VECTORS, QUERIES = clustered(4000)


@pytest.fixture(scope="module")
def exact():
    index = FaissIndex(DIM)
    index.add(VECTORS)
    assert index.exact and len(index) == 4000
    return index


@pytest.fixture(scope="module")
def graph():
    """Grown past its limit in pieces: the first are moved from exact storage into the graph."""
    index = FaissIndex(DIM, exact_up_to=1000)
    for piece in np.split(VECTORS, [600, 900, 2500]):
        index.add(piece)
    assert not index.exact and len(index) == 4000
    return index


def brute_force(query, k, mask=None):
    """Codes by inner product, computed in float64."""
    scores = VECTORS.astype(np.float64) @ query
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    order = np.argsort(-scores)[:k]
    return order[np.isfinite(scores[order])], scores


def test_exact_search_equals_an_argsort_with_and_without_masks(exact):
    rng = np.random.default_rng(1)
    masks = [None if i % 3 == 0 else rng.random(4000) < 0.5 for i in range(30)]
    # What a person has seen is near what they are asked for.
    seen = [
        None if i % 5 == 0 else ~np.isin(np.arange(4000), brute_force(QUERIES[i], 30)[0]) for i in range(30)
    ]
    for asked in ([None] * 30, masks, seen):
        for query, mask, hits in zip(QUERIES, asked, exact.search(QUERIES, 20, asked), strict=True):
            codes, scores = brute_force(query, 20, mask)
            assert hits.items.tolist() == codes.tolist()
            np.testing.assert_allclose(hits.scores, scores[codes], atol=1e-5)
            assert hits.items.dtype == np.int32 and hits.scores.dtype == np.float32


def test_the_graph_finds_what_exact_search_finds(exact, graph):
    for masks in ([None] * 30, [np.arange(4000) % 2 == 0] * 30, [np.arange(4000) % 8 == 0] * 30):
        pairs = zip(graph.search(QUERIES, 10, masks), exact.search(QUERIES, 10, masks), strict=True)
        found = [len(np.intersect1d(near.items, true.items)) / 10 for near, true in pairs]
        assert np.mean(found) >= 0.9


@pytest.mark.parametrize("allowed", [1, 7, 40, 390])
def test_however_few_items_are_allowed_they_are_found_and_no_others(exact, graph, allowed):
    rng = np.random.default_rng(allowed)
    masks = [np.isin(np.arange(4000), rng.choice(4000, allowed, replace=False)) for _ in QUERIES]
    for index in (exact, graph):
        for query, mask, hits in zip(QUERIES, masks, index.search(QUERIES, 25, masks), strict=True):
            assert mask[hits.items].all()
            assert hits.items.tolist() == brute_force(query, min(25, allowed), mask)[0].tolist()
        assert [len(h.items) for h in index.search(QUERIES, 5, [np.zeros(4000, bool)] * 30)] == [0] * 30


def test_adding_in_pieces_equals_adding_at_once(exact):
    pieces = FaissIndex(DIM)
    for piece in np.split(VECTORS, [0, 1, 1500, 1500]):
        pieces.add(piece)
    found = [index.search(QUERIES, 15, [None] * 30) for index in (exact, pieces)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.items, other.items)
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("exact_up_to", [1000, 10])
def test_equal_scores_are_in_the_order_of_codes_however_many_are_asked(exact_up_to):
    vectors = np.repeat(np.eye(4, dtype=np.float32), 6, axis=0)[np.random.default_rng(0).permutation(24)]
    index = FaissIndex(4, exact_up_to)
    index.add(vectors)
    aside = beside(index, vectors, np.array([3, 11], np.int32))
    for searched in (index, aside):
        for asked, mask in itertools.product((1, 20), (None, np.arange(24) != 5)):
            for hits in searched.search(vectors[:asked], 24, [mask] * asked):
                pairs = list(zip(-hits.scores, hits.items, strict=True))
                assert pairs == sorted(pairs) and len(pairs) == (24 if mask is None else 23)


def test_an_empty_index_finds_nothing_and_a_small_one_all_it_has():
    index = FaissIndex(DIM)
    assert [len(h.items) for h in index.search(QUERIES[:2], 5, [None, None])] == [0, 0]
    assert index.search(QUERIES[:0], 5, []) == []
    index.add(VECTORS[:3])
    (hits,) = index.search(QUERIES[:1], 50, [None])
    assert hits.items.tolist() == np.argsort(-(VECTORS[:3] @ QUERIES[0])).tolist()
    (hits,) = index.search(QUERIES[:1], 50, [np.array([False, True, True])])
    assert sorted(hits.items.tolist()) == [1, 2]


# Growing.


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("most,exact_up_to", [(1000, 10_000), (7, 10_000), (1000, 50)])
def test_a_grown_index_finds_what_a_new_one_finds_and_the_old_one_stays(most, exact_up_to, monkeypatch):
    monkeypatch.setattr(faiss_index, "ASIDE", most)
    monkeypatch.setattr(faiss_index, "ASIDE_SHARE", 0.0)
    rng = np.random.default_rng(0)
    vectors, asked = unit(rng, 60, 16), unit(rng, 5, 16)
    index = FaissIndex(16, exact_up_to)
    index.add(vectors)
    first, before = index, index.search(asked, 9, [None] * 5)
    for step in range(8):
        changed = rng.choice(len(vectors), step % 3, replace=False)
        vectors = np.concatenate([vectors, unit(rng, step % 4, 16)])
        vectors[changed] = unit(rng, len(changed), 16)
        index = index.grown(vectors, changed)
        assert len(index) == len(vectors)
        few = np.zeros(len(vectors), bool)
        few[rng.choice(len(vectors), 4, replace=False)] = True
        masks = [None, rng.random(len(vectors)) < 0.5, few, ~few, np.zeros(len(vectors), bool)]
        for k in (1, 9, len(vectors) + 5):
            for vector, mask, hits in zip(asked, masks, index.search(asked, k, masks), strict=True):
                scores = vectors @ vector
                allowed = np.arange(len(vectors)) if mask is None else np.flatnonzero(mask)
                best = allowed[np.argsort(-scores[allowed])][:k]
                if exact_up_to > len(vectors):
                    assert hits.items.tolist() == best.tolist()
                assert len(set(hits.items.tolist())) == len(hits.items) and set(hits.items) <= set(allowed)
                np.testing.assert_allclose(hits.scores, scores[hits.items], atol=1e-5)
    for old, now in zip(before, first.search(asked, 9, [None] * 5), strict=True):
        assert old.items.tolist() == now.items.tolist()


# Compressed.


def test_short_codes_find_most_of_what_exact_search_finds_in_a_sixteenth_of_the_memory():
    index = FaissIndex(DIM, exact_up_to=500, compressed_above=3000)
    for piece in np.split(VECTORS, [400, 2500]):
        index.add(piece)
    assert index.compressed and len(index) == 4000 and not index.exact
    # 40 centres: within one, all are nearly as near, so ten of the hundred nearest is what can be asked.
    for mask in (None, np.arange(4000) % 2 == 0, np.arange(4000) % 100 == 3):
        shares = []
        for query, hits in zip(QUERIES, index.search(QUERIES, 10, [mask] * 30), strict=True):
            near = brute_force(query, 100, mask)[0]
            assert mask is None or mask[hits.items].all()
            shares.append(np.isin(hits.items, near).mean())
        assert np.mean(shares) > 0.9
    assert index._index.pq.code_size * 16 == 4 * DIM


def test_vectors_mapped_from_a_file_are_indexed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(faiss_index, "CHUNK", 999)
    monkeypatch.setattr(making, "CHUNK", 1234)
    np.save(tmp_path / "v.npy", VECTORS)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    said = []
    index = make_index(mapped, IndexConfig(exact_up_to=100), said.append)
    (line,) = said
    assert f"{recall(index, VECTORS):.1%}" in line and recall(index, VECTORS) > 0.9
    exact = make_index(mapped, IndexConfig())
    assert recall(exact, mapped) == 1.0 and len(exact) == 4000


# The contract of all of them. PostgreSQL and Milvus are real servers.


@pytest.fixture(scope="session")
def milvus():
    """A Milvus server on a free port; Milvus Lite speaks the protocol of a cluster."""
    program = Path(sys.executable).with_name("milvus-lite")
    if not program.exists():
        pytest.skip("milvus-lite is not installed")
    folder = tempfile.mkdtemp(prefix="llmrec-milvus-")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "server", "--data-dir", folder, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "milvus-lite ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["faiss", "graph", "pgvector", "milvus", "milvus file"])
def make(request, tmp_path):
    """Makes an index of one kind over vectors; the same name opens the same collection."""
    kind, opened = request.param, []
    if kind == "pgvector":
        url = request.getfixturevalue("database")
    elif kind == "milvus":
        url = request.getfixturevalue("milvus")
    else:
        url = str(tmp_path / "vectors.db") if kind == "milvus file" else None

    def made(vectors, name=None):
        limit = 0 if kind == "graph" else 10_000
        index = make_index(vectors, IndexConfig(exact_up_to=limit), url=url, name=name)
        opened.append(index)
        return index

    made.url = url
    yield made
    for index in opened:
        if url is not None:
            index.drop()
            index.close()


def test_every_index_finds_what_is_allowed_and_nothing_else(make):
    vectors = VECTORS[:1500]
    index = make(vectors)
    assert len(index) == 1500 and recall(index, vectors) > 0.95
    rng = np.random.default_rng(5)
    few = np.isin(np.arange(1500), rng.choice(1500, 7, replace=False))
    seen = np.ones(1500, bool)
    seen[np.argsort(-(vectors @ QUERIES[0]))[:40]] = False
    masks = [None, rng.random(1500) < 0.5, rng.random(1500) < 0.1, few, seen, np.zeros(1500, bool)]
    asked = QUERIES[: len(masks)]
    for query, mask, hits in zip(asked, masks, index.search(asked, 12, masks), strict=True):
        scores = vectors.astype(np.float64) @ query
        allowed = np.arange(1500) if mask is None else np.flatnonzero(mask)
        best = allowed[np.argsort(-scores[allowed])][:12]
        assert np.isin(hits.items, best).sum() >= 0.8 * len(best) and len(hits.items) == len(best)
        assert np.isin(hits.items, allowed).all() and len(set(hits.items.tolist())) == len(hits.items)
        np.testing.assert_allclose(hits.scores, scores[hits.items], atol=1e-5)
        assert (np.diff(hits.scores) <= 1e-6).all()
        assert hits.items.dtype == np.int32 and hits.scores.dtype == np.float32
    assert index.search(asked[:0], 5, []) == []
    assert len(index.search(asked[:1], 5000, [None])[0].items) >= 0.95 * 1500


def test_what_is_put_into_any_index_is_found_by_the_next_search_and_not_by_the_old_index(make):
    vectors = VECTORS[:300]
    index = make(vectors)
    grown_vectors = np.concatenate(
        [vectors, QUERIES[:2] / np.linalg.norm(QUERIES[:2], axis=1, keepdims=True)]
    )
    grown_vectors[7] = -VECTORS[0]
    grown = index.grown(grown_vectors, np.array([7], np.int32))
    assert len(grown) == 302 and len(index) == 300
    found = grown.search(np.stack([QUERIES[0], QUERIES[1], -VECTORS[0]]), 1, [None] * 3)
    assert [int(h.items[0]) for h in found] == [300, 301, 7]
    assert index.search(QUERIES[:1], 300, [None])[0].items.max() < 300
    # For one request only: nothing is written.
    ad_hoc = np.concatenate([grown_vectors, -QUERIES[1:2]])
    assert beside(grown, ad_hoc, np.array([302], np.int32)).search(-QUERIES[1:2], 1, [None])[0].items == [302]
    assert grown.search(-QUERIES[1:2], 400, [None])[0].items.max() < 302
    # Removed: the mask of every request rules it out.
    mask = np.arange(302) != 300
    assert 300 not in grown.search(QUERIES[:1], 302, [mask])[0].items


def test_other_processes_open_the_same_collection(make):
    if make.url is None:
        pytest.skip("FAISS is in the memory of one process")
    name, vectors = new_name(), VECTORS[:200]
    first, said = make(vectors, name), []
    more = np.concatenate([vectors, VECTORS[1000:1003]])
    grown = first.grown(more, np.empty(0, np.int32))
    if make.url.endswith(".db"):
        return
    other = make_index(vectors, IndexConfig(), said.append, url=make.url, name=name)
    assert said == [] and len(other) == 200
    # The three rows that it does not know yet are not returned; once they are, the same rows are written.
    assert other.search(VECTORS[1000:1001], 200, [None])[0].items.max() < 200
    again = other.grown(more, np.empty(0, np.int32))
    for index in (grown, again):
        assert index.search(VECTORS[1000:1001], 1, [None])[0].items == [200]
    # One that lost rows is written anew.
    longer = make_index(VECTORS[:250], IndexConfig(), said.append, url=make.url, name=name)
    assert len(longer) == 250 and "writing 250 vectors" in said[0]
    for index in (other, longer):
        index.close()


def test_where_the_graph_of_pgvector_ends_too_early_all_are_compared(database, monkeypatch):
    monkeypatch.setattr("llmrec.index.pgvector_index._EF_MOST", 100)
    vectors = VECTORS[:1500]
    short = f"{database}{'&' if '?' in database else '?'}options=-c%20hnsw.max_scan_tuples%3D50"
    index = make_index(vectors, IndexConfig(), url=short)
    mask = np.random.default_rng(0).random(1500) < 0.8
    assert mask.sum() > 1100
    (walked, exact) = index.search(QUERIES[:2], 1100, [mask, np.arange(1500) < 900])
    assert len(walked.items) == 1100 and mask[walked.items].all()
    np.testing.assert_allclose(walked.scores, -np.sort(-(vectors[mask] @ QUERIES[0]))[:1100], atol=1e-5)
    np.testing.assert_allclose(exact.scores, -np.sort(-(vectors[:900] @ QUERIES[1])), atol=1e-5)
    index.drop()
    index.close()


def test_threads_search_any_index_at_once(make):
    index = make(VECTORS[:500])
    one = [hits.items.tolist() for hits in index.search(QUERIES, 10, [None] * 30)]
    failed = []

    def work(start):
        for i in range(start, start + 10):
            if index.search(QUERIES[i : i + 1], 10, [None])[0].items.tolist() != one[i]:
                failed.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# A recommender with its vectors on a server.


@pytest.fixture(params=["pgvector", "milvus"])
def url(request):
    return request.getfixturevalue("database" if request.param == "pgvector" else "milvus")


CONFIG = {"encoder": {"name": "light", "dim": 16}, "retrieval": {"families": ["ease", "profile"]}}
ASK = [Request(history=["i1", "i2"], k=8), Request(query="river", k=5), Request(history=["i3"], where={})]


def answers(rec):
    return [[r.item.item_id for r in found] for found in rec.recommend_many(ASK)]


def test_a_recommender_answers_alike_wherever_its_vectors_are(url, tmp_path, monkeypatch):
    items, events = toy_data()
    plain = Recommender.fit(items, events, CONFIG)
    rec = Recommender.fit(items, events, CONFIG | {"index": {"url": url}})
    assert answers(rec) == answers(plain)
    rec.save(tmp_path / "model")
    assert url not in (tmp_path / "model" / "manifest.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_INDEX_URL", url)
        other = Recommender.load(tmp_path / "model")
    assert other.texts.index.name == rec.texts.index.name
    new = Item("new", "Blue River Piano")
    for each in (rec, plain):
        each.add_items([new])
    other.follow()
    assert answers(other) == answers(rec) == answers(plain)
    assert rec.recommend(query="Blue River Piano", k=1)[0].item.item_id == "new"
    assert rec.rank([Item("ad-hoc", "Green Stone"), "new"], query="Green Stone")[0].item.item_id == "ad-hoc"
    assert other.recommend(query="Green Stone", k=50)[0].item.item_id != "ad-hoc"
    # A copy has a collection of its own.
    rec.save(tmp_path / "copy")
    assert rec.texts.index.name != other.texts.index.name
    rec.add_items([Item("later", "Silver Lake")])
    assert answers(other) == answers(plain)
    # What is replaced goes from the server too, but not while others may still search it.
    monkeypatch.setenv("LLMREC_INDEX_URL", url)
    with server_index(url, other.texts.index.name, 16) as replaced:
        for left in (len(other.catalog), 0):
            plain = Recommender.fit(items, events, CONFIG)
            plain.save(tmp_path / "model")
            assert replaced.stored() == left
    for each in (rec, other, plain):
        each.close()
    with server_index(url, rec.texts.index.name, 16) as kept:
        assert kept.stored() == len(rec.catalog)
        kept.drop()


def test_a_saved_recommender_moves_to_a_server_and_back_to_memory(url, tmp_path, caplog):
    items, events = toy_data()
    Recommender.fit(items, events, CONFIG).save(tmp_path / "model")
    plain = Recommender.load(tmp_path / "model")
    moved = Recommender.load(tmp_path / "model", index=url)
    assert answers(moved) == answers(plain) and moved.texts.index.name
    moved.save(tmp_path / "model")
    back = Recommender.load(tmp_path / "model")
    assert "LLMREC_INDEX_URL" in caplog.text and back.texts.index.name is None
    assert answers(back) == answers(plain)
    name = moved.texts.index.name
    moved.close()
    with server_index(url, name, 16) as index:
        assert index.stored() == len(items)
        index.drop()


def test_a_recommender_that_was_never_saved_leaves_nothing_on_the_server(url):
    rec = Recommender.fit(*toy_data(), CONFIG | {"index": {"url": url}})
    name = rec.texts.index.name
    rec.close()
    with server_index(url, name, 16) as index:
        assert index.stored() == 0


def test_a_fit_that_fails_leaves_nothing_on_the_server(url, monkeypatch):
    made = []

    def failing(train, held_out, texts, *others):
        made.append(texts.index.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrec.recommender.choose_recipe", failing)
    with pytest.raises(KeyboardInterrupt):
        Recommender.fit(*toy_data(), CONFIG | {"index": {"url": url}})
    with server_index(url, made[0], 16) as index:
        assert index.stored() == 0


def test_servers_that_are_not_there_are_named_without_a_password(monkeypatch):
    monkeypatch.setattr("llmrec.index.milvus_index.SECONDS", 1)
    for wrong in ("http://me:se/cret@127.0.0.1:1", "http://me:secret@127.0.0.1:x", "http://[me:secret@x"):
        with pytest.raises(StoreError, match="cannot be read") as told:
            Recommender.fit(*toy_data(), CONFIG | {"index": {"url": wrong}})
        assert "cret" not in str(told.value)
    for wrong in ("postgresql://me:secret@127.0.0.1:1/x", "http://me:secret@127.0.0.1:1"):
        with pytest.raises(StoreError, match="vector index") as told:
            Recommender.fit(*toy_data(), CONFIG | {"index": {"url": wrong}})
        assert "secret" not in str(told.value) and "127.0.0.1:1" in str(told.value)
    with pytest.raises(ConfigError, match="Milvus") as told:
        Recommender.fit(*toy_data(), CONFIG | {"index": {"url": "mysql://me:secret@x"}})
    assert "secret" not in str(told.value)


def test_a_grown_index_in_memory_keeps_what_is_new_beside_it():
    index = FaissIndex(DIM)
    index.add(VECTORS[:100])
    grown = index.grown(VECTORS[:101], np.empty(0, np.int32))
    assert isinstance(grown, Aside) and grown.exact and grown.name is None and len(grown) == 101


def test_a_graph_that_is_asked_for_many_looks_further():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(8000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = FaissIndex(48, exact_up_to=0)
    index.add(vectors)
    exact = vectors[:20] @ vectors.T
    for masks in ([None] * 20, [np.arange(8000) != 7999] * 20):
        found = index.search(vectors[:20], 400, masks)
        shared = [
            np.isin(np.argsort(-row)[:400], h.items).mean() for row, h in zip(exact, found, strict=True)
        ]
        assert np.mean(shared) > 0.95
