"""HTTP: every endpoint, every refusal, keys, the OpenAPI document, and a real server process."""

import asyncio
import concurrent.futures
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmrec import Recommender
from llmrec.cli_serve import listen
from llmrec.errors import OverloadError, StoreError
from llmrec.serve import ServeConfig, create_app
from llmrec.testing import toy_data

pytest.importorskip("fastapi")
import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from starlette.testclient import TestClient

LIGHT = {"encoder": {"name": "light", "dim": 16}}
URL = "http://127.0.0.1:8000"
OPENAPI = Path(__file__).parent.parent / "llmrec" / "serve" / "openapi.json"
READ, WRITE = "key that reads", "key that writes"
KEYS = [
    {"name": role, "role": role, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    for role, key in (("read", READ), ("write", WRITE))
]


def fit():
    return Recommender.fit(*toy_data(), LIGHT)


@pytest.fixture(scope="module")
def rec():
    return fit()


@pytest.fixture(scope="module")
def http(rec):
    with TestClient(create_app(rec), base_url=URL) as client:
        yield client


def client_of(rec, **values):
    return TestClient(create_app(rec, ServeConfig.of(values)), base_url=URL, raise_server_exceptions=False)


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [one["item_id"] for one in answer.json()["items"]]


def wait_until_ready(get):
    for _ in range(600):
        if get("/ready").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError(get("/ready").text)


# ---- what works ----------------------------------------------------------------------------------------


def test_the_verbs_answer_as_the_library_does(rec, http):
    def expect(found):
        return [r.item_id for r in found]

    asked = {"user": "u1", "k": 4, "where": {"brand": ["Acme", "Dune"]}, "exclude": ["i0"]}
    answer = http.post("/v1/recommend", json=asked)
    assert ids(answer) == expect(rec.recommend(**asked))
    first = answer.json()["items"][0]
    assert first["rank"] == 1 and first["title"] and first["sources"][0]["name"]
    assert isinstance(first["attributes"]["genres"], list)
    assert answer.json()["degraded"] is False
    assert ids(http.post("/v1/recommend", json={})) == expect(rec.recommend())
    ruled = {"user": "u1", "k": 6, "caps": {"brand": 1}, "pins": ["i7"], "diversity": 0.3, "explain": True}
    shown, expected = http.post("/v1/recommend", json=ruled).json()["items"], rec.recommend(**ruled)
    assert [item["item_id"] for item in shown] == [r.item_id for r in expected] and shown[0][
        "item_id"
    ] == "i7"
    for item, r in zip(shown, expected, strict=True):
        assert item["reason"]["sentence"] == r.reason.sentence
        amounts = [influence["amount"] for influence in item["reason"].get("history", [])]
        assert amounts == pytest.approx([influence.amount for influence in r.reason.history])
    asked = {"query": "silver river", "user": "u1", "k": 3}
    assert ids(http.post("/v1/search", json=asked)) == expect(rec.search("silver river", user="u1", k=3))
    assert ids(http.post("/v1/similar", json={"item_id": "i3", "k": 5})) == expect(rec.similar("i3", 5))
    asked = {"items": ["i9", "i3", "i20"], "history": ["i2"]}
    assert ids(http.post("/v1/rank", json=asked)) == expect(rec.rank(**asked))
    p = http.post("/v1/predict", json=asked).json()["probabilities"]
    assert p == pytest.approx(rec.predict(**asked))


def test_rerank_has_the_shape_of_cohere_and_jina(http):
    for path in ("/v1/rerank", "/v2/rerank"):
        body = {"model": "rerank-v3", "query": "river", "documents": ["Piano", {"text": "Blue River"}]}
        answer = http.post(path, json={**body, "return_documents": True, "max_chunks_per_doc": 3}).json()
        assert [r["index"] for r in answer["results"]] == [1, 0]
        assert answer["results"][0]["document"]["text"] == "Blue River"
        assert 1 >= answer["results"][0]["relevance_score"] > answer["results"][1]["relevance_score"] >= 0
        assert answer["id"] and answer["model"] == "rerank-v3"
        short = http.post(path, json={**body, "top_n": 1}).json()
        assert len(short["results"]) == 1 and "document" not in short["results"][0]
    body = {"user": "u1", "documents": [{"id": "i3"}, {"id": "i9"}], "return_documents": True}
    first = http.post("/v2/rerank", json=body).json()["results"][0]["document"]
    assert first["id"] in ("i3", "i9") and first["text"]


def test_rerank_of_texts_has_the_shape_of_text_embeddings_inference(http):
    asked = {"query": "river", "texts": ["Piano", "Blue River"], "raw_scores": False}
    answer = http.post("/rerank", json=asked).json()
    assert [one["index"] for one in answer] == [1, 0] and set(answer[0]) == {"index", "score"}
    answer = http.post("/rerank", json={**asked, "query": "", "history": ["i3"], "return_text": True})
    assert {one["text"] for one in answer.json()} == {"Piano", "Blue River"}


def test_embeddings_have_the_shape_of_openai(rec, http):
    answer = http.post("/v1/embeddings", json={"input": ["river", "piano"], "model": "m", "user": "x"}).json()
    assert answer["object"] == "list" and answer["model"] == "m" and answer["usage"]["total_tokens"] == 2
    assert [one["index"] for one in answer["data"]] == [0, 1]
    assert answer["data"][1]["embedding"] == pytest.approx(rec.texts.encoder.encode(["piano"])[0].tolist())


def test_events_items_and_users_change_what_is_answered():
    with client_of(fit()) as http:
        event = {"user_id": "new/1", "item_id": "i4"}
        assert http.post("/v1/events", json=event).json() == {"events": 1}
        many = [{**event, "item_id": "i5", "timestamp": 1_800_000_000}, {**event, "weight": 2.0}]
        assert http.post("/v1/events", json=many).status_code == 201
        assert ids(http.post("/v1/recommend", json={"user": "new/1"}))[0] == "i6"
        item = {"title": "Zeppelin Waltz", "attributes": {"brand": "Acme", "genres": ["Drama"]}}
        put = http.put("/v1/items/a%2Fb%20c", json=item)
        assert put.status_code == 201 and put.json()["item_id"] == "a/b c"
        assert http.put("/v1/items/a%2Fb%20c", json=item).status_code == 200
        assert ids(http.post("/v1/search", json={"query": "zeppelin", "k": 1})) == ["a/b c"]
        gone = http.delete("/v1/items/a%2Fb%20c")
        assert gone.status_code == 204 and gone.content == b""
        assert "a/b c" not in ids(http.post("/v1/search", json={"query": "zeppelin"}))
        assert http.delete("/v1/users/new%2F1").json() == {"events": 3}
        assert http.delete("/v1/users/new%2F1").json() == {"events": 0}


def test_events_that_are_sent_again_count_once():
    with client_of(fit()) as http:
        event = {"user_id": "new", "item_id": "i4"}
        many = [{**event, "item_id": f"i{n}", "timestamp": n} for n in range(3)]

        def post(body, key=None):
            return http.post("/v1/events", json=body, headers={"Idempotency-Key": key} if key else {})

        assert post(event, "first").json() == {"events": 1}
        assert post(event, "first").json() == {"events": 1, "repeated": 1}
        assert post(many, "second").json() == {"events": 3}
        assert post(many, "second").json() == {"events": 3, "repeated": 3}
        assert post([{**event, "event_id": "mine"}, {**event, "event_id": "mine"}], "third").json() == {
            "events": 2,
            "repeated": 1,
        }
        taken = post({**event, "item_id": "i9"}, "first")
        assert taken.status_code == 422 and "is taken by an event with item 'i4'" in taken.json()["detail"]
        assert post(event, "x" * 201).status_code == 422
        assert http.delete("/v1/users/new").json() == {"events": 5}


def test_an_event_counts_as_its_type_does():
    items, events = toy_data()
    rows = [replace(event, event="buy") for event in events]
    weighted = {**LIGHT, "data": {"event_weights": {"buy": 2, "view": 0.5, "skip": 0}}}
    rec = Recommender.fit(items, rows, weighted)
    with TestClient(create_app(rec), base_url=URL) as http:
        sent = [
            {"user_id": "me", "item_id": "i1", "timestamp": at, "event": kind}
            for at, kind in enumerate(("view", "skip", "buy"))
        ]
        assert http.post("/v1/events", json=sent).json() == {"events": 3, "repeated": 1}
        assert [e.weight for e in rec.history("me")] == [0.5, 2.0]
        refused = http.post("/v1/events", json={**sent[0], "event": "wish"})
        assert refused.status_code == 422 and "'wish' has no weight" in refused.json()["detail"]
        heavy = http.post("/v1/events", json={**sent[2], "weight": 900})
        assert heavy.status_code == 422 and "above 1,000" in heavy.json()["detail"]


def test_a_store_that_cannot_be_used_is_told_without_where_it_is(rec, monkeypatch, caplog):
    def fail(*arguments):
        raise StoreError("the event store at db.internal cannot be used")

    monkeypatch.setattr(rec, "observe_many", fail)
    with client_of(rec) as http:
        answer = http.post("/v1/events", json={"user_id": "u1", "item_id": "i1"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["code"] == "StoreError" and "db.internal" not in answer.text
    assert "db.internal" in caplog.text


def test_a_key_of_any_letters_opens(rec):
    key = "ключ-🔑"
    keys = [{"name": "app", "sha256": hashlib.sha256(key.encode()).hexdigest()}]
    with client_of(rec, keys=keys) as http:
        for header, value in (("Authorization", f"Bearer {key}"), ("X-API-Key", key)):
            assert http.post("/v1/recommend", json={}, headers={header: value.encode()}).status_code == 200
        wrong = {"X-API-Key": "ключ".encode("cp1251")}
        assert http.post("/v1/recommend", json={}, headers=wrong).status_code == 401


def test_health_readiness_and_metrics(rec):
    with client_of(rec) as http:
        assert http.get("/health").json()["status"] == "ok"
        wait_until_ready(http.get)
        http.post("/v1/recommend", json={})
        http.get("/nowhere/u1")
        shown = http.get("/metrics")
        assert shown.headers["content-type"].startswith("text/plain")
        assert 'llmrec_requests_total{method="POST",route="/v1/recommend",status="200"} 1.0' in shown.text
        assert 'llmrec_requests_total{method="GET",route="other",status="404"} 1.0' in shown.text
        assert "llmrec_batch_size_count 2.0" in shown.text
        assert 'llmrec_pending{lane="plain"} 0.0' in shown.text
    starting = TestClient(create_app(rec), base_url=URL)
    assert starting.get("/ready").status_code == 503


def test_a_catalogue_can_be_browsed(rec, http):
    items = http.get("/v1/items", params={"prefix": "silver r", "k": 3}).json()["items"]
    assert [one["item_id"] for one in items] == [item.item_id for item in rec.complete("silver r", 3)]
    assert items[0]["title"] == "Silver River" and items[0]["attributes"]["genres"]
    assert len(http.get("/v1/items").json()["items"]) == 10
    one = http.get(f"/v1/items/{items[0]['item_id']}").json()
    assert one["title"] == "Silver River" and one["active"] is True
    about = http.get("/v1/attributes").json()["attributes"]
    assert set(about) == {"genres", "year", "brand"} and about["year"]["min"] >= 1950
    counted = rec.catalog.counts("brand")
    assert {v["value"]: v["items"] for v in about["brand"]["frequent"]} == dict(counted)
    past = http.get("/v1/users/u1/history", params={"k": 2}).json()["events"]
    assert [(e["item_id"], e["timestamp"]) for e in past] == [
        (e.item_id, e.timestamp) for e in rec.history("u1", 2)
    ]
    assert past[0]["title"] == rec.catalog.titles[rec.catalog.code(past[0]["item_id"])]
    assert http.get("/v1/users/nobody/history").json() == {"events": []}
    listed = http.get("/v1/users", params={"prefix": "u1", "k": 20}).json()["users"]
    assert listed == sorted(f"u{n}" for n in range(60) if str(n).startswith("1"))


def test_seeds_and_stages_are_those_of_the_library(rec, http):
    body = {"k": 4, "chosen": ["i3"], "passed": ["i9"], "where": {"brand": ["Acme", "Dune"]}}
    assert ids(http.post("/v1/seeds", json=body)) == [r.item_id for r in rec.seeds(**body)]
    asked = {"history": ["i3", "i5"], "k": 4, "explain": True}
    answer = http.post("/v1/stages", json=asked).json()
    assert "lm_weight" not in answer, "there is no language model"
    expected = rec.stages(**asked)
    assert [stage["name"] for stage in answer["stages"]] == list(expected)
    for stage in answer["stages"]:
        assert stage["ms"] > 0
        assert [i["item_id"] for i in stage["items"]] == [r.item_id for r in expected[stage["name"]]]
        assert all(item["reason"]["sentence"] for item in stage["items"])


def test_ids_that_no_store_can_hold_are_refused(http):
    for call in (
        lambda: http.post("/v1/events", json={"user_id": "a\0b", "item_id": "i1"}),
        lambda: http.post("/v1/events", json={"user_id": "a", "item_id": "i1", "event_id": "x\0"}),
        lambda: http.post("/v1/recommend", json={"user": "a\0b"}),
        lambda: http.put("/v1/items/a%00b", json={"title": "x"}),
    ):
        answer = call()
        assert answer.status_code == 422 and "NUL" in answer.text, answer.text


def test_what_is_served_is_told_to_each_key_by_its_role(rec):
    with client_of(rec, keys=KEYS, max_k=7) as http:
        for key, role in ((READ, "read"), (WRITE, "write")):
            head = {"Authorization": f"Bearer {key}"}
            about = http.get("/v1/about", headers=head).json()
            assert about["role"] == role and about["limits"]["max_k"] == 7
            assert about["language_model"] == "none" and about["items"] == 40
            assert http.get("/v1/users?k=5", headers=head).status_code == (200 if role == "write" else 403)
            assert http.get("/v1/items", params={"k": 8}, headers=head).status_code == 422
        for path in ("/v1/about", "/v1/items", "/v1/items/i1", "/v1/attributes", "/v1/users/u1/history"):
            assert http.get(path).status_code == 401


def test_the_page_and_its_files_are_served_to_everyone_and_may_load_nothing_else(rec):
    with client_of(rec, keys=KEYS) as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        files = re.findall(r'(?:href|src)="(/page/[^"]+)"', page.text)
        modules = http.get("/page/app.js").text
        files += [f"/page/{name}" for name in re.findall(r'from "\./([a-z]+\.js)"', modules)]
        assert len(files) >= 6 and not re.search(
            r"<script(?![^>]*\bsrc=)|<style|\bon[a-z]+=| style=", page.text
        )
        for path in ("/", *files):
            answer = http.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            tag = answer.headers["etag"]
            again = http.get(path, headers={"If-None-Match": tag})
            assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
            assert http.get(path, headers={"If-None-Match": '"old"'}).status_code == 200
        for path in ("/page/", "/page/nothing.js", "/page/..%2Fhttp.py", "/page/__init__.py"):
            assert http.get(path).status_code == 404
        assert http.post("/").status_code == 405


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method,path,body,status,words",
    [
        ("POST", "/v1/recommend", {"k": 101}, 422, "k may be 100 at most, got 101"),
        ("POST", "/v1/recommend", {"k": 0}, 422, "body/k"),
        ("POST", "/v1/recommend", {"k": "5"}, 422, "body/k"),
        ("POST", "/v1/recommend", {"usr": "u1"}, 422, "body/usr"),
        ("POST", "/v1/recommend", {"user": "u1", "history": []}, 422, "not both"),
        ("POST", "/v1/recommend", {"history": ["i1"] * 1001}, 422, "1,000 entries at most"),
        ("POST", "/v1/recommend", {"history": ["nowhere"]}, 422, "unknown: 'nowhere'"),
        ("POST", "/v1/recommend", {"where": {"colour": "red"}}, 422, "colour"),
        ("POST", "/v1/recommend", {"budget_ms": 0}, 422, "budget_ms"),
        ("POST", "/v1/search", {"query": "  "}, 422, "body/query"),
        ("POST", "/v1/similar", {"item_id": "nowhere"}, 422, "unknown item 'nowhere'"),
        ("POST", "/v1/rank", {"items": ["i1", "i1"]}, 422, "twice"),
        ("POST", "/v1/rank", {"items": ["i1"] * 1001}, 422, "1,000 entries at most"),
        ("POST", "/v1/predict", {"items": ["nowhere"]}, 422, "nowhere"),
        ("POST", "/v1/rerank", {"documents": ["a"]}, 422, "relevant to what"),
        ("POST", "/v1/embeddings", {"input": [], "model": "m"}, 422, "empty list"),
        ("POST", "/v1/events", {"user_id": " ", "item_id": "i1"}, 422, "user_id"),
        ("POST", "/v1/events", [{"user_id": "u1", "item_id": "nowhere"}], 422, "nowhere"),
        ("PUT", "/v1/items/i1", {"title": " "}, 422, "title"),
        ("PUT", "/v1/items/i1", {"title": "a", "attributes": {"year": "soon"}}, 422, "year"),
        ("POST", "/v1/seeds", {"chosen": ["i1"], "passed": ["i1"]}, 422, "both chosen and passed"),
        ("POST", "/v1/seeds", {"chosen": ["i1"] * 1001}, 422, "1,000 entries at most"),
        ("POST", "/v1/stages", {"k": 101}, 422, "k may be 100 at most, got 101"),
        ("POST", "/v1/stages", {"where": {"colour": "red"}}, 422, "colour"),
        ("GET", "/v1/items?k=0", None, 422, "query/k"),
        ("GET", "/v1/items?k=101", None, 422, "k may be 100 at most"),
        ("GET", "/v1/items?start=a", None, 422, "query/start"),
        ("GET", "/v1/items/nowhere", None, 404, "unknown item 'nowhere'"),
        ("GET", "/v1/users/u1/history?k=x", None, 422, "query/k"),
        ("DELETE", "/v1/items/nowhere", None, 404, "unknown item 'nowhere'"),
        ("GET", "/v1/recommend", None, 405, "Method Not Allowed"),
        ("GET", "/nowhere", None, 404, "Not Found"),
    ],
)
def test_a_refusal_is_a_problem_in_the_words_of_the_library(http, method, path, body, status, words):
    answer = http.request(method, path, json=body, headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine-1"
    problem = answer.json()
    assert problem["type"] == "about:blank" and problem["status"] == status and problem["title"]
    assert problem["request_id"] == "mine-1" and problem["code"]
    assert words in problem["detail"]
    assert "Traceback" not in answer.text


def test_what_is_not_json_is_a_problem_too(http):
    head = {"content-type": "application/json"}
    for body in (b"{", b"[" * 100_000, b'{"query": "\\ud800"}', b"\xff\xfe", b'{"k": 1e999}'):
        answer = http.post("/v1/recommend", content=body, headers=head)
        assert answer.status_code in (400, 422), body[:20]
        assert answer.headers["content-type"] == "application/problem+json"
    half = b'{"query": "a", "documents": ["\\uD83D"], "return_documents": true}'
    assert http.post("/v1/rerank", content=half, headers=head).status_code == 400
    whole = half.replace(b"D83D", b"D83D\\ude00")
    assert (
        http.post("/v1/rerank", content=whole, headers=head).json()["results"][0]["document"]["text"] == "😀"
    )


def test_request_ids_come_back_or_are_made(http):
    for bad in ("bad id", "x" * 200, "a\tb", ""):
        assert re.fullmatch(
            "[0-9a-f]{32}", http.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        )
    assert http.get("/health").headers["x-request-id"] != http.get("/health").headers["x-request-id"]


def test_a_body_over_the_limit_is_refused_said_or_streamed(rec):
    with client_of(rec, max_body=2000) as http:
        fits = json.dumps({"query": "x" * 1900})
        assert http.post("/v1/recommend", content=fits).status_code in (200, 422)
        large = b" " * 3000
        assert http.post("/v1/recommend", content=large).status_code == 413
        streamed = http.post("/v1/recommend", content=(large[:700] for _ in range(4)))
        assert streamed.status_code == 413 and "2,000 bytes" in streamed.json()["detail"]
        assert http.post("/mcp", content=large).status_code == 413
        # Who has no key sends nothing.
        for path in ("/health", "/page/docs.js"):
            assert http.request("GET", path, content=b"x").status_code == 413
            assert http.request("GET", path, content=(b"x" for _ in range(2))).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(rec, monkeypatch):
    monkeypatch.setattr("llmrec.serve.gate.BODY_SECONDS", 0.1)
    told = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        told.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "headers": [(b"host", b"localhost")]}
    asyncio.run(create_app(rec)(scope, receive, send))
    assert told[0]["status"] == 408 and (b"connection", b"close") in told[0]["headers"]


def test_texts_that_take_long_to_read_hold_up_nobody(http):
    begun = time.monotonic()
    brand = {"where": {"brand": ["<br " + "=" * 19_990] * 20}}
    assert http.post("/v1/search", json={"query": "river", **brand}).status_code == 200
    heap = "a" + "\u0301\u0316" * 40_000
    assert http.post("/v1/embeddings", json={"model": "m", "input": heap}).status_code == 200
    many = {"item_id": "x", "title": "River", "attributes": {f"name {n}": "x" for n in range(900)}}
    assert http.post("/v1/rank", json={"items": [many]}).status_code == 200
    assert time.monotonic() - begun < 10
    many["attributes"] |= {f"more {n}": "x" for n in range(200)}
    refused = http.post("/v1/rank", json={"items": [many]})
    assert refused.status_code == 422 and "1,000 at most" in refused.json()["detail"]


def test_the_page_of_the_api_is_this_servers_own(http):
    page = http.get("/docs")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("docs.html", "docs.js"):
        assert not re.search(r"https?://|//cdn", http.get(f"/page/{name}").text)


def test_large_whole_numbers_come_back_and_attributes_need_names():
    items, events = toy_data()
    large = 123456789012345670
    items = [replace(item, attributes={**item.attributes, "seller": large}) for item in items]
    with TestClient(create_app(Recommender.fit(items, events, LIGHT)), base_url=URL) as http:
        shown = [
            http.get("/v1/items/i1").json(),
            http.post("/v1/recommend", json={"k": 1}).json()["items"][0],
        ]
        assert [one["attributes"]["seller"] for one in shown] == [large, large]
        for name in ("", " "):
            body = {"title": "a", "attributes": {name: "x", "column_3": "y"}}
            assert http.put("/v1/items/a", json=body).status_code == 422
        assert http.post("/mcp", json={}, headers={"Host": "127.0.0.1"}).status_code != 421


def test_keys_open_what_their_role_allows(rec):
    event = {"user_id": "keyed", "item_id": "i1"}
    with client_of(rec, keys=KEYS, host="0.0.0.0") as http:

        def ask(method, path, key=None, body=None, header="Authorization"):
            value = f"Bearer {key}" if header == "Authorization" else key
            return http.request(method, path, json=body, headers={header: value} if key else {})

        for path in ("/health", "/ready", "/openapi.json", "/docs"):
            assert http.get(path).status_code in (200, 503)
        for method, path in (("POST", "/v1/recommend"), ("GET", "/metrics"), ("POST", "/mcp"), ("GET", "/x")):
            for key in (None, "wrong", READ.upper()):
                refused = ask(method, path, key, {})
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["code"] == "unauthorized"
        assert ask("POST", "/v1/recommend", READ, {}).status_code == 200
        assert ask("POST", "/v1/recommend", READ, {}, header="X-API-Key").status_code == 200
        for method, path, body in (
            ("POST", "/v1/events", event),
            ("PUT", "/v1/items/i1", {"title": "a"}),
            ("DELETE", "/v1/items/i1", None),
            ("DELETE", "/v1/users/u1", None),
        ):
            refused = ask(method, path, READ, body)
            assert refused.status_code == 403 and "role write" in refused.json()["detail"]
        assert rec.history("keyed") == [] and rec.history("u1")
        assert ask("POST", "/v1/events", WRITE, event).status_code == 201
        assert rec.forget("keyed") == 1


def test_without_keys_a_page_of_another_site_gets_nothing(rec):
    with client_of(rec) as http:
        for host in ("evil.example", "evil.example:8000", "", "127.0.0.1.evil.example", "[", "10.0.0.1"):
            for path in ("/v1/recommend", "/mcp", "/v1/users/u1"):
                answer = http.request("DELETE" if "u1" in path else "POST", path, headers={"Host": host})
                assert answer.status_code == 421 and "add a key" in answer.json()["detail"]
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]"):
            assert http.post("/v1/recommend", json={}, headers={"Host": host}).status_code == 200
        for said in ("Forwarded", "X-Forwarded-For"):
            answer = http.post("/v1/recommend", json={}, headers={said: "203.0.113.9"})
            assert answer.status_code == 421 and "add a key" in answer.json()["detail"]
        elsewhere = TestClient(http.app, base_url=URL, client=("203.0.113.9", 5555))
        assert elsewhere.post("/v1/recommend", json={}).status_code == 421
        mapped = TestClient(http.app, base_url=URL, client=("::ffff:127.0.0.1", 5555))
        assert mapped.post("/v1/recommend", json={}).status_code == 200
        assert elsewhere.get("/health").status_code == 200
        # What a form can send without asking first.
        event = json.dumps({"user_id": "forged", "item_id": "i1"})
        assert (
            http.post("/v1/events", content=event, headers={"Content-Type": "text/plain"}).status_code == 422
        )
    assert rec.history("forged") == []


def test_an_overloaded_server_says_when_to_come_back_and_a_broken_one_says_little(rec, monkeypatch):
    with client_of(rec) as http:
        service = http.app.state.service

        def refuse(body):
            raise OverloadError("too much", 7)

        monkeypatch.setattr(service, "begin", refuse)
        answer = http.post("/v1/recommend", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")

        def fail(body):
            raise ValueError("a secret of the server")

        monkeypatch.setattr(service, "begin", fail)
        answer = http.post("/v1/recommend", json={}, headers={"X-Request-ID": "mine-2"})
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine-2"
        assert "mine-2" in answer.json()["detail"] and "secret" not in answer.text


def test_a_slow_verb_does_not_hold_up_the_others(rec, monkeypatch):
    started, open_ = threading.Event(), threading.Event()
    with client_of(rec) as http, concurrent.futures.ThreadPoolExecutor() as threads:

        def slow(*arguments):
            started.set()
            assert open_.wait(30)
            return []

        monkeypatch.setattr(rec, "similar", slow)
        waiting = threads.submit(http.post, "/v1/similar", json={"item_id": "i1"})
        assert started.wait(30)
        assert http.get("/health").status_code == 200
        assert ids(http.post("/v1/recommend", json={"user": "u1"}))
        assert not waiting.done()
        open_.set()
        assert waiting.result(30).json()["items"] == []


def test_concurrent_requests_share_calls(rec, monkeypatch):
    sizes, many = [], rec.recommend_many

    def counted(requests, *, lm=True):
        sizes.append(len(requests))
        time.sleep(0.05)
        return many(requests, lm=lm)

    expected = {n: [r.item_id for r in rec.recommend(user=f"u{n}", k=3)] for n in range(24)}
    with client_of(rec) as http, concurrent.futures.ThreadPoolExecutor(24) as threads:
        wait_until_ready(http.get)
        monkeypatch.setattr(rec, "recommend_many", counted)
        asked = {
            n: threads.submit(http.post, "/v1/recommend", json={"user": f"u{n}", "k": 3}) for n in expected
        }
        assert {n: ids(future.result(60)) for n, future in asked.items()} == expected
    assert sum(sizes) == 24 and len(sizes) <= 12


# ---- the document --------------------------------------------------------------------------------------


def test_the_checked_in_openapi_document_is_the_one_that_is_served(http):
    served = http.get("/openapi.json").json()
    if os.environ.get("WRITE_OPENAPI"):
        OPENAPI.write_text(json.dumps(served, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(OPENAPI.read_text(encoding="utf-8"))
    assert kept == served, "write it again: WRITE_OPENAPI=1 pytest tests/test_http.py -k openapi"


def test_the_document_names_limits_examples_keys_and_errors(rec):
    document = create_app(rec, ServeConfig(max_k=7, max_history=9)).openapi()
    schemas = document["components"]["schemas"]
    assert schemas["RecommendRequest"]["properties"]["k"]["maximum"] == 7
    assert schemas["RecommendRequest"]["properties"]["history"]["anyOf"][0]["maxItems"] == 9
    assert "x-limit" not in json.dumps(document)
    answers = document["paths"]["/v1/recommend"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "408", "413", "421", "422", "500", "503"}
    assert list(answers["422"]["content"]) == ["application/problem+json"]


def test_every_example_in_the_document_is_answered(http):
    document = json.loads(OPENAPI.read_text(encoding="utf-8"))
    tried = 0
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is None or path == "/v1/events":
            continue
        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for example in document["components"]["schemas"][name]["examples"]:
            answer = http.post(path, json=example)
            assert answer.status_code == 200, (path, example, answer.text)
            tried += 1
    assert tried >= 10


@pytest.fixture(scope="module")
def api():
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(fit(), ServeConfig.of({"keys": KEYS})))


def test_whatever_the_document_allows_is_answered_as_it_says(api):
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) == 24
    for operation, mode in itertools.product(operations, schemathesis.GenerationMode):
        if mode.is_negative and operation.method == "get" and not operation.query:
            continue  # nothing in these requests can be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case):
            case.call_and_validate(
                headers={"Authorization": f"Bearer {WRITE}"},
                checks=[
                    checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                    checks.negative_data_rejection,
                ],
            )

        check()


# ---- a real process ------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "llmrec.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    made = fit()
    made.save(folder)
    made.close()
    return folder


def test_the_command_serves_until_it_is_told_to_end(saved):
    process = subprocess.Popen(command("serve", saved, "--port", 0), stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline()).group()
        with httpx2.Client(base_url=url, timeout=60) as http:
            wait_until_ready(http.get)
            assert len(http.post("/v1/recommend", json={"user": "u1", "k": 3}).json()["items"]) == 3
            assert http.post("/v1/events", json={"user_id": "live", "item_id": "i3"}).status_code == 201
            assert http.put("/v1/items/new", json={"title": "Zeppelin"}).status_code == 201
            assert http.delete("/v1/items/i7").status_code == 204
    finally:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    again = Recommender.load(saved)
    assert [e.item_id for e in again.history("live")] == ["i3"]
    assert (
        again.search("zeppelin", k=1)[0].item_id == "new"
        and not again.catalog.active[again.catalog.code("i7")]
    )
    again.close()


@pytest.fixture
def server(saved):
    """Start servers of the saved model in processes of their own."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            command("serve", saved, "--port", 0, *arguments), stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline()).group()
        http = httpx2.Client(base_url=url, timeout=60)
        wait_until_ready(http.get)
        return process, http

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_servers_of_one_model_see_what_the_other_is_told_and_a_kill_loses_nothing(server, saved):
    (first, one), (second, two) = server(), server()
    assert one.post("/v1/events", json={"user_id": "shared", "item_id": "i3"}).status_code == 201
    assert ids(two.post("/v1/recommend", json={"user": "shared"}))[0] == "i4"
    assert two.post("/v1/events", json={"user_id": "shared", "item_id": "i4"}).status_code == 201
    assert ids(one.post("/v1/recommend", json={"user": "shared"}))[0] == "i5"
    assert one.put("/v1/items/of-one", json={"title": "Zeppelin One"}).status_code == 201
    assert two.put("/v1/items/of-two", json={"title": "Zeppelin Two"}).status_code == 201
    assert two.delete("/v1/items/i9").status_code == 204
    both = {"of-one", "of-two"}
    for http in (one, two):
        for _ in range(100):
            found = http.post("/v1/search", json={"query": "zeppelin", "k": 40})
            if both <= set(ids(found)):
                break
            time.sleep(0.1)
        assert both <= set(ids(found)) and "i9" not in ids(found)
    first.kill()
    second.kill()
    again = Recommender.load(saved)
    assert both <= set(again.catalog.ids) and not again.catalog.active[again.catalog.code("i9")]
    assert [e.item_id for e in again.history("shared")] == ["i3", "i4"]
    again.remove_items(sorted(both))
    again.forget("shared")
    again.close()


def test_the_end_of_a_server_leaves_alone_what_another_process_saved(server, saved):
    process, http = server()
    assert http.put("/v1/items/late", json={"title": "Zeppelin Late"}).status_code == 201
    other = Recommender.load(saved)
    other.refit()
    other.save(saved)
    other.close()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "another process has fitted or fine-tuned" in stderr, stderr
    again = Recommender.load(saved)
    assert again._model == other._model and again.search("zeppelin late", k=1)[0].item_id == "late"
    again.remove_items(["late"])
    again.close()


def test_the_command_refuses_what_it_must_in_one_line(saved, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text("max_k = 0\n")
    for arguments, words in (
        (("serve", saved, "--host", "0.0.0.0"), "add a key"),
        (("serve", saved, "--config", config), "max_k"),
        (("serve", tmp_path / "none"), "not a saved recommender"),
        (("mcp", tmp_path / "none"), "not a saved recommender"),
    ):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "package,call",
    [
        ("fastapi", "serve.create_app(None)"),
        ("mcp", "serve.create_server(None)"),
        ("uvicorn", "serve.run_app(None, None)"),
        ("httpx2", "client.Client('http://127.0.0.1')"),
    ],
)
def test_without_the_extra_the_names_import_and_using_them_says_what_to_install(package, call):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from llmrec import client, serve\n"
        f"try:\n    {call}\nexcept ImportError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('needs: pip install "llmrec[serve]"'), done.stdout


def test_connections_of_the_command_send_at_once():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
