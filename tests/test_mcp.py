"""MCP with the SDK's own client: in memory, over standard input and output, and over HTTP."""

import asyncio
import hashlib
import json
import sys
import threading
import time
from contextlib import asynccontextmanager

import pytest

from llmrec import Recommender
from llmrec.candidates import LM
from llmrec.explain.meanings import MEANINGS
from llmrec.families import FAMILIES
from llmrec.serve import ServeConfig, Service, create_app, create_server
from llmrec.testing import toy_data

pytest.importorskip("mcp")
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

LIGHT = {"encoder": {"name": "light", "dim": 16}}
TOOLS = {
    "recommend",
    "search_items",
    "similar_items",
    "rank_items",
    "record_event",
    "explain",
    "items_to_ask_about",
}


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(*toy_data(), LIGHT)


@pytest.fixture
def talk(rec):
    """Run a conversation, a coroutine function of the client, with the server in memory."""
    service = Service(rec, ServeConfig(max_k=50, max_candidates=30))

    def run(conversation):
        async def connected():
            async with Client(create_server(service)) as client:
                return await conversation(client)

        return asyncio.run(connected())

    yield run
    service.close()


def call(talk, name, **arguments):
    """Call a tool in memory and return its structured answer, or the text of its error."""
    answer = talk(lambda client: client.call_tool(name, arguments))
    return answer.content[0].text if answer.is_error else answer.structured_content


def ids(found):
    return [one["item_id"] for one in found["items"]]


def expect(found):
    return [r.item_id for r in found]


def test_the_tools_are_described_bounded_and_marked(talk):
    tools = {tool.name: tool for tool in talk(lambda client: client.list_tools()).tools}
    assert set(tools) == TOOLS
    for name, tool in tools.items():
        assert len(tool.description) > 60 and tool.title
        assert tool.annotations.read_only_hint is (name != "record_event")
        assert not tool.annotations.destructive_hint
        assert set(tool.output_schema["properties"]) == ({"events"} if name == "record_event" else {"items"})
    k = tools["recommend"].input_schema["properties"]["k"]
    assert (k["minimum"], k["maximum"], k["default"]) == (1, 50, 10)
    assert tools["rank_items"].input_schema["properties"]["item_ids"]["maxItems"] == 30
    assert "x-limit" not in json.dumps([tool.input_schema for tool in tools.values()])


def test_the_tools_answer_as_the_library_does(rec, talk):
    asked = {"user": "u1", "k": 4, "where": {"brand": ["Acme", "Dune"]}, "exclude": ["i0"]}
    found = call(talk, "recommend", **asked)
    assert ids(found) == expect(rec.recommend(**asked))
    assert set(found["items"][0]) == {"item_id", "title", "rank", "score", "attributes", "reason"}
    ruled = {**asked, "caps": {"brand": 1}, "diversity": 0.5, "explain": True}
    told = [(item["item_id"], item["reason"]) for item in call(talk, "recommend", **ruled)["items"]]
    assert told == [(r.item_id, r.reason.sentence) for r in rec.recommend(**ruled)] and len(told) == 2
    assert found["items"][0]["rank"] == 1 and isinstance(found["items"][0]["attributes"]["genres"], list)
    assert ids(call(talk, "recommend", history=["i2"], k=3)) == expect(rec.recommend(history=["i2"], k=3))
    assert ids(call(talk, "search_items", query="silver river", k=3)) == expect(
        rec.search("silver river", k=3)
    )
    assert ids(call(talk, "similar_items", item_id="i3")) == expect(rec.similar("i3"))
    wanted = ["i9", "i3", "i20"]
    assert ids(call(talk, "rank_items", item_ids=wanted, user="u1")) == expect(rec.rank(wanted, user="u1"))
    explained = call(talk, "explain", item_ids=wanted, user="u1")
    for one, known in zip(explained["items"], rec.rank(wanted, user="u1"), strict=True):
        assert one["item_id"] == known.item_id
        assert [s["name"] for s in one["sources"]] == [s.name for s in known.sources]
        assert all(s["meaning"] == MEANINGS[s["name"]].clause for s in one["sources"])
    assert any(one["sources"] for one in explained["items"])
    assert set(MEANINGS) == {*FAMILIES, LM}


