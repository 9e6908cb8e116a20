"""The client, blocking and asynchronous, against a real server in a thread."""

import asyncio
import hashlib
import inspect
import socket
import threading
import time
from datetime import UTC, datetime

import numpy as np
import pytest

from llmrec import Event, Item, Recommender
from llmrec.client import AsyncClient, Client
from llmrec.errors import LLMRecError, NotFoundError, OverloadError, RequestError
from llmrec.serve import ServeConfig, create_app
from llmrec.testing import toy_data

pytest.importorskip("fastapi")
import httpx2
import uvicorn

KEY = "a kéy"


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(*toy_data(), {"encoder": {"name": "light", "dim": 16}})


@pytest.fixture(scope="module")
def url(rec):
    key = {"name": "app", "role": "write", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    app = create_app(rec, ServeConfig.of({"keys": [key]}))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


class Blocking:
    """An asynchronous client whose verbs block, so that one test asks both."""

    def __init__(self, url, key):
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, key)

    def __getattr__(self, name):
        verb = getattr(self._client, name)
        return lambda *arguments, **fields: self._runner.run(verb(*arguments, **fields))

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.close()
        self._runner.close()


@pytest.fixture(params=[Client, Blocking])
def client(request, url):
    with request.param(url, KEY) as made:
        yield made


def ids(answer):
    return [r.item_id for r in getattr(answer, "items", answer)]


def test_every_verb_answers_as_the_library_does(rec, client):
    found = client.recommend(user="u1", k=4, where={"brand": "Acme"})
    assert ids(found) == ids(rec.recommend(user="u1", k=4, where={"brand": "Acme"})) and not found.degraded
    assert found.items[0].attributes["brand"] == "Acme" and found.items[0].sources[0].name
    assert ids(client.search("silver river", k=3)) == ids(rec.search("silver river", k=3))
    assert ids(client.recommend(history=("i3", "i4"), exclude=("i5",))) == ids(
        rec.recommend(history=("i3", "i4"), exclude=("i5",))
    )
    assert ids(client.similar("i3", k=3)) == ids(rec.similar("i3", k=3))
    assert ids(client.rank(["i9", "i3"], user="u1")) == ids(rec.rank(["i9", "i3"], user="u1"))
    unlisted = ["i9", Item("ours", "Blue River", attributes={"brand": "Acme"})]
    assert ids(client.rank(unlisted, query="blue river")) == ids(rec.rank(unlisted, query="blue river"))
    assert client.predict(["i9", "i3"], user="u1") == pytest.approx(rec.predict(["i9", "i3"], user="u1"))
    assert ids(client.seeds(k=3, chosen=["i3"])) == ids(rec.seeds(3, ["i3"]))
    told = client.stages(user="u1", k=3)
    assert {stage.name: ids(stage) for stage in told.stages} == {
        n: ids(f) for n, f in rec.stages(user="u1", k=3).items()
    }
    assert told.lm_weight is None
    assert ids(client.complete("silver & r", 2)) == ids(rec.complete("silver & r", 2)) != []
    assert client.attributes()["brand"].different == 4
    assert [r.index for r in client.rerank("river", ["Piano", {"text": "Blue River"}]).results] == [1, 0]
    assert client.embed(["piano"])[0] == pytest.approx(rec.texts.encoder.encode(["piano"])[0].tolist())


def test_what_is_changed_counts(rec, client):
    client.observe("we/ird", "i4")
    assert ids(client.recommend(user="we/ird"))[0] == "i5"
    assert client.forget("we/ird") == 1 and client.forget("we/ird") == 0
    item = Item("n/1", "Zeppelin", attributes={"genres": ("Drama", "Waltz"), "brand": "Acme"})
    assert client.put_item(item) == item
    assert ids(client.search("zeppelin", k=1)) == ["n/1"]
    client.remove_item("n/1")
    assert not rec.catalog.active[rec.catalog.code("n/1")]


@pytest.mark.parametrize("name", [".", "..", "../x", "%2E"])
def test_an_id_that_looks_like_a_path_is_an_id(rec, client, name):
    client.put_item(Item(name, "Zeppelin Dots"))
    assert ids(client.search("zeppelin dots", k=1)) == [name]
    client.remove_item(name)
    client.observe(name, "i4")
    assert client.forget(name) == 1 and rec.history(name) == []


def test_an_event_that_is_sent_again_counts_once(client):
    sent = [client.observe("again", "i4", event_id="a"), client.observe("again", "i4", event_id="a")]
    assert sent == [True, False] and client.forget("again") == 1


