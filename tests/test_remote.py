"""A language model on an inference server: what is sent, what comes back, what happens if nothing does."""

import json
import os
import shutil
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from programs import program

from llmrec import Item, Recommender, Request
from llmrec.config import Config
from llmrec.errors import ConfigError, EngineError, ModelError
from llmrec.protocols import Query
from llmrec.score.engine import Engine, EngineConfig
from llmrec.serve.config import ServeConfig
from llmrec.serve.models import RecommendRequest
from llmrec.serve.service import Service
from llmrec.testing import tiny_lm, toy_data

ITEMS, EVENTS = toy_data(users=80, items=30, seed=1)


def settings(base, mode, **lm):
    return Config.of(
        {
            "encoder": {"name": "light"},
            "retrieval": {"search": False},
            "lm": {"mode": mode, "base": str(base), "rank": 4, "precision": "float32", "window": 8} | lm,
            "training": {"minutes": None, "steps": 4, "validations": 1, "tokens_per_step": 600},
        }
    )


MODES = {"yes_no": {}, "likelihood": {"normalise": "vocabulary"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"), seed=2, hidden=128)


@pytest.fixture(scope="module", params=MODES)
def saved(request, base, tmp_path_factory):
    """A tuned recommender whose language model has a weight, and its directory."""
    config = settings(base, request.param, candidates=6, listed=6, judged=20, **MODES[request.param])
    rec = Recommender.fit(ITEMS, EVENTS, config)
    rec.finetune()
    rec._state = replace(rec._state, recipe=rec._state.recipe.with_lm(2.0))
    folder = tmp_path_factory.mktemp("model")
    rec.save(folder)
    return rec, folder


def plays(rec):
    """A server in this process that computes what vLLM would, naively, one prompt at a time."""
    words, sent = rec._state.lm.words, []

    def logits(tokens):
        with torch.inference_mode():
            states = words.body(input_ids=torch.tensor([tokens])).last_hidden_state[0]
            return torch.log_softmax(states.float() @ words.head.float().T, dim=-1)

    def answer(request):
        body = json.loads(request.content)
        sent.append((request, body))
        if request.url.path == "/generative_scoring":
            own = [logits([*body["query"], *item])[-1][body["label_token_ids"]] for item in body["items"]]
            data = [{"index": i, "score": float(torch.softmax(o, 0)[0])} for i, o in enumerate(own)]
            return httpx2.Response(200, json={"data": data[::-1]})
        choices = []
        for i, prompt in enumerate(body["prompt"]):
            own = logits(prompt)
            steps = [{str(t): {"logprob": float(own[at, t])}} for at, t in enumerate(prompt[1:])]
            choices.append({"index": i, "prompt_logprobs": [None, *steps]})
        return httpx2.Response(200, json={"choices": choices})

    return httpx2.MockTransport(answer), sent


def with_engine(monkeypatch, transport, **config):
    """Loading makes an engine that talks to this transport."""
    made = Engine("http://engine.test", EngineConfig(**config), transport)
    monkeypatch.setattr("llmrec.score.engine.engine_of", lambda config: made)
    return made


REQUESTS = [
    Request(history=["i3", "i4"], k=8),
    Request(history=["i1"], k=8, query="golden bridge"),
    Request(history=[f"i{n}" for n in range(12)], k=8),
]


def test_answers_are_those_of_the_model_in_this_process(saved, monkeypatch):
    rec, folder = saved
    transport, sent = plays(rec)
    with_engine(monkeypatch, transport)
    remote = Recommender.load(folder)
    for own, other in zip(rec.recommend_many(REQUESTS), remote.recommend_many(REQUESTS), strict=True):
        assert [one.item_id for one in own] == [one.item_id for one in other]
        np.testing.assert_allclose([o.score for o in own], [o.score for o in other], atol=1e-4)
        assert not any(one.degraded for one in other)
    assert sent and all(body["model"] == "rec" for _, body in sent)
    query = [Query(np.array([3, 4], np.int32)), Query(np.array([], np.int32))]
    some = [np.array([5, 2, 9], np.int32), np.array([], np.int32)]
    own, other = (r._state.lm.scorer.score(query, some) for r in (rec, remote))
    np.testing.assert_allclose(own[0], other[0], atol=1e-4)
    assert len(own[1]) == len(other[1]) == 0


def test_it_is_saved_and_grows_and_forgets(saved, monkeypatch, tmp_path):
    rec, folder = saved
    transport, sent = plays(rec)
    with_engine(monkeypatch, transport)
    # What is put goes into the event store of the directory.
    remote = Recommender.load(shutil.copytree(folder, tmp_path / "own"))
    remote.recommend(REQUESTS[0])
    remote.add_items([Item("new", "Brand New Thing")])
    found = remote.rank(["i5", "new"], history=["i3"])
    assert {one.item_id for one in found} == {"i5", "new"}
    before = sent[-1][1]["cache_salt"]
    remote._state.lm.scorer.forget()
    remote.recommend(REQUESTS[0])
    assert sent[-1][1]["cache_salt"] != before, "what the server keeps of a history is found no more"
    for _ in range(4):  # the state that it was loaded from is removed meanwhile
        remote.save(tmp_path / "own")
    monkeypatch.undo()
    again = Recommender.load(tmp_path / "own")
    again.remove_items(["new"])
    own, other = rec.recommend(REQUESTS[0]), again.recommend(REQUESTS[0])
    assert [one.item_id for one in own] == [one.item_id for one in other]


def test_a_server_that_is_not_there_leaves_the_answers_of_retrieval_marked(saved, monkeypatch):
    rec, folder = saved

    def refuse(request):
        raise httpx2.ConnectError("nobody listens")

    with_engine(monkeypatch, httpx2.MockTransport(refuse), timeout_seconds=0.4)
    remote = Recommender.load(folder)
    begun = time.monotonic()
    found = remote.recommend_many(REQUESTS)
    assert time.monotonic() - begun < 5
    plain = rec.recommend_many(REQUESTS, lm=False)
    for own, other in zip(plain, found, strict=True):
        assert [one.item_id for one in own] == [one.item_id for one in other]
        assert all(one.degraded for one in other)
    with pytest.raises(EngineError, match=r"engine\.test gave no scores"):
        remote.rank(["i1", "i2"], history=["i3"])
    with closing(Service(remote, ServeConfig())) as service:
        assert service.recommend(RecommendRequest(history=["i3", "i4"], k=3)).degraded


def test_modes_that_need_more_than_a_server_gives_are_errors(base, tmp_path, monkeypatch):
    rec = Recommender.fit(ITEMS, EVENTS, settings(base, "letters", listed=6, candidates=6, judged=20))
    rec.finetune()
    rec._state = replace(rec._state, recipe=rec._state.recipe.with_lm(2.0))
    rec.save(tmp_path)
    monkeypatch.setenv("LLMREC_ENGINE_URL", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot run the mode letters"):
        Recommender.load(tmp_path).recommend(REQUESTS[0])


def engine(answer, **config):
    return Engine("http://engine.test", EngineConfig(**config), httpx2.MockTransport(answer))


def test_a_busy_server_is_asked_again_and_a_refusal_is_not():
    counted = {"busy": 0, "bad": 0}

    def busy(request):
        counted["busy"] += 1
        return httpx2.Response(503 if counted["busy"] < 3 else 200, json={"fine": True})

    assert engine(busy).ask("/x", [{}]) == [{"fine": True}]
    assert counted["busy"] == 3

    def bad(request):
        counted["bad"] += 1
        return httpx2.Response(404, text="no such adapter")

    with pytest.raises(ModelError, match="404: no such adapter") as caught:
        engine(bad).ask("/x", [{}])
    assert counted["bad"] == 1 and not isinstance(caught.value, EngineError)

    with pytest.raises(EngineError, match="not vLLM's"):
        engine(lambda request: httpx2.Response(200, text="<html>")).ask("/x", [{}])


def test_the_time_is_for_all_attempts_and_requests_go_side_by_side():
    def slow(request):
        time.sleep(0.05)
        return httpx2.Response(503)

    begun = time.monotonic()
    with pytest.raises(EngineError):
        engine(slow, timeout_seconds=0.3, retries=1000).ask("/x", [{}] * 3)
    assert time.monotonic() - begun < 2

    class Dripping(httpx2.SyncByteStream):
        def __iter__(self):
            for _ in range(12):
                time.sleep(0.25)
                yield b" "

    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"within 0\.5 seconds"):
        engine(lambda request: httpx2.Response(200, stream=Dripping()), timeout_seconds=0.5).ask("/x", [{}])
    assert time.monotonic() - begun < 2

    together, most, lock = [0], [0], threading.Lock()

    def counted(request):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.05)
        with lock:
            together[0] -= 1
        return httpx2.Response(200, json={"body": json.loads(request.content)})

    found = engine(counted, connections=4).ask("/x", [{"n": n} for n in range(12)])
    assert [one["body"]["n"] for one in found] == list(range(12))
    assert 2 <= most[0] <= 4


def test_the_key_is_sent_and_settings_are_checked(monkeypatch):
    seen = []

    def answer(request):
        seen.append(request.headers.get("authorization"))
        return httpx2.Response(200, json={})

    monkeypatch.setenv("ENGINE_KEY", "open sesame")
    engine(answer, key_env="ENGINE_KEY").ask("/x", [{}])
    assert seen == ["Bearer open sesame"]
    with pytest.raises(ConfigError, match="NOWHERE, which is not set"):
        engine(answer, key_env="NOWHERE")
    for url in ("ftp://host", "http://user:word@host", "http://user:wo/rd@host", "http://host?x=word"):
        for make in (lambda u: Config.of({"engine": {"url": u}}), lambda u: Engine(u, EngineConfig())):
            with pytest.raises(ConfigError, match="http://host:port") as caught:
                make(url)
            assert "wo" not in str(caught.value).replace("without", "")
    with pytest.raises(ConfigError, match="normalise"):
        Config.of({"lm": {"mode": "yes_no", "normalise": "vocabulary"}})


def test_an_answer_of_another_kind_of_server_is_an_error(saved, monkeypatch):
    _, folder = saved
    with_engine(monkeypatch, httpx2.MockTransport(lambda request: httpx2.Response(200, json={"data": [{}]})))
    remote = Recommender.load(folder)
    with pytest.raises(EngineError, match="not vLLM's"):
        remote.rank(["i1", "i2"], history=["i3"])


@pytest.mark.skipif("LLMREC_ENGINES" not in os.environ, reason="needs vLLM: make test-engines")
def test_a_real_vllm_gives_the_scores_of_this_process(saved, base, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        free_port = free.getsockname()[1]
    rec, folder = saved
    adapter = next(folder.glob("*/adapter"))
    with program("eval/engine").served(base, {"rec": adapter}, free_port, tmp_path / "log") as url:
        remote = Recommender.load(folder, engine=url)
        # The first answers take long: the server compiles.
        remote.config = remote.config.with_flags(engine={"timeout_seconds": 300.0})
        rng = np.random.default_rng(0)
        queries = [Query(rng.permutation(30)[:n].astype(np.int32)) for n in (0, 1, 5, 12)]
        some = [rng.permutation(30)[:9].astype(np.int32) for _ in queries]
        remote._ready(lm=True)
        for _ in range(2):  # the second time from the server's prefix cache
            own, other = (r._state.lm.scorer.score(queries, some) for r in (rec, remote))
            for a, b in zip(own, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)
        assert np.ptp(own[0] - own[1]) > 1e-3, "the history must matter"
        for mine, theirs in zip(rec.recommend_many(REQUESTS), remote.recommend_many(REQUESTS), strict=True):
            assert [one.item_id for one in mine] == [one.item_id for one in theirs]