def test_a_newcomer_is_asked_about_seeds_and_the_prompt_says_so(rec, talk):
    first = call(talk, "items_to_ask_about")
    assert ids(first) == expect(rec.seeds(5))
    chosen, passed = ids(first)[:1], ids(first)[1:]
    after = ids(call(talk, "items_to_ask_about", chosen=chosen, passed=passed, k=3, where={"brand": "Acme"}))
    assert after == expect(rec.seeds(3, chosen, passed, {"brand": "Acme"})) and not set(after) & set(
        ids(first)
    )
    assert "both chosen and passed" in call(talk, "items_to_ask_about", chosen=["i1"], passed=["i1"])
    prompt = talk(lambda client: client.get_prompt("recommendation_conversation", {}))
    assert "items_to_ask_about" in prompt.messages[0].content.text


def test_a_recorded_event_counts_in_the_next_answer(rec, talk):
    assert call(talk, "record_event", user="chatter", item_id="i4") == {"events": 1}
    assert ids(call(talk, "recommend", user="chatter"))[0] == "i5"
    assert rec.forget("chatter") == 1


def test_a_recorded_event_counts_as_its_type_does(rec, talk, monkeypatch):
    weights = {"purchase": 2.0, "glance": 0.0}
    data = rec.config.data.model_copy(update={"event_weights": weights})
    monkeypatch.setattr(rec, "config", rec.config.model_copy(update={"data": data}))
    assert call(talk, "record_event", user="typed", item_id="i4", event="glance") == {"events": 0}
    assert call(talk, "record_event", user="typed", item_id="i4", event="purchase") == {"events": 1}
    told = call(talk, "record_event", user="typed", item_id="i4", event="gift")
    assert isinstance(told, str) and "'gift' has no weight" in told
    assert [event.weight for event in rec.events() if event.user_id == "typed"] == [2.0]
    assert rec.forget("typed") == 1


@pytest.mark.parametrize(
    "name,arguments,words",
    [
        ("recommend", {"k": 51}, "less than or equal to 50"),
        ("recommend", {"user": "u1", "history": ["i1"]}, "not both"),
        ("recommend", {"where": {"colour": "red"}}, "unknown attribute 'colour'"),
        ("recommend", {"history": ["nowhere"]}, "nowhere"),
        ("search_items", {"query": "   "}, "query"),
        ("similar_items", {"item_id": "nowhere"}, "unknown item 'nowhere'"),
        ("rank_items", {"item_ids": []}, "item_ids"),
        ("rank_items", {"item_ids": ["i1", "i1"]}, "twice"),
        ("record_event", {"user": "u1", "item_id": "nowhere"}, "nowhere"),
        ("record_event", {"user": " ", "item_id": "i1"}, "user"),
    ],
)
def test_an_error_is_told_to_the_model_in_the_words_of_the_library(talk, name, arguments, words):
    told = call(talk, name, **arguments)
    assert isinstance(told, str) and words in told and "Traceback" not in told


def test_resources_show_items_and_what_conditions_can_name(rec, talk):
    def read(uri):
        return json.loads(talk(lambda client: client.read_resource(uri)).contents[0].text)

    title = rec.catalog.titles[rec.catalog.code("i3")]
    assert read("llmrec://items/i3")["title"] == title
    about = read("llmrec://attributes")
    assert about["year"]["kind"] == "number" and about["brand"]["frequent"][0]["value"] == "Acme"
    listed = talk(lambda client: client.list_resource_templates()).resource_templates
    assert [one.uri_template for one in listed] == ["llmrec://items/{+item_id}"]

    async def ask_for_what_is_not_there(client):
        with pytest.raises(MCPError, match="unknown item 'nowhere'"):
            await client.read_resource("llmrec://items/nowhere")

    talk(ask_for_what_is_not_there)


def test_the_prompt_begins_a_conversation_that_names_the_tools(talk):
    prompt = talk(lambda client: client.get_prompt("recommendation_conversation", {"wish": "a calm film"}))
    text = prompt.messages[0].content.text
    assert "What I said so far: a calm film" in text and "{" not in text
    for name in ("recommend", "search_items", "similar_items", "record_event", "explain"):
        assert name in text


