"""The service: batches, budgets, limits, and documents that the catalogue does not hold."""

import base64
import hashlib
import threading
import time

import numpy as np
import pytest

from llmrec import Item, Recommender, Request
from llmrec.answering import units_of
from llmrec.errors import ConfigError, FetchError, ModelError, NotFoundError, OverloadError, RequestError
from llmrec.retrieve.lexical import _Index
from llmrec.serve import ApiKey, ServeConfig, Service, browse
from llmrec.serve import models as m
from llmrec.serve.batching import Batcher, Load, Pool
from llmrec.serve.relevance import score_documents
from llmrec.testing import tiny_lm, toy_data
from llmrec.timing import HALF_LIFE, Timing

LIGHT = {"encoder": {"name": "light", "dim": 16}}


@pytest.fixture(scope="module")
def fitted():
    return Recommender.fit(*toy_data(), LIGHT)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    pytest.importorskip("torch")
    base = tiny_lm(tmp_path_factory.mktemp("lm"))
    config = {
        **LIGHT,
        "lm": {"base": str(base), "layers": 2, "rank": 4, "head_dim": 32, "precision": "float32"},
        "training": {"minutes": None, "steps": 20, "head_learning_rate": 1e-2, "tokens_per_step": 400},
    }
    made = Recommender.fit(*toy_data(), config)
    made.finetune()
    # The toy log is learned by the transitions alone; a weight makes the model take part.
    object.__setattr__(made.recipe.history, "lm", 0.5)
    return made


@pytest.fixture
def serve():
    """Make services that are closed in the end."""
    made = []

    def make(rec, on_batch=lambda size, degraded: None, **settings):
        made.append(Service(rec, ServeConfig(**settings), on_batch))
        return made[-1]

    yield make
    for service in made:
        service.close()


class Gated:
    """A recommender whose batches, with the model or without, wait until they are let through."""

    def __init__(self, rec, *, lm):
        self._held = lm
        self.open = threading.Event()
        self.sizes = []
        self._rec = rec

    def __getattr__(self, name):
        return getattr(self._rec, name)

    def recommend_many(self, requests, *, lm=True):
        self.sizes.append(len(requests))
        if lm is self._held:
            assert self.open.wait(30)
        return self._rec.recommend_many(requests, lm=lm)


def takes(service, seconds):
    """Let the service believe that the language model takes so long for a lone request."""
    service.with_lm.load.timing = Timing()
    service.with_lm.load.timing.note(1, seconds)


def ids(answer):
    items = answer.items if isinstance(answer, m.ItemsResponse) else answer
    return [r.item_id for r in items]


# ---- batches -------------------------------------------------------------------------------------------


def test_requests_that_arrive_together_share_calls_and_get_the_answers_they_would_get_alone(fitted, serve):
    gated = Gated(fitted, lm=False)
    sizes = []
    service = serve(gated, lambda size, degraded: sizes.append(size), batch=16, wait_ms=50)
    bodies = [m.RecommendRequest(user=f"u{n}", k=1 + n % 7) for n in range(40)]
    futures = [service.begin(body) for body in bodies]
    gated.open.set()
    answers = [future.result(30) for future in futures]
    assert sum(sizes) == 40 and len(sizes) == len(gated.sizes) < 10 and max(sizes) <= 16
    for body, answer in zip(bodies, answers, strict=True):
        assert ids(answer) == ids(fitted.recommend(user=body.user, k=body.k))
        assert not answer.degraded


def test_a_bad_request_spoils_no_other_of_its_batch(fitted, serve):
    service = serve(fitted, batch=16, wait_ms=50)
    good = [service.begin(m.RecommendRequest(user=f"u{n}", k=3)) for n in range(5)]
    bad = service.begin(m.RecommendRequest(history=["nowhere"]))
    good += [service.begin(m.RecommendRequest(user=f"u{n}", k=3)) for n in range(5, 9)]
    for n, future in enumerate(good):
        assert ids(future.result(30)) == ids(fitted.recommend(user=f"u{n}", k=3))
    with pytest.raises(RequestError, match="nowhere"):
        bad.result(30)


