"""Haystack: components in pipelines, which are written down and read again."""

import asyncio
import json
import os

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when it is imported; tests use no network
pytest.importorskip("haystack")
from haystack import Document, Pipeline
from haystack.core.errors import DeserializationError, PipelineConnectError
from haystack.core.serialization import component_to_dict

from llmrec import Recommender
from llmrec.adapters.haystack import RecommenderRanker, RecommenderRetriever
from llmrec.errors import ModelError, RequestError
from llmrec.testing import toy_data

SETTINGS = {"encoder": {"name": "light", "dim": 16}}


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(*toy_data(), SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    Recommender.fit(*toy_data(), SETTINGS).save(folder)
    return folder


def ids(found):
    return [one.meta["item_id"] if isinstance(one, Document) else one.item_id for one in found]


def made(recommender):
    pipeline = Pipeline()
    retriever = RecommenderRetriever(recommender, top_k=8, where={"brand": {"not": "Acme"}})
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("ranker", RecommenderRanker(recommender, top_k=3))
    pipeline.connect("retriever.documents", "ranker.documents")
    return pipeline


def asked(user):
    return {"retriever": {"query": "", "user": user}, "ranker": {"user": user}}


def test_documents_are_the_items_of_a_search(rec):
    documents = RecommenderRetriever(rec, user="u1", top_k=4).run("piano")["documents"]
    found = rec.search("piano", "u1", 4)
    assert ids(documents) == ids(found) == [d.id for d in documents]
    assert [d.score for d in documents] == [r.score for r in found]
    assert documents[0].content == rec.catalog.line(rec.catalog.code(found[0].item_id))
    assert json.loads(json.dumps(documents[0].meta)) == documents[0].meta


def test_a_run_sets_user_history_k_and_where(rec):
    retriever = RecommenderRetriever(rec, user="u1", rules={"explain": True})
    documents = retriever.run("", history=["i4"], top_k=3, where={"brand": "Acme"})["documents"]
    expected = rec.recommend(history=["i4"], k=3, where={"brand": "Acme"}, explain=True)
    assert ids(documents) == ids(expected)
    assert [d.meta["reason"] for d in documents] == [r.reason.sentence for r in expected]


def test_a_pipeline_answers_and_answers_the_same_once_it_is_read_again(rec, folder):
    first = made(folder)
    expected = {}
    for user in ("u1", "u2"):
        found = ids(rec.recommend(user=user, k=8, where={"brand": {"not": "Acme"}}))
        expected[user] = ids(rec.rank(found, user))[:3]
        assert ids(first.run(asked(user))["ranker"]["documents"]) == expected[user]
        assert ids(asyncio.run(first.run_async(asked(user)))["ranker"]["documents"]) == expected[user]
    again = Pipeline.loads(first.dumps(), allowed_modules=["llmrec.*"])
    assert again.to_dict() == first.to_dict()
    assert ids(again.run(asked("u2"))["ranker"]["documents"]) == expected["u2"]


def test_sockets_have_types(rec):
    pipeline = made(rec)
    assert pipeline.inputs()["retriever"]["query"] == {"type": str, "is_mandatory": True}
    assert pipeline.outputs()["ranker"]["documents"] == {"type": list[Document]}
    with pytest.raises(PipelineConnectError):
        pipeline.connect("ranker.documents", "retriever.query")


def test_components_of_one_folder_share_a_recommender_until_it_is_saved_anew(folder):
    retriever, ranker = RecommenderRetriever(folder), RecommenderRanker(str(folder))
    assert retriever.recommender is ranker.recommender
    other = Recommender.load(folder)
    other.remove_items(["i1"])
    other.save(folder)
    later = RecommenderRetriever(folder)
    assert later.recommender is not retriever.recommender
    assert "i1" not in ids(later.run("", top_k=100)["documents"])


def test_a_component_that_was_given_a_recommender_is_written_down_by_its_folder(folder):
    loaded = Recommender.load(folder)
    # "type" and a dotted value look like a serialised object to Haystack's own reader.
    retriever = RecommenderRetriever(loaded, "u1", where={"type": "os.path"}, rules={"seen": "include"})
    written = component_to_dict(retriever, "retriever")
    assert written["init_parameters"]["recommender"] == str(folder)
    again = RecommenderRetriever.from_dict(json.loads(json.dumps(written)))
    assert again.to_dict() == written and again.defaults == retriever.defaults
    ranker = RecommenderRanker(loaded, history=["i3"], id_key="sku")
    assert RecommenderRanker.from_dict(ranker.to_dict()).to_dict() == ranker.to_dict()
    with pytest.raises(DeserializationError, match="cannot be read as 'RecommenderRanker'"):
        RecommenderRanker.from_dict(written)


def test_what_cannot_be_written_down_or_loaded_is_an_error_of_the_library(rec, tmp_path):
    with pytest.raises(ModelError, match="call its save first"):
        RecommenderRetriever(rec).to_dict()
    with pytest.raises(ModelError, match="is not a saved recommender"):
        RecommenderRanker(tmp_path).warm_up()
    with pytest.raises(RequestError, match="a Recommender or the folder of a saved one is needed, got int"):
        RecommenderRetriever(3)
    with pytest.raises(RequestError, match="unknown fields of a request: colour"):
        RecommenderRetriever(rec, rules={"colour": "red"})
    with pytest.raises(RequestError, match="either user"):
        RecommenderRanker(rec, user="u1", history=["i1"])


def test_the_ranker_ranks_items_and_reads_other_documents(rec):
    documents = [Document(meta={"sku": f"i{n}"}) for n in (9, 3, 30, 12)]
    ranked = RecommenderRanker(rec, id_key="sku").run(documents, user="u1")["documents"]
    assert [d.meta["sku"] for d in ranked] == ids(rec.rank(["i9", "i3", "i30", "i12"], "u1"))
    assert [d.score for d in documents] == [None] * 4

    title = rec.catalog.titles[7]
    texts = [Document(content=text) for text in ("some words", title, "other words")]
    (first,) = RecommenderRanker(rec).run(texts, title, top_k=1)["documents"]
    assert first.content == title and first.score == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(RequestError, match="document 0 has no text"):
        RecommenderRanker(rec).run([Document()], "words")