def test_many_events_and_a_history(rec, client):
    noon = datetime(2040, 1, 1, 12, tzinfo=UTC)
    events = [Event("many", "i4", 5), Event("many", "i6", noon, event_id="b", event="buy")]
    assert client.observe_many(iter(events)) == 2 and client.observe_many(events[1:]) == 0
    assert [(e.item_id, e.timestamp) for e in client.history("many")] == [
        ("i4", 5),
        ("i6", int(noon.timestamp())),
    ]
    assert [e.title for e in client.history("many", 1)] == [rec.catalog.titles[rec.catalog.code("i6")]]
    for wrong in (events[0], [{"user_id": "many", "item_id": "i4"}]):
        with pytest.raises(RequestError, match="events"):
            client.observe_many(wrong)
    assert client.forget("many") == 2


def test_what_the_library_takes_as_ids_the_client_takes(rec, client):
    found = client.recommend(
        history=np.array(["i4", "i5"]), exclude={"i6"}, where={"brand": {"in": {"Acme"}}}
    )
    expected = rec.recommend(history=["i4", "i5"], exclude={"i6"}, where={"brand": "Acme"})
    assert ids(found) == [r.item_id for r in expected]
    events = [Event("me", "i4"), "i5"]
    assert ids(client.recommend(history=events)) == [r.item_id for r in rec.recommend(history=events)]
    assert client.put_item(Item(5, "Number Five")).item_id == "5"
    assert client.similar(5).items is not None and client.forget(5) == 0
    assert "5" in ids(client.rank([5, Item(6, "Six")]))
    client.remove_item(5)
    assert ids(client.recommend(user=1)) == [r.item_id for r in rec.recommend(user=1)]
    for ask in (client.predict, client.rank, client.embed):
        with pytest.raises(RequestError, match="list of"):
            ask("i4")


def test_what_cannot_be_sent_is_refused(client):
    for call in (
        lambda: client.forget("\ud800"),
        lambda: client.complete("\ud800"),
        lambda: client.recommend(query="\ud800"),
        lambda: client.observe("\ud800", "i4"),
        lambda: client.recommend(user=10**5000),
    ):
        with pytest.raises(RequestError, match=r"surrogate|digits|unicode"):
            call()


def test_fields_of_a_newer_server_are_left_aside_and_a_page_is_no_answer():
    answers = iter(['{"items": [], "degraded": false, "mood": "good"}', "<html>proxy</html>"])
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=next(answers)))
    with Client("http://shop", transport=transport) as client:
        assert client.recommend().items == []
        with pytest.raises(LLMRecError, match="no answer of a recommender: <html>"):
            client.recommend()


def test_errors_are_those_of_the_library(client, url, request):
    with pytest.raises(RequestError, match="unknown: 'nowhere'"):
        client.recommend(history=["nowhere"])
    with pytest.raises(RequestError, match="usr"):
        client.recommend(usr="u1")
    with pytest.raises(NotFoundError, match="unknown item 'nowhere'"):
        client.remove_item("nowhere")
    with Client(url, "another key") as stranger, pytest.raises(RequestError, match="needs a key"):
        stranger.recommend()


@pytest.mark.parametrize(
    "status,headers,body,error,words",
    [
        (
            503,
            {"retry-after": "7"},
            {"detail": "too much", "code": "OverloadError"},
            OverloadError,
            "too much",
        ),
        (500, {}, {"detail": "inside", "code": "internal"}, LLMRecError, r"inside \(status 500\)"),
        (502, {}, "<html>", LLMRecError, "answered 502: <html>"),
    ],
)
def test_what_a_server_in_trouble_says(status, headers, body, error, words):
    def answer(request):
        if isinstance(body, str):
            return httpx2.Response(status, text=body)
        return httpx2.Response(status, headers=headers, json={"title": "t", "status": status, **body})

    with Client("http://there", transport=httpx2.MockTransport(answer)) as client:
        with pytest.raises(error, match=words) as raised:
            client.recommend(user="u1")
        assert getattr(raised.value, "retry_after", 7) == 7


def test_both_clients_have_the_same_verbs():
    def verbs(client):
        return {
            name: str(inspect.signature(function))
            for name, function in vars(client).items()
            if inspect.isfunction(function) and not name.startswith("_")
        }

    assert verbs(Client) == verbs(AsyncClient) and len(verbs(Client)) == 18