def test_search_shares_the_batches_and_lets_seen_items_return(fitted, serve):
    service = serve(fitted)
    seen = fitted.history("u1")[0].item_id
    title = fitted.catalog.titles[fitted.catalog.code(seen)]
    found = service.search(m.SearchRequest(query=title, user="u1", k=3))
    assert ids(found) == ids(fitted.search(title, user="u1", k=3))
    assert seen in ids(found)
    assert service.without_lm.load.expected() > 0


def test_a_full_queue_refuses_with_a_time_to_come_back(fitted, serve):
    gated = Gated(fitted, lm=False)
    service = serve(gated, queue=4, batch=2, wait_ms=0)
    futures = [service.begin(m.RecommendRequest(user="u1")) for _ in range(4)]
    service.without_lm.load.timing.note(1, 2.0)
    with pytest.raises(OverloadError, match="try again in 10 s") as refused:
        service.begin(m.RecommendRequest(user="u1"))
    assert refused.value.retry_after == 10
    gated.open.set()
    assert all(future.result(30).items for future in futures)
    assert service.recommend(m.RecommendRequest(user="u1")).items


def test_what_waits_is_answered_at_the_end_and_no_more_is_taken(fitted):
    service = Service(fitted, ServeConfig(wait_ms=100))
    waiting = service.begin(m.RecommendRequest(user="u1"))
    service.close()
    assert waiting.result(0).items
    with pytest.raises(OverloadError, match="stopping"):
        service.begin(m.RecommendRequest(user="u1"))
    with pytest.raises(OverloadError, match="stopping"):
        service.submit(service.rank, m.RankRequest(items=["i1"]))
    service.close()


def test_an_unexpected_error_reaches_all_who_wait():
    batcher = Batcher(lambda requests: 1 / 0, batch=4, wait=0.05, limit=10)
    futures = [batcher.submit(n) for n in range(3)]
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    assert batcher.load.pending == 0 and batcher.load.expected() == 0
    batcher.close()


def test_the_pool_takes_as_many_calls_as_it_may_and_forgets_cancelled_ones():
    pool, open_ = Pool(workers=1, limit=2), threading.Event()
    running, waiting = pool.submit(open_.wait, 30), pool.submit(open_.wait, 30)
    with pytest.raises(OverloadError):
        pool.submit(open_.wait)
    assert waiting.cancel() and pool.load.pending == 1
    open_.set()
    assert running.result(10)
    pool.close()
    assert pool.load.pending == 0


# ---- budgets -------------------------------------------------------------------------------------------


def test_a_batch_is_promised_what_one_of_its_size_or_the_next_larger_took():
    timing = Timing()
    assert timing.estimate(1) is None
    timing.note(32, 0.64)
    # A lone request may take as long as the batch of 32, and not a thirty-second part of it.
    assert [timing.estimate(n) for n in (1, 17, 32, 64, 96)] == pytest.approx([0.64, 0.64, 0.64, 1.28, 1.92])
    timing.note(1, 0.05)
    timing.note(3, 0.12)
    assert [timing.estimate(n) for n in (1, 2, 4, 5)] == pytest.approx([0.05, 0.12, 0.12, 0.64])
    timing.note(1, 0.10)
    assert timing.estimate(1) == pytest.approx(0.05 + 0.2 * 0.05)


def test_what_waits_counts_by_what_it_costs():
    load = Load(10)
    assert load.expected() == 0
    load.enter()
    load.leave(1, 0.1)
    load.enter(22)
    load.enter()
    assert load.expected() == pytest.approx(24 * 0.1) and load.pending == 2
    load.leave(2, 1.0, 23)
    assert load.pending == 0 and load.expected() == pytest.approx(0.1, rel=0.01)
    assert load.expected(22) == pytest.approx(1.0, rel=0.01)


