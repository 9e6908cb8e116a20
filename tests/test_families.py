"""Matrix factorisation, graph convolution, popularity over time, nearest texts, topics."""

from types import SimpleNamespace

import implicit
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.decomposition import LatentDirichletAllocation
from torch_geometric.nn.models import LightGCN

from llmrec.encode.topics import TopicEncoder
from llmrec.errors import DataError
from llmrec.families import FAMILIES, TopicsConfig, TopicsRetriever
from llmrec.index.faiss_index import FaissIndex
from llmrec.protocols import Query
from llmrec.retrieve.dense import NearestConfig, NearestRetriever
from llmrec.retrieve.factors import ALSConfig, ALSRetriever
from llmrec.retrieve.graph import LightGCNConfig, LightGCNRetriever, edges_of, summarise
from llmrec.retrieve.popularity import RecentConfig, RecentRetriever

ITEMS = 30
RNG = np.random.default_rng(0)


def two_tastes(users=80):
    """Half of the users choose among the first half of the items, the others among the second."""
    rng = np.random.default_rng(1)
    return [
        (rng.choice(ITEMS // 2, 6, replace=False) + (u % 2) * ITEMS // 2).astype(np.int32)
        for u in range(users)
    ]


HISTORIES = two_tastes()
ASKED = [Query(np.array([1, 4, 7], np.int32)), Query(np.array([20, 25], np.int32))]


@pytest.fixture(params=["als", "lightgcn"])
def fitted(request):
    if request.param == "als":
        return ALSRetriever.fit(HISTORIES, ITEMS + 1, ALSConfig(dim=4, l2=1.0))
    config = LightGCNConfig(dim=8, steps=60, batch=256)
    return LightGCNRetriever.fit(HISTORIES, ITEMS + 1, config)


def test_people_are_shown_what_people_of_their_taste_choose(fitted):
    mask = np.ones(ITEMS + 1, dtype=bool)
    first, second = fitted.retrieve([Query(q.history, mask=mask) for q in ASKED], 10)
    assert set(first.items.tolist()) <= set(range(15)) and set(second.items.tolist()) <= set(range(15, 30))
    assert (np.diff(first.scores) <= 0).all()


def test_a_batch_answers_as_single_queries_and_unknown_ones_get_nothing(fitted):
    queries = [*ASKED, Query(), Query(np.array([ITEMS], np.int32)), Query(text="words")]
    together = fitted.retrieve(queries, 7)
    assert [len(h.items) for h in together] == [7, 7, 0, 0, 0]
    for query, hits in zip(queries, together, strict=True):
        assert fitted.retrieve([query], 7)[0].items.tolist() == hits.items.tolist()
    assert ITEMS not in fitted.retrieve(ASKED, 100)[0].items, "an item without events is not proposed"


def test_saved_arrays_answer_alike_and_a_grown_catalogue_changes_nothing(fitted):
    again = type(fitted).from_arrays(fitted.arrays(), fitted.config).grown(ITEMS + 5)
    for one, two in zip(fitted.retrieve(ASKED, 9), again.retrieve(ASKED, 9), strict=True):
        assert one.items.tolist() == two.items.tolist()
        np.testing.assert_allclose(one.scores, two.scores, rtol=1e-5)


def test_a_solved_user_equals_that_of_the_library():
    config = ALSConfig(dim=5, l2=0.7, alpha=3.0, decay=0.8)
    model = ALSRetriever.fit(HISTORIES, ITEMS, config)
    library = implicit.als.AlternatingLeastSquares(
        factors=5, regularization=0.7, alpha=3.0, random_state=0, use_cg=False, use_gpu=False
    )
    library.item_factors, library.user_factors = model.factors, np.zeros((1, 5), np.float32)
    history = np.array([3, 9, 3, 12], np.int32)
    weights = {3: 0.8, 9: 0.64, 12: 1.0}
    row = scipy.sparse.csr_matrix(
        (np.array(list(weights.values()), np.float32), ([0] * 3, list(weights))), shape=(1, ITEMS)
    )
    theirs = library.recalculate_user(0, row)
    np.testing.assert_allclose(model.user(history), np.ravel(theirs), rtol=2e-3, atol=2e-4)


def test_a_known_user_is_served_as_the_library_embeds_them_but_for_their_own_embedding():
    users = np.repeat(np.arange(len(HISTORIES)), 6)
    edges = edges_of(users, np.concatenate(HISTORIES).astype(np.int64), len(HISTORIES))
    torch.manual_seed(0)
    library = LightGCN(len(HISTORIES) + ITEMS, 6, 3)
    model = LightGCNRetriever(*summarise(library, edges, len(HISTORIES)), LightGCNConfig(dim=6, decay=1.0))
    final = library.get_embedding(edges).detach()
    own = library.embedding.weight.detach() / 4
    for user in (0, 7, 41):
        np.testing.assert_allclose(model.user(HISTORIES[user]), (final - own)[user], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(model.outputs, final[len(HISTORIES) :], rtol=1e-4, atol=1e-6)


def test_the_seed_decides():
    for fit in (
        lambda: ALSRetriever.fit(HISTORIES, ITEMS, ALSConfig(dim=4)).factors,
        lambda: LightGCNRetriever.fit(HISTORIES, ITEMS, LightGCNConfig(dim=4, steps=3)).outputs,
    ):
        state = torch.get_rng_state()
        np.testing.assert_allclose(fit(), fit(), atol=1e-6)
        assert torch.equal(state, torch.get_rng_state())


def test_no_events_is_defined():
    nothing = [np.empty(0, np.int32)]
    for made in (
        ALSRetriever.fit(nothing, 3, ALSConfig()),
        LightGCNRetriever.fit(nothing, 3, LightGCNConfig()),
    ):
        assert len(made.retrieve([Query(np.array([1], np.int32))], 2)[0].items) == 0


def test_recent_and_trending_follow_their_formulas():
    day = 86_400
    histories = [np.array([0, 0, 1], np.int32), np.array([0, 2], np.int32)]
    stamps = [np.array([0, 10 * day, 20 * day]), np.array([5 * day, 20 * day])]
    weights = [np.array([1, 2, 1], np.float32), np.array([1, 3], np.float32)]
    recent = RecentRetriever.fit(histories, stamps, 4, RecentConfig(half_life_days=10), weights)
    expected = [1 / 4 + 2 / 2 + 0.5**1.5, 1, 3, 0]
    np.testing.assert_allclose(recent.scores, expected, rtol=1e-6)
    config = RecentConfig(half_life_days=10, smoothing=2)
    trending = RecentRetriever.fit(histories, stamps, 4, config, weights, trend=True)
    np.testing.assert_allclose(trending.scores, np.array(expected) / [6, 3, 5, 2], rtol=1e-6)
    assert (recent.name, trending.name) == ("recent", "trending")
    # A date in the future is a mistake: it counts as of today, and the others do not fade for it.
    ahead = [stamps[0], np.array([5 * day, 10**11])]
    mistaken = RecentRetriever.fit(histories, ahead, 4, RecentConfig(half_life_days=10), weights)
    np.testing.assert_allclose(mistaken.scores, recent.scores, rtol=1e-6)
    assert trending.retrieve([Query()], 5)[0].items.tolist() == [2, 1, 0]
    assert recent.grown(6).retrieve([Query()], 5)[0].items.tolist() == [2, 0, 1]


def test_nearest_takes_the_best_of_the_latest_items():
    vectors = RNG.normal(size=(ITEMS, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = FaissIndex(5)
    index.add(vectors)
    mask = np.ones(ITEMS, dtype=bool)
    mask[[3, 8, 21]] = False
    history = np.array([5, 3, 8, 3, 21], np.int32)
    for last in (1, 2, 3):
        model = NearestRetriever(vectors, index, NearestConfig(last=last, decay=0.8))
        found, nothing = model.retrieve([Query(history, mask=mask), Query()], ITEMS)
        latest = [21, 3, 8][:last]
        cosines = [(age, vectors @ vectors[c]) for age, c in enumerate(latest)]
        # What is not near to an item says nothing.
        scores = np.max([np.where(c > 1e-3, 0.8**a * (c + 1) - 1, -np.inf) for a, c in cosines], axis=0)
        expected = sorted(np.flatnonzero(mask & np.isfinite(scores)), key=lambda i: -scores[i])
        assert found.items.tolist() == expected and len(nothing.items) == 0
        np.testing.assert_allclose(found.scores, scores[expected], atol=1e-5)


TEXTS = (
    ["red shoe leather"] * 8 + ["space ship alien robot"] * 8 + ["red leather boot", "robot space war", ""]
)


def test_topics_put_texts_of_one_subject_together_and_are_made_again_from_arrays():
    encoder = TopicEncoder.fit(TEXTS, dim=2)
    vectors = encoder.encode(TEXTS)
    assert vectors[0] @ vectors[16] > 0.9 > 0.7 > vectors[0] @ vectors[17]
    np.testing.assert_allclose(np.linalg.norm(vectors[:18], axis=1), 1.0, atol=1e-5)
    assert not vectors[18].any() and not encoder.encode(["unknown words"]).any()
    again = TopicEncoder.from_arrays(encoder.arrays())
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-6)
    counts = encoder._words.transform(TEXTS)
    library = LatentDirichletAllocation(2, max_iter=10, learning_method="online", random_state=0).fit(counts)
    np.testing.assert_allclose(vectors[:18] ** 2, library.transform(counts)[:18], atol=1e-4)
    with pytest.raises(DataError, match="no words"):
        TopicEncoder.fit(["", " "])


def test_topics_of_a_catalogue_that_changed_are_those_of_one_that_is_read_anew():
    family, encoder = FAMILIES["topics"], TopicEncoder.fit(TEXTS, dim=2)
    old = TopicsRetriever.of(encoder, TEXTS, TopicsConfig(dim=2))
    lines = ["robot space ship", *TEXTS[1:], "red shoe", "alien"]
    asked = []
    encoder.encode = lambda texts, encode=encoder.encode: asked.append(list(texts)) or encode(texts)
    grown = family.grow(old, SimpleNamespace(lines=lines))
    assert asked == [[lines[0], "red shoe", "alien"]], "the others are not read again"
    anew = TopicsRetriever.of(encoder, lines, TopicsConfig(dim=2))
    np.testing.assert_allclose(grown.vectors, anew.vectors, atol=1e-6)
    for history in ([0], [20, 3], [19]):
        (ours,), (theirs,) = (m.retrieve([Query(np.array(history, np.int32))], 30) for m in (grown, anew))
        np.testing.assert_allclose(sorted(ours.scores), sorted(theirs.scores), atol=1e-5)
    assert family.grow(grown, SimpleNamespace(lines=lines)).lines == lines
