"""Reasons are true, name nothing but their evidence, and the evidence is what moved the score."""

import re

import numpy as np
import pytest

from llmrec import Event, Item, Recommender
from llmrec.explain.evidence import NAMED
from llmrec.explain.reasons import phrase
from llmrec.testing import tiny_lm, toy_data
from llmrec.types import Influence, Shared

ITEMS, EVENTS = toy_data(users=120)
BY_ID = {item.item_id: item for item in ITEMS}
USERS = sorted({e.user_id for e in EVENTS})
LIGHT = {"encoder": {"name": "light", "dim": 16}}


@pytest.fixture(scope="module")
def rec():
    return Recommender.fit(ITEMS, EVENTS, LIGHT)


def history_of(user):
    return [e.item_id for e in EVENTS if e.user_id == user]


def values_of(item, name):
    value = item.attributes.get(name, ())
    return value if isinstance(value, tuple) else (value,)


def check(found, history, query=""):
    """Every part of a reason can be looked up."""
    reason, item = found.reason, found.item
    assert reason.sources == found.sources
    assert len(reason.history) <= NAMED and len(reason.shared) <= NAMED
    amounts = [h.amount for h in reason.history]
    assert amounts == sorted(amounts, reverse=True) and all(a > 0 for a in amounts)
    for influence in reason.history:
        assert influence.item_id in history and influence.title == BY_ID[influence.item_id].title
    for shared in reason.shared:
        assert shared.value in values_of(item, shared.name) and shared.item_ids
        assert all(shared.value in values_of(BY_ID[i], shared.name) for i in shared.item_ids)
        assert set(shared.item_ids) <= {h.item_id for h in reason.history}
    shares = [sum(s.value in values_of(i, s.name) for i in ITEMS) for s in reason.shared]
    assert shares == sorted(shares), "rarer values first"
    line = f"{item.title} {item.attributes}".lower()
    assert all(word in line and word in query for word in reason.words)
    quoted = re.findall(r'"(.*?)"', reason.sentence)
    assert set(quoted) <= {h.title for h in reason.history} | set(reason.words)
    rest = re.sub(r'".*?"', "", reason.sentence)
    for name in ("genres", "year", "brand"):
        allowed = {str(s.value) for s in reason.shared if s.name == name}
        every = {str(v) for i in ITEMS for v in values_of(i, name)}
        assert {v for v in every if re.search(rf"\b{v}\b", rest)} <= allowed
    return reason


def test_reasons_are_true_and_name_only_their_evidence(rec):
    with_history = 0
    for user in USERS[:25]:
        for query in (None, "the golden river"):
            plain = rec.recommend(user=user, query=query, k=5)
            explained = rec.recommend(user=user, query=query, k=5, explain=True)
            assert [(r.item_id, r.score) for r in plain] == [(r.item_id, r.score) for r in explained]
            assert all(r.reason is None for r in plain)
            for one in explained:
                with_history += bool(check(one, history_of(user), query or "").history)
    assert with_history > 100


def test_deleting_the_evidence_lowers_the_item_more_than_deleting_another_or_the_latest(rec):
    """Served without the top evidence, a random item (the mean of all), or the latest where it differs."""

    def served(history, item, out):
        found = rec.recommend(history=history, seen="include", exclude=out, k=40)
        return next((np.array([r.score, -r.rank]) for r in found if r.item_id == item), np.array([0.0, -41]))

    any_item, latest = [], []
    for user in USERS[:80]:
        history = history_of(user)
        for one in rec.recommend(user=user, k=3, explain=True):
            if not one.reason.history:
                continue
            # All of the history stays out of the answers, so that the candidates are the same ones.
            before = served(history, one.item_id, out=history)
            assert before == pytest.approx([one.score, -one.rank], abs=1e-5)
            drop = {
                gone: before - served([i for i in history if i != gone], one.item_id, out=history)
                for gone in history
            }
            top = drop[one.reason.history[0].item_id]
            any_item.append((top, np.mean(list(drop.values()), axis=0)))
            if one.reason.history[0].item_id != history[-1]:
                latest.append((top, drop[history[-1]]))
    assert len(any_item) > 150 and len(latest) > 40
    for pairs in (any_item, latest):
        (score, places), (other_score, other_places) = np.mean(pairs, axis=0)
        assert score > 2 * max(other_score, 0) and places > other_places + 1


def test_without_a_history_it_is_popular_or_has_the_words_and_a_pin_is_a_pin(rec):
    for one in rec.recommend(user="nobody", k=3, explain=True):
        assert check(one, []).sentence == "Popular with others." and not one.reason.history
    first = rec.search("the golden river")[0]
    (one,) = rec.recommend(query="the golden river", k=1, explain=True)
    reason = check(one, [], "the golden river")
    assert one.item_id == first.item_id and reason.words and "the" not in reason.words
    assert reason.sentence.startswith("For your word")
    (pin,) = rec.recommend(user="u3", k=1, pins=["i9"], explain=True)
    assert pin.reason.sentence == "Pinned by the request."


