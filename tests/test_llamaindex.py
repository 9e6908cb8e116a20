"""LlamaIndex: nodes, a query engine that serves several users, and reordering."""

import asyncio
import json
import threading

import pytest

pytest.importorskip("llama_index.core")
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from llmrec import Recommender
from llmrec.adapters.llamaindex import PersonalQuery, RecommenderPostprocessor, RecommenderRetriever
from llmrec.errors import RequestError
from llmrec.testing import toy_data


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(*toy_data(), {"encoder": {"name": "light", "dim": 16}})


def ids(found):
    return [one.node.node_id if isinstance(one, NodeWithScore) else one.item_id for one in found]


def test_nodes_are_the_items_of_a_search(rec):
    nodes = RecommenderRetriever(rec, user="u1", similarity_top_k=4).retrieve("piano")
    found = rec.search("piano", "u1", 4)
    assert ids(nodes) == ids(found) and [n.score for n in nodes] == [r.score for r in found]
    first, item = nodes[0].node, found[0].item
    assert first.text == rec.catalog.line(rec.catalog.code(item.item_id))
    assert first.metadata["rank"] == 1 and json.loads(json.dumps(first.metadata)) == first.metadata
    shown = first.get_content(MetadataMode.LLM)
    assert item.item_id in shown and str(item.attributes["year"]) in shown and "sources" not in shown
    assert first.get_content(MetadataMode.EMBED) == first.text


def test_a_query_says_who_asks(rec):
    where = {"brand": ["Acme", "Dune"]}
    retriever = RecommenderRetriever(rec, user="u1", where=where, rules={"diversity": 0.3})
    assert ids(retriever.retrieve("")) == ids(rec.recommend(user="u1", where=where, diversity=0.3))
    for query, fields in (
        (PersonalQuery("", user="u2"), {"user": "u2"}),
        (PersonalQuery("", history=["i4"]), {"history": ["i4"]}),
        (PersonalQuery("piano", user="u2"), {"user": "u2", "query": "piano", "seen": "include"}),
        (QueryBundle(""), {"user": "u1"}),
    ):
        expected = ids(rec.recommend(where=where, diversity=0.3, **fields))
        assert ids(retriever.retrieve(query)) == expected
        assert ids(asyncio.run(retriever.aretrieve(query))) == expected


def test_one_query_engine_serves_several_users(rec):
    engine = RetrieverQueryEngine(
        RecommenderRetriever(rec, similarity_top_k=8),
        response_synthesizer=get_response_synthesizer(llm=MockLLM()),
        node_postprocessors=[RecommenderPostprocessor(recommender=rec, top_n=3)],
    )
    answers = []
    for user in ("u1", "u2"):
        found = ids(rec.recommend(user=user, k=8))
        answers.append(ids(engine.query(PersonalQuery("", user=user)).source_nodes))
        assert answers[-1] == ids(rec.rank(found, user))[:3]
    assert answers[0] != answers[1]


def test_retrieving_asynchronously_computes_in_another_thread(rec, monkeypatch):
    threads = []
    recommend = Recommender.recommend

    def watched(self, *arguments):
        threads.append(threading.current_thread())
        return recommend(self, *arguments)

    monkeypatch.setattr(Recommender, "recommend", watched)
    asyncio.run(RecommenderRetriever(rec).aretrieve("piano"))
    assert threads[0] is not threading.main_thread()


def test_the_postprocessor_ranks_items_and_reads_other_nodes(rec):
    nodes = [
        NodeWithScore(node=TextNode(text="", metadata={"sku": f"i{n}"}), score=0.1) for n in (9, 3, 30, 12)
    ]
    postprocessor = RecommenderPostprocessor(recommender=rec, user="u1", id_key="sku")

    def skus(found):
        return [n.node.metadata["sku"] for n in found]

    ranked = postprocessor.postprocess_nodes(nodes)
    assert skus(ranked) == ids(rec.rank(["i9", "i3", "i30", "i12"], "u1"))
    assert [n.score for n in nodes] == [0.1] * 4
    other = postprocessor.postprocess_nodes(nodes, PersonalQuery("", history=["i2"]))
    assert skus(other) == ids(rec.rank(["i9", "i3", "i30", "i12"], history=["i2"]))
    assert skus(asyncio.run(postprocessor.apostprocess_nodes(nodes, PersonalQuery("", history=["i2"])))) == (
        skus(other)
    )

    title = rec.catalog.titles[7]
    texts = [NodeWithScore(node=TextNode(text=text)) for text in ("some words", title, "other words")]
    (first,) = RecommenderPostprocessor(recommender=rec, top_n=1).postprocess_nodes(texts, query_str=title)
    assert first.node.text == title and first.score == pytest.approx(1.0, abs=1e-5)
    assert "recommender" not in postprocessor.to_dict()


def test_wrong_settings_and_calls_are_errors_of_the_library(rec):
    with pytest.raises(RequestError, match="unknown fields of a request: colour"):
        RecommenderRetriever(rec, rules={"colour": "red"})
    with pytest.raises(RequestError, match="at least 1, got 0"):
        RecommenderRetriever(rec, similarity_top_k=0)
    with pytest.raises(RequestError, match="unknown: 'nope'"):
        RecommenderRetriever(rec).retrieve(PersonalQuery("", history=["nope"]))
    with pytest.raises(RequestError, match="relevant to what"):
        RecommenderPostprocessor(recommender=rec).postprocess_nodes([NodeWithScore(node=TextNode(text="x"))])
