from __future__ import annotations

import numpy as np
import pytest

from llmrec.index import faiss_index
from llmrec.index.faiss_index import FaissIndex

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
    index.add(unit(rng, 1, 16))
    assert len(index) == len(vectors) + 1
    for old, now in zip(before, first.search(asked, 9, [None] * 5), strict=True):
        assert old.items.tolist() == now.items.tolist()