def test_reasons_cost_as_much_as_the_queries_that_they_ask(fitted, serve, monkeypatch):
    asked = []
    retriever = fitted._state.retrievers["transitions"]
    monkeypatch.setattr(
        retriever,
        "retrieve",
        lambda queries, k, real=retriever.retrieve: asked.append(len(queries)) or real(queries, k),
    )
    for request in (
        Request(history=["i1", "i2", "i3"], explain=True),
        Request(history=[f"i{n}" for n in range(30)], explain=True),
        Request(history=["i1", "i2"]),
        Request(history=[], explain=True),
        Request(explain=True),
        Request(query="river", explain=True),
    ):
        asked.clear()
        fitted.recommend(request)
        assert units_of(request) == max(1, sum(asked)), request
    assert units_of(Request(user="u1", explain=True)) == 22


def test_a_budget_is_kept_when_reasons_would_overrun_it(tuned, serve):
    service = serve(tuned)
    takes(service, 0.05)
    assert not service.recommend(m.RecommendRequest(user="u3", budget_ms=500)).degraded
    takes(service, 0.05)
    assert service.recommend(m.RecommendRequest(user="u3", budget_ms=500, explain=True)).degraded


def test_a_budget_that_the_language_model_would_overrun_gets_the_retrieval_order(tuned, serve):
    counted = []
    service = serve(tuned, lambda size, degraded: counted.append((size, degraded)))
    service.warm_up()
    assert service.with_lm.load.expected() > 0
    takes(service, 0.5)
    stages = tuned.stages(user="u3", k=8)
    assert ids(stages["retrieval"]) != ids(stages["default"])
    late = service.recommend(m.RecommendRequest(user="u3", k=8, budget_ms=100))
    assert late.degraded and ids(late) == ids(stages["retrieval"])
    takes(service, 0.5)
    kept = service.recommend(m.RecommendRequest(user="u3", k=8, budget_ms=10_000))
    assert not kept.degraded and ids(kept) == ids(stages["default"])
    assert {s.name for r in kept.items for s in r.sources} >= {"lm"}
    assert counted[-2:] == [(1, 1), (1, 0)]


def test_a_degraded_request_does_not_wait_behind_the_language_model(tuned, serve):
    gated = Gated(tuned, lm=True)
    service = serve(gated)
    takes(service, 0.2)
    slow = [service.begin(m.RecommendRequest(user=f"u{n}")) for n in range(3)]
    fast = service.begin(m.RecommendRequest(user="u3", budget_ms=500))
    assert fast.result(30).degraded and not any(future.done() for future in slow)
    gated.open.set()
    assert not any(future.result(30).degraded for future in slow)


def test_what_the_language_model_has_no_weight_in_is_not_degraded_and_does_not_wait_for_it(
    fitted, tuned, serve
):
    service = serve(fitted)
    takes(service, 99.0)
    assert not service.recommend(m.RecommendRequest(user="u1", budget_ms=1)).degraded
    assert tuned.recipe.query.most_lm == 0
    gated = Gated(tuned, lm=True)
    service = serve(gated)
    slow = service.begin(m.RecommendRequest(user="u1"))
    found = service.search(m.SearchRequest(query="silver river", budget_ms=1))
    assert ids(found) == ids(tuned.search("silver river")) and not found.degraded and not slow.done()
    gated.open.set()
    assert slow.result(30).items


# ---- documents and vectors -----------------------------------------------------------------------------


def test_the_first_typed_word_waits_for_nothing_and_who_changes_items_builds_the_index(serve, monkeypatch):
    rec = Recommender.fit(*toy_data(), LIGHT)
    assert not rec._state.retrievers["bm25"].is_ready
    serve(rec).warm_up()
    assert rec._state.retrievers["bm25"].is_ready
    rec.add_items([Item(f"new{n}", f"Zeppelin {n}") for n in range(300)])
    words = rec._state.retrievers["bm25"]
    assert words.is_ready and len(words._index.lines) == 340
    # Items of one request alone, without any words, are no reason to build it.
    builds = []
    monkeypatch.setattr(_Index, "build", lambda self: builds.append(self))
    rec.rank([Item(f"mine{n}", f"Balloon {n}") for n in range(270)], user="u1")
    assert builds == []


