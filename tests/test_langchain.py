"""LangChain: its own standard tests, and what they do not look at."""

import asyncio
import functools
import json
import threading

import pytest

pytest.importorskip("langchain_tests")
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import RetrieversIntegrationTests, ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from pydantic import ValidationError

from llmrec import Recommender
from llmrec.adapters.langchain import RecommenderCompressor, RecommenderRetriever, RecommenderTool
from llmrec.adapters.openai_tools import OpenAITools
from llmrec.adapters.tools import VERBS
from llmrec.errors import RequestError
from llmrec.testing import toy_data


@functools.cache
def recommender():
    return Recommender.fit(*toy_data(), {"encoder": {"name": "light", "dim": 16}})


@pytest.fixture
def rec():
    return recommender()


def ids(found):
    return [one.metadata["item_id"] if isinstance(one, Document) else one.item_id for one in found]


# ---- the framework's standard tests --------------------------------------------------------------------


class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return RecommenderRetriever

    @property
    def retriever_constructor_params(self):
        return {"recommender": recommender()}

    @property
    def retriever_query_example(self):
        return "golden piano"


EXAMPLES = {
    "recommend": {"query": "piano", "user": "u1", "k": 3},
    "search_items": {
        "query": "piano",
        "where": [{"attribute": "year", "operator": "gte", "value": 1960}],
    },
    "similar_items": {"item_id": "i3"},
    "rank_items": {"item_ids": ["i3", "i4"], "history": ["i2"]},
}


class OfEachVerb:
    @pytest.fixture(autouse=True, params=sorted(VERBS))
    def _verb(self, request):
        self.verb = request.param

    @property
    def tool_constructor(self):
        return RecommenderTool

    @property
    def tool_constructor_params(self):
        return {"recommender": recommender(), "name": self.verb}

    @property
    def tool_invoke_params_example(self):
        return EXAMPLES[self.verb]


class TestToolUnit(OfEachVerb, ToolsUnitTests):
    pass


class TestToolIntegration(OfEachVerb, ToolsIntegrationTests):
    pass


# ---- retriever -----------------------------------------------------------------------------------------


def test_documents_are_the_items_of_a_search(rec):
    documents = RecommenderRetriever(recommender=rec, user="u1", k=4).invoke("piano")
    found = rec.search("piano", "u1", 4)
    assert ids(documents) == ids(found) and [d.id for d in documents] == ids(found)
    assert [d.page_content for d in documents] == [rec.catalog.line(rec.catalog.code(i)) for i in ids(found)]
    assert [(d.metadata["rank"], d.metadata["score"]) for d in documents] == [
        (r.rank, r.score) for r in found
    ]
    assert all(json.loads(json.dumps(d.metadata)) == d.metadata for d in documents)


def test_without_words_it_recommends_to_who_asks(rec):
    retriever = RecommenderRetriever(recommender=rec, user="u1", rules={"explain": True})
    documents = retriever.invoke("")
    assert ids(documents) == ids(rec.recommend(user="u1"))
    assert documents[0].metadata["reason"] == rec.recommend(user="u1", explain=True)[0].reason.sentence


def test_a_call_sets_user_history_k_and_where_by_arguments_or_by_its_config(rec):
    retriever = RecommenderRetriever(recommender=rec, user="u1")
    where = {"brand": "Acme"}
    assert ids(retriever.invoke("", history=["i4"], k=3, where=where)) == ids(
        rec.recommend(history=["i4"], k=3, where=where)
    )
    free = RecommenderRetriever(recommender=rec).configurable_fields(
        user=ConfigurableField("user"), k=ConfigurableField("many")
    )
    chain = free | RunnableLambda(ids)
    users = [{"configurable": {"user": f"u{n}", "many": n}} for n in (1, 2, 3)]
    expected = [ids(rec.recommend(user=f"u{n}", k=n)) for n in (1, 2, 3)]
    assert [chain.invoke("", config) for config in users] == expected
    assert chain.batch(["", "", ""], users) == expected
    assert asyncio.run(chain.abatch(["", "", ""], users)) == expected