def test_an_item_that_nobody_chose_is_not_called_popular():
    items, events = toy_data(users=20)
    rec = Recommender.fit([*items, Item("zz", "Unheard")], events, {**LIGHT, "retrieval": {"search": False}})
    (one,) = rec.recommend(where={"item_id": ["zz"]}, explain=True)
    assert one.reason.sentence == "Nothing in particular speaks for it."
    rec.remove_items(["i3"])
    assert rec.predict(["zz"])["zz"] > 0
    assert sum(rec.predict([i for i in rec.catalog.ids if i != "i3"]).values()) == pytest.approx(1, abs=1e-5)


def test_the_rule_of_the_toy_data_is_the_reason(rec):
    found = rec.recommend(history=["i20", "i11", "i30"], k=5, explain=True)
    reason = {r.item_id: r.reason for r in found}["i12"]
    assert reason.history[0].item_id == "i11"
    assert reason.sentence.startswith(f'Because you chose "{BY_ID["i11"].title}"')


def test_the_language_model_takes_part_in_the_evidence(tmp_path):
    config = {
        **LIGHT,
        "lm": {"base": str(tiny_lm(tmp_path / "lm")), "layers": 2, "rank": 4, "precision": "float32"},
        "training": {"minutes": None, "steps": 5, "tokens_per_step": 400},
    }
    made = Recommender.fit(ITEMS, EVENTS, config)
    made.finetune()
    stage = made.stages(user="u2", k=40, seen="include", explain=True)["language model"]
    history = history_of("u2")
    scorer = made._state.lm.scorer
    whole = scorer.log_probs([made.catalog.codes(history)])[0]
    evidence = 0
    for one in stage:
        for influence in check(one, history).history:
            less = scorer.log_probs([made.catalog.codes([i for i in history if i != influence.item_id])])[0]
            code = made.catalog.code(one.item_id)
            # Scores of the answer are log-probabilities, scaled to [0, 1] over its candidates.
            change = (whole[code] - max(less[code], whole.min())) / (whole.max() - whole.min())
            assert influence.amount == pytest.approx(change, abs=1e-4)
            evidence += 1
    assert evidence > 10


def test_an_item_that_is_chosen_again_shares_nothing_with_itself():
    items = [Item(str(n), f"Title {n}", attributes={"brand": "ABC"[n % 3]}) for n in range(6)]
    events = [Event(f"u{u}", str((u + 3 * (t % 2)) % 6), t) for u in range(12) for t in range(6)]
    rec = Recommender.fit(items, events, {**LIGHT, "retrieval": {"search": False}})
    again = rec.recommend(history=["0", "3", "0"], k=3, explain=True)
    assert any(h.item_id == one.item_id for one in again for h in one.reason.history)
    shared = {one.item_id: [i for s in one.reason.shared for i in s.item_ids] for one in again}
    assert shared["0"] == ["3"] and shared["3"] == ["0"]


A, B = Influence("1", 'The "A"', 0.5), Influence("2", "B", 0.25)
COMEDY, DRAMA = Shared("genres", "Comedy", ("1", "2")), Shared("genres", "Drama", ("1", "2"))
YEAR, BRAND = Shared("year", 1995.0, ("1",)), Shared("brand", "Acme", ("2",))


@pytest.mark.parametrize(
    ("sources", "words", "history", "shared", "sentence"),
    [
        (["a"], [], [B, A], [COMEDY], 'Because you chose "B" and "The "A""; like them: genres Comedy.'),
        (["a"], [], [A, B], [YEAR, COMEDY, DRAMA, BRAND],
         'Because you chose "The "A"" and "B"; like them: genres Comedy and Drama.'),
        (["a"], [], [B, A], [YEAR, BRAND], 'Because you chose "B" and "The "A""; like "B": brand Acme.'),
        (["a"], [], [B, A], [YEAR], 'Because you chose "B" and "The "A"".'),
        (["a"], [], [A], [YEAR, COMEDY], 'Because you chose "The "A""; like it: year 1995, genres Comedy.'),
        (["bm25"], ["red", "lamp", "old"], [], [], 'For your words "red", "lamp" and "old".'),
        (["text"], ["red"], [B], [], 'For your word "red", and because you chose "B".'),
        (["text"], [], [], [], "Close in meaning to your words."),
        (["trending", "ease"], [], [], [], "On the rise."),
        (["ease"], [], [], [], "Fits your history as a whole."),
        (["ease", "pin"], [], [A], [], "Pinned by the request."),
        ([], [], [], [], "Nothing in particular speaks for it."),
    ],
)  # fmt: skip
def test_sentences(sources, words, history, shared, sentence):
    assert phrase(sources, words, history, shared, asked_by_history=True) == sentence