def test_documents_are_compared_with_the_query_and_the_history(fitted):
    documents = [m.Document(text="Blue River"), m.Document(text="Piano"), m.Document(id="i3")]
    encode = fitted.texts.encoder.encode
    vectors = np.stack([*encode(["Blue River", "Piano"]), fitted.texts.vectors[fitted.catalog.code("i3")]])
    wish = encode(["silver river"])[0]
    past = fitted.texts.vectors[fitted.catalog.codes(["i4", "i9"])].mean(axis=0)
    past /= np.linalg.norm(past)
    for query, history, asked in (
        ("silver river", [], wish),
        ("", ["i4", "i9"], past),
        ("silver river", ["i4", "i9"], (wish + past) / 2),
    ):
        expected = (1 + vectors @ asked) / 2
        np.testing.assert_allclose(score_documents(fitted, documents, query, history), expected, atol=1e-6)
    assert score_documents(fitted, documents, "", []).tolist() == [0.5] * 3


def test_rerank_orders_ids_as_rank_does_and_words_by_meaning(fitted, serve):
    service = serve(fitted)
    wanted = ["i9", "i3", "i20", "i9"]
    found = service.rerank(m.RerankRequest(documents=[m.Document(id=i) for i in wanted], user="u2"))
    order = [wanted[r.index] for r in found.results]
    assert sorted(order) == sorted(wanted)
    assert list(dict.fromkeys(order)) == ids(fitted.rank(["i9", "i3", "i20"], user="u2"))
    title = fitted.catalog.titles[7]
    body = m.RerankRequest(
        query=title, documents=["nothing of it", m.Document(text=title)], top_n=1, return_documents=True
    )
    (best,) = service.rerank(body).results
    assert best.index == 1 and best.document.text == title and 0.9 < best.relevance_score <= 1
    scored = service.rerank_texts(m.TextsRequest(query=title, texts=["other", title], return_text=True))
    assert [(s.index, s.text) for s in scored] == [(1, title), (0, "other")]
    with pytest.raises(RequestError, match="relevant to what"):
        service.rerank(m.RerankRequest(documents=["a"]))
    with pytest.raises(RequestError, match="document 1 has neither"):
        service.rerank(m.RerankRequest(query="a", documents=["a", m.Document()]))
    with pytest.raises(RequestError, match="not both"):
        service.rerank(m.RerankRequest(documents=["a"], user="u1", history=["i1"]))
    assert service.rerank(m.RerankRequest(query="a", documents=[])).results == []


def test_vectors_are_those_of_the_encoder_as_numbers_and_in_base64(fitted, serve):
    service, texts = serve(fitted), ["silver river", "piano"]
    expected = fitted.texts.encoder.encode(texts)
    numbers = service.embed(m.EmbeddingsRequest(input=texts))
    np.testing.assert_allclose([one.embedding for one in numbers.data], expected, atol=1e-7)
    packed = service.embed(m.EmbeddingsRequest(input="piano", encoding_format="base64")).data[0].embedding
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), expected[1])
    assert service.embed(m.EmbeddingsRequest(input=texts, dimensions=16)).data
    with pytest.raises(RequestError, match="have 16 numbers, got 8"):
        service.embed(m.EmbeddingsRequest(input=texts, dimensions=8))
    with pytest.raises(RequestError, match="empty list"):
        service.embed(m.EmbeddingsRequest(input=[]))


# ---- what changes, limits, settings --------------------------------------------------------------------