def test_asynchronous_calls_compute_in_another_thread_and_take_the_same_arguments(rec, monkeypatch):
    threads = []
    recommend = Recommender.recommend

    def watched(self, *arguments):
        threads.append(threading.current_thread())
        return recommend(self, *arguments)

    monkeypatch.setattr(Recommender, "recommend", watched)
    found = asyncio.run(RecommenderRetriever(recommender=rec).ainvoke("piano", user="u2", k=2))
    assert threads[0] is not threading.main_thread()
    assert ids(found) == ids(rec.search("piano", "u2", 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"colour": "red"}, "unknown fields of a request: colour"),
        ({"k": 0}, "at least 1, got 0"),
        ({"where": {"colour": "red"}}, "unknown attribute 'colour'"),
        ({"history": ["nope"]}, "unknown: 'nope'"),
    ],
)
def test_a_wrong_call_is_an_error_of_the_library(rec, call, words):
    with pytest.raises(RequestError, match=words):
        RecommenderRetriever(recommender=rec).invoke("piano", **call)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        RecommenderRetriever(recommender=rec, k=0)
    with pytest.raises(ValidationError, match="instance of Recommender"):
        RecommenderRetriever(recommender="model/")


# ---- compressor ----------------------------------------------------------------------------------------


def test_the_compressor_ranks_items_and_reads_documents(rec):
    documents = [Document("", metadata={"item_id": f"i{n}", "page": n}) for n in (9, 3, 30, 12)]
    compressor = RecommenderCompressor(recommender=rec, user="u1")
    ranked = compressor.compress_documents(documents, "")
    assert ids(ranked) == ids(rec.rank(["i9", "i3", "i30", "i12"], "u1"))
    assert all(d.metadata["page"] == int(d.metadata["item_id"][1:]) for d in ranked)
    assert "relevance_score" not in documents[0].metadata
    other = compressor.compress_documents(documents, "", history=["i2"])
    assert ids(other) == ids(rec.rank(["i9", "i3", "i30", "i12"], history=["i2"]))
    assert asyncio.run(compressor.acompress_documents(documents, "", history=["i2"])) == other

    title = rec.catalog.titles[7]
    texts = [Document("some words", metadata={"sku": "i3"}), Document(title), Document("other words")]
    first = RecommenderCompressor(recommender=rec, top_n=1).compress_documents(texts, title)
    assert [d.page_content for d in first] == [title]
    by_sku = RecommenderCompressor(recommender=rec, id_key="sku").compress_documents(texts[:1], "", user="u1")
    assert len(by_sku) == 1 and 0 <= by_sku[0].metadata["relevance_score"] <= 1


# ---- tools ---------------------------------------------------------------------------------------------


def test_a_tool_call_is_answered_with_json_for_the_model_and_items_for_the_program(rec):
    tool = RecommenderTool(recommender=rec)
    message = tool.invoke({"name": tool.name, "args": EXAMPLES["recommend"], "id": "1", "type": "tool_call"})
    assert isinstance(message, ToolMessage) and message.status == "success"
    assert message.artifact == rec.recommend(query="piano", user="u1", k=3)
    answer = OpenAITools(rec).dispatch("recommend", json.dumps(EXAMPLES["recommend"]))
    assert message.content == answer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 101}, "k: Input should be less than or equal to 100"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"history": ["nope"]}, "1 of 1 item ids are unknown: 'nope'"),
        (
            {"where": [{"attribute": "year", "operator": "gte", "value": "old"}]},
            "'year' is a number, got 'old'",
        ),
    ],
)
def test_a_bad_tool_call_is_told_to_the_model(rec, arguments, words):
    tool = RecommenderTool(recommender=rec)
    message = tool.invoke({"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"})
    assert message.status == "error" and words in message.content


def test_a_tool_of_a_known_user_asks_for_nobody_else(rec):
    tool = RecommenderTool(recommender=rec, user="u1")
    assert "user" not in tool.args
    call = {"name": tool.name, "args": {"k": 2}, "id": "1", "type": "tool_call"}
    assert tool.invoke(call).artifact == rec.recommend(user="u1", k=2)
    call["args"]["user"] = "u2"
    assert tool.invoke(call).status == "error"
    with pytest.raises(RequestError, match="there is no tool 'buy'"):
        RecommenderTool(recommender=rec, name="buy")


@pytest.mark.parametrize("user", [None, "u1"])
def test_offered_to_a_model_a_tool_is_the_one_of_the_openai_format(rec, user):
    def bare(schema):
        if isinstance(schema, list):
            return [bare(part) for part in schema]
        if not isinstance(schema, dict):
            return schema
        return {k: bare(v) for k, v in schema.items() if k not in ("title", "default") or isinstance(v, dict)}

    for expected in OpenAITools(rec, user).schemas():
        tool = RecommenderTool(recommender=rec, name=expected["function"]["name"], user=user)
        offered = bare(convert_to_openai_tool(tool, strict=True))
        assert offered == bare(expected)