def test_over_standard_input_and_output(rec, tmp_path):
    made = Recommender.fit(*toy_data(), LIGHT)
    made.save(tmp_path / "model")
    made.close()
    command = ["-m", "llmrec.cli", "mcp", str(tmp_path / "model")]

    async def talk():
        server = StdioServerParameters(command=sys.executable, args=command, env={"OMP_NUM_THREADS": "1"})
        async with Client(server, read_timeout_seconds=60) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
            found = await client.call_tool("recommend", {"user": "u1", "k": 3})
            assert ids(found.structured_content) == expect(rec.recommend(user="u1", k=3))
            assert not (await client.call_tool("record_event", {"user": "live", "item_id": "i4"})).is_error

    asyncio.run(talk())
    again = Recommender.load(tmp_path / "model")
    assert [e.item_id for e in again.history("live")] == ["i4"]
    again.close()


@asynccontextmanager
async def over_http(app, key=None, host="127.0.0.1:8000"):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, headers=headers) as http,
        Client(streamable_http_client(f"http://{host}/mcp", http_client=http)) as client,
    ):
        yield client


def test_over_http_and_a_key_that_may_only_read_sees_no_tool_that_writes(rec):
    keys = [
        {"name": role, "role": role, "sha256": hashlib.sha256(role.encode()).hexdigest()}
        for role in ("read", "write")
    ]

    async def talk(app, key=None, host="127.0.0.1:8000"):
        async with over_http(app, key, host) as client:
            found = await client.call_tool("recommend", {"user": "u1", "k": 3})
            assert ids(found.structured_content) == expect(rec.recommend(user="u1", k=3))
            denied = await client.call_tool("record_event", {"user": "u1", "item_id": "nowhere"})
            assert denied.is_error
            return {tool.name for tool in (await client.list_tools()).tools}, denied.content[0].text

    assert asyncio.run(talk(create_app(rec)))[0] == TOOLS
    names, told = asyncio.run(talk(create_app(rec, ServeConfig.of({"keys": keys})), "read", "shop.example"))
    assert names == TOOLS - {"record_event"} and "nowhere" not in told
    names, told = asyncio.run(talk(create_app(rec, ServeConfig.of({"keys": keys})), "write", "shop.example"))
    assert names == TOOLS and "nowhere" in told


def test_calls_that_wait_hold_up_no_write_and_those_beyond_the_queue_are_refused(rec):
    waiting, events = threading.Event(), []

    class Slow:
        def __getattr__(self, name):
            return getattr(rec, name)

        def recommend_many(self, requests, *, lm=True):
            assert waiting.wait(30)
            return rec.recommend_many(requests, lm=lm)

        def observe_many(self, given):
            events.extend(given)
            return len(events)

        def warm_up(self):
            return ()

    async def flood():
        app = create_app(Slow(), ServeConfig(queue=50, batch=1))
        async with over_http(app) as client:
            calls = [asyncio.create_task(client.call_tool("recommend", {"k": 1})) for _ in range(80)]
            # What is refused is answered at once, the others wait.
            begun = time.monotonic()
            while sum(call.done() for call in calls) < 80 - 50 - 2 and time.monotonic() < begun + 30:
                await asyncio.sleep(0.05)
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                begun = time.monotonic()
                stored = await http.post("/v1/events", json={"user_id": "u1", "item_id": "i1"})
                took = time.monotonic() - begun
                stream = await http.get("/mcp", headers={"Accept": "text/event-stream"})
            waiting.set()
            return stored.status_code, took, stream.status_code, await asyncio.gather(*calls)

    status, took, stream, answers = asyncio.run(flood())
    assert status == 201 and len(events) == 1 and took < 5
    # There is nothing that the server would say on a stream of its own.
    assert stream == 405
    refused = [one.content[0].text for one in answers if one.is_error]
    assert len(refused) >= 80 - 50 - 2 and all("busy" in told or "wait" in told for told in refused)


def test_without_keys_another_name_for_this_machine_is_refused(rec):
    async def talk():
        app = create_app(rec)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://evil.example") as http,
        ):
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            return (await http.post("/mcp", json=body)).status_code

    assert asyncio.run(talk()) == 421