def test_events_are_stored_all_or_none_and_erased(serve):
    rec = Recommender.fit(*toy_data(), LIGHT)
    service = serve(rec, max_events=3)
    with pytest.raises(RequestError, match="nowhere"):
        service.store([m.EventIn(user_id="new", item_id=i) for i in ("i1", "nowhere")])
    assert rec.history("new") == []
    stored = service.store([m.EventIn(user_id="new", item_id=f"i{n}", timestamp=n) for n in range(3)])
    assert stored.events == 3 and [e.item_id for e in rec.history("new")] == ["i0", "i1", "i2"]
    with pytest.raises(RequestError, match="3 events at most"):
        service.store([m.EventIn(user_id="new", item_id="i1")] * 4)
    assert service.forget("new").events == 3
    item, new = service.put_item("x/1", m.ItemIn(title="Zeppelin", attributes={"genres": ["Waltz"]}))
    assert new and item.attributes == {"genres": ["Waltz"]}
    assert not service.put_item("x/1", m.ItemIn(title="Zeppelin Waltz"))[1]
    assert ids(service.search(m.SearchRequest(query="zeppelin waltz", k=1))) == ["x/1"]
    service.remove_item("x/1")
    assert not service.item("x/1").active
    with pytest.raises(NotFoundError, match="nowhere"):
        service.remove_item("nowhere")


def test_attributes_say_what_a_condition_can_name(fitted, serve):
    summary = serve(fitted).attributes()
    assert {name: about["kind"] for name, about in summary.items()} == {
        "genres": "list of strings",
        "year": "number",
        "brand": "string",
    }
    assert summary["brand"]["frequent"][0] == {"value": "Acme", "items": 10}
    genres = summary["genres"]["frequent"]
    assert genres == sorted(genres, key=lambda one: (-one["items"], one["value"]))
    assert sum(one["items"] for one in genres) == sum(len(i.attributes["genres"]) for i in toy_data()[0])
    years = [i.attributes["year"] for i in toy_data()[0]]
    assert (summary["year"]["min"], summary["year"]["max"]) == (min(years), max(years))


@pytest.mark.parametrize(
    "verb,body",
    [
        ("recommend", m.RecommendRequest(k=6)),
        ("recommend", m.RecommendRequest(history=["i1"] * 5)),
        ("search", m.SearchRequest(query="river", k=6)),
        ("similar", m.SimilarRequest(item_id="i1", k=6)),
        ("rank", m.RankRequest(items=["i1", "i2", "i3", "i4"])),
        ("predict", m.PredictRequest(items=["i1", "i2", "i3", "i4"])),
        ("rerank", m.RerankRequest(query="a", documents=["a"] * 4)),
        ("rerank_texts", m.TextsRequest(query="a", texts=["a"] * 4)),
        ("embed", m.EmbeddingsRequest(input=["a"] * 4)),
    ],
)
def test_limits_hold_for_every_verb(fitted, serve, verb, body):
    service = serve(fitted, max_k=5, max_history=4, max_candidates=3)
    with pytest.raises(RequestError, match=r"at most, got \d"):
        getattr(service, verb)(body)


def test_a_host_that_others_can_reach_needs_a_key(tmp_path):
    secret = "secret"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ConfigError, match=r"(?s)1 problem.*host: .*other machines.*add a key"):
            ServeConfig.of(host=host)
        assert ServeConfig.of({"keys": [{"name": "app", "sha256": digest}]}, host=host).host == host
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert ServeConfig.of(host=host).role_of(None) == "write"
    path = tmp_path / "serve.toml"
    path.write_text(f'max_k = 7\n[[keys]]\nname = "app"\nrole = "write"\nsha256 = "{digest}"\n')
    config = ServeConfig.of(path, port=0)
    assert (config.max_k, config.port) == (7, 0)
    assert [config.role_of(key) for key in (secret, "wrong", "", None)] == ["write", None, None, None]
    with pytest.raises(ConfigError, match=r"(?s)2 problem\(s\).*keys\.0\.sha256.*max_k") as wrong:
        ServeConfig.of({"max_k": 0, "keys": [{"name": "app", "sha256": secret}]})
    assert "'secret'" not in str(wrong.value)
    assert ApiKey(name="app", sha256=digest).role == "read"


def test_stages_without_a_left_out_model_that_cannot_be_loaded(tuned, tmp_path, serve, caplog):
    weight = tuned.recipe.history.lm
    object.__setattr__(tuned.recipe.history, "lm", 0.0)
    query = tuned.recipe.query.lm
    object.__setattr__(tuned.recipe.query, "lm", 0.0)
    try:
        tuned.save(tmp_path / "left out")
    finally:
        object.__setattr__(tuned.recipe.history, "lm", weight)
        object.__setattr__(tuned.recipe.query, "lm", query)
    tuned.save(tmp_path / "takes part")
    for folder, works in (("left out", True), ("takes part", False)):
        rec = Recommender.load(tmp_path / folder)
        object.__setattr__(rec.config.lm, "base", str(tmp_path / "gone"))
        service = serve(rec)
        if not works:
            with pytest.raises((FetchError, ModelError)):
                browse.stages(service, m.RecommendRequest(user="u1"))
            continue
        for _ in range(2):
            found = browse.stages(service, m.RecommendRequest(user="u1", k=3))
            assert found.lm_weight is None and [stage.name for stage in found.stages] == [
                "retrieval",
                "default",
            ]
            assert len(found.stages[1].items) == 3
        assert sum("without the language model" in line for line in caplog.messages) == 1


def test_lm_false_leaves_the_model_out(tuned):
    requests = [Request(user="u1"), Request(user="u2")]
    plain = tuned.recommend_many(requests, lm=False)
    for request, found in zip(requests, plain, strict=True):
        assert ids(found) == ids(tuned.stages(request)["retrieval"])
        assert "lm" not in {s.name for r in found for s in r.sources}


def test_a_saved_model_is_not_loaded_for_degraded_answers(tuned, tmp_path):
    tuned.save(tmp_path / "model")
    rec = Recommender.load(tmp_path / "model")
    assert rec.recommend_many([Request(user="u1")], lm=False)[0]
    assert rec._state.lm is None
    rec.close()


def test_an_estimate_that_keeps_requests_away_is_forgotten(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("llmrec.timing.time.monotonic", lambda: now[0])
    load = Load(5)
    load.enter()
    load.leave(1, 2.0)
    assert load.expected() == 2.0
    now[0] += 3 * HALF_LIFE
    assert load.expected() == pytest.approx(0.25)
    load.enter()
    assert load.expected() == 4.0


# ---- what other processes change -----------------------------------------------------------------------


def test_a_service_takes_over_what_others_change_and_goes_on_when_it_cannot(tmp_path, serve, caplog):
    first = Recommender.fit(*toy_data(), LIGHT)
    first.save(tmp_path / "model")
    other = Recommender.load(tmp_path / "model")
    service = serve(first, follow_seconds=0.02)
    other.add_items([Item("new", "Zeppelin")])

    def until(true):
        for _ in range(500):
            if true():
                return
            time.sleep(0.02)
        raise AssertionError("nothing happened")

    until(lambda: ids(service.search(m.SearchRequest(query="zeppelin", k=1))) == ["new"])
    other.close()
    first.close()
    until(lambda: "items that other processes changed are not seen" in caplog.text)
    time.sleep(0.2)
    assert caplog.text.count("are not seen") == 1


def test_reasons_are_phrased_on_request_where_they_stay_true(fitted, serve):
    service = serve(fitted)

    def write(told):
        chosen = [facts["history"].splitlines()[0] for facts in told]
        return [f"Since you liked {title}, you may like this." for title in chosen[:1]] + [
            "Everybody in Paris has it." for _ in chosen[1:]
        ]

    fitted._writer = write
    try:
        body = m.RecommendRequest(history=["i4", "i5"], k=4, phrase=True)
        reasons = [item.reason for item in service.phrased(body).items]
    finally:
        fitted._writer = None
    assert all(reasons)
    said = [reason for reason in reasons if reason.worded]
    assert len(said) == 1 and said[0].sentence.startswith("Since you liked ")
    assert said[0].history[0].title in said[0].sentence
    plain = service.recommend(m.RecommendRequest(history=["i4", "i5"], k=4, explain=True)).items
    for one, reason in zip(plain, reasons, strict=True):
        assert reason.worded or reason == one.reason
