"""Several language models in one blend: what they say together, which of them stay, kept and served."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llmrec import Item, Recommender, Request
from llmrec.candidates import LM, Weights
from llmrec.config import Config
from llmrec.errors import ConfigError, ModelError
from llmrec.evaluation.split import tail
from llmrec.offline import evaluate
from llmrec.pipeline import Pipeline
from llmrec.protocols import Hits, Query
from llmrec.recipe import HeldOut, fit_retrievers
from llmrec.several import SEVERAL, Member, SeveralModels, SeveralScorer, beside, load_models
from llmrec.testing import tiny_lm, toy_data

ITEMS, EVENTS = toy_data(users=80, items=30, seed=1)


class Said:
    """A model that scores by a function of the last item and the candidate."""

    def __init__(self, of, scored=None, proposes=False, judged=None):
        self.of, self.scored, self.proposes, self.judged = of, scored, proposes, judged
        self.scores_all = scored is None
        self.scorer, self.config = self, SimpleNamespace(mode="said")
        self.card, self.reads_unlisted, self.asked = None, True, 0

    def score(self, queries, candidates):
        self.asked += len(queries)
        return [
            np.array([self.of(int(q.history[-1]), int(code)) for code in items], np.float32)
            for q, items in zip(queries, candidates, strict=True)
        ]

    def retrieve(self, queries, k):
        return [Hits(np.arange(k, dtype=np.int32), np.arange(k, 0, -1, dtype=np.float32)) for _ in queries]

    def forget(self):
        self.asked = 0


def test_the_sum_is_that_of_the_scaled_scores_and_who_reads_words_scores_the_first():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 30, 30)).astype(np.float32)
    whole, first = Said(lambda a, b: table[0, a, b]), Said(lambda a, b: table[1, a, b], scored=4)
    queries = [Query(np.array([last], np.int32)) for last in (3, 7, 9, 1)]
    candidates = [rng.permutation(30)[:n].astype(np.int32) for n in (10, 3, 1, 0)]
    found = SeveralScorer([Member(whole, 1.0), Member(first, 0.5)]).score(queries, candidates)
    for query, items, scores in zip(queries, candidates, found, strict=True):
        expected = np.zeros(len(items))
        for table_of, share, scored in ((table[0], 1.0, None), (table[1], 0.5, 4)):
            own = [float(table_of[query.history[-1], code]) for code in items[:scored]]
            own += [min(own, default=0.0)] * (len(items) - len(own))
            low, high = (min(own), max(own)) if own else (0.0, 0.0)
            expected += [share * ((v - low) / (high - low) if high > low else 1.0) for v in own]
        np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.fixture(scope="module")
def judges():
    """Recipe, retrievers that know nothing but popularity, and held-out users."""
    rec = Recommender.fit(ITEMS, EVENTS, {"encoder": {"name": "light"}, "retrieval": {"search": False}})
    state = rec._state
    train, part = tail(rec._log())
    held_out = part.held_out(state.catalog.active, exclude_seen=False)
    blank = replace(state.recipe.history, retrievers={"popularity": 1e-3})
    recipe = replace(state.recipe, history=blank)
    return recipe, fit_retrievers(train, state.texts, recipe), held_out, rec.config.retrieval


def knowing(some, noise=0.4):
    """A model that knows what follows some of the items; it guesses elsewhere."""
    guess = noise * np.random.default_rng([*sorted(some), 0]).random((30, 30))
    return lambda last, code: 1.0 if last in some and code == (last + 1) % 30 else guess[last, code]


EVEN, ODD = set(range(0, 30, 2)), set(range(1, 30, 2))


def test_what_an_item_of_the_history_changes_is_not_hidden_by_scaling_each_query():
    """One model twice says what it says alone, for the asked query and without some of its history."""
    table = np.random.default_rng(1).normal(size=(30, 30)).astype(np.float32)
    queries = [Query(np.array([last], np.int32)) for last in (3, 7, 9)]
    items, weights = np.array([5, 11, 2, 29], np.int32), Weights({}, 2.0)

    def scores(scorer):
        pipeline = Pipeline({}, weights, weights, weights, scorer=scorer)
        return pipeline.scores(queries, items, weights)

    alone = scores(Said(lambda a, b: table[a, b]))
    twice = scores(SeveralScorer([Member(Said(lambda a, b: table[a, b]), share) for share in (1.0, 3.0)]))
    np.testing.assert_allclose(twice, alone, atol=1e-5)
    assert not np.allclose(alone.max(axis=1), 2.0)


@pytest.mark.parametrize(
    ("earlier", "new", "chosen"),
    [(EVEN, ODD, "both"), (EVEN, set(), "earlier"), (set(), EVEN | ODD, "new"), (EVEN, EVEN, "earlier")],
)
def test_a_further_model_joins_if_both_know_more_takes_the_place_of_one_that_knows_nothing_or_is_left_out(
    judges, earlier, new, chosen
):
    one, other = Said(knowing(earlier)), Said(knowing(new))
    found, entry = beside(one, other, *judges)
    assert entry["chosen"].startswith(chosen), entry
    if chosen == "both":
        assert [m.model for m in found.members] == [one, other] and found.members[0].share == 1.0
        assert found.members[1].share == float(entry["chosen"].removeprefix("both, "))
        assert entry["gain"] > 2 * entry["standard_error"] > 0
    else:
        assert found is (one if chosen == "earlier" else other)
    # However many ways there are, each model reads each user's candidates once.
    assert one.asked == other.asked == len(judges[2].targets)


def test_a_third_joins_two_that_keep_their_shares(judges):
    third = {item for item in range(30) if item % 3 == 0}
    models = [Said(knowing({i + n for i in third}, 0.1)) for n in range(3)]
    pair = SeveralModels([Member(models[0], 1.0), Member(models[1], 2.0)])
    found, entry = beside(pair, models[2], *judges)
    assert entry["chosen"].startswith("both")
    assert [member.share for member in found.members[:2]] == [1.0, 2.0] and len(found.members) == 3


def test_with_nobody_to_ask_the_earlier_model_stays(judges):
    recipe, retrievers, _, config = judges
    one = Said(knowing(EVEN))
    nobody = HeldOut([], np.zeros(0, np.int32))
    assert beside(one, Said(knowing(ODD)), recipe, retrievers, nobody, config)[0] is one


def test_the_fewest_judges_and_the_first_that_proposes_count():
    slow, fast = Said(knowing(EVEN), scored=5, judged=7), Said(knowing(ODD), proposes=True)
    both = SeveralModels([Member(slow, 1.0), Member(fast, 1.0)])
    assert (both.judged, both.scored, both.proposes) == (7, None, True)
    assert both.scorer.retrieve([Query(np.array([1], np.int32))], 3)[0].items.tolist() == [0, 1, 2]


def test_who_proposes_scores_its_own_as_it_does_alone():
    alone = Said(lambda _, code: float(code), scored=3, proposes=True)
    query, unasked = Query(np.array([1], np.int32)), Query(np.array([1], np.int32))
    alone.retrieve = lambda queries, k: [
        Hits(np.array([20, 21, 22, 23], np.int32), np.ones(4, np.float32)) for _ in queries
    ]
    both = SeveralScorer([Member(Said(lambda _, code: 0.0), 1.0), Member(alone, 1.0)])
    items = np.array([0, 1, 2, 3, 4, 20, 21, 22, 23], np.int32)
    both.retrieve([query], 50)
    # The first three, and the first three that it proposed; the others get its lowest score.
    found, plain = both.score([query, unasked], [items, items])
    expected = np.array([0, 1, 2, 0, 0, 20, 21, 22, 0]) / 22
    np.testing.assert_allclose(found - 1, expected, atol=1e-6)
    np.testing.assert_allclose(plain - 1, np.array([0, 0.5, 1, 0, 0, 0, 0, 0, 0]), atol=1e-6)
    # What was proposed is not kept.
    np.testing.assert_allclose(both.score([query], [items])[0], plain)


# ---- as part of a recommender --------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"), seed=2)


def settings(base, **sections):
    steps = {"minutes": None, "steps": 6, "validations": 1, "tokens_per_step": 300}
    shape = {"base": str(base), "rank": 4, "precision": "float32", "window": 8}
    words = {**shape, "mode": "yes_no", "candidates": 6, "listed": 6, "mined": 60, "judged": 30}
    return Config.of(
        {
            "encoder": {"name": "light"},
            "retrieval": {"search": False},
            "lm": {**shape, "layers": 1, "head_dim": 16},
            "training": steps,
            "beside": [{"lm": words, "training": steps}],
            **sections,
        }
    )


@pytest.fixture(scope="module")
def tuned(base):
    """A recommender with both models in its blend, whatever the held-out events say."""
    rec = Recommender.fit(ITEMS, EVENTS, settings(base))
    kept = []
    with pytest.MonkeyPatch.context() as patched:

        def both(earlier, new, *_):
            kept.extend([earlier, new])
            members = [Member(earlier, 1.0), Member(new, 0.5)]
            return SeveralModels(members), {"search": "beside", "chosen": "both, 0.5", "gain": 0.0} | {
                "standard_error": 0.0
            }

        patched.setattr("llmrec.lm_training.beside", both)
        report = rec.finetune()
    state = rec._state
    weights = {kind: getattr(state.recipe, kind).with_lm(0.8) for kind in ("history", "query")}
    rec._state = replace(state, recipe=replace(state.recipe, **weights))
    return rec, report


def test_fine_tuning_trains_both_and_says_so(tuned):
    rec, report = tuned
    assert isinstance(rec._state.lm, SeveralModels)
    assert report.training.steps == report.beside[0].report.steps == 6
    assert report.beside[0].mode == "yes_no" and "yes_no taken (both, 0.5)" in str(report)
    assert rec.recipe.log[-1]["search"] == "beside"
    assert {m.model.card.training["steps"] for m in rec._state.lm.members} == {6}


def test_saved_and_loaded_both_answer_the_same_and_grow_with_the_catalogue(tuned, tmp_path):
    rec, _ = tuned
    rec.save(tmp_path / "model")
    again = Recommender.load(tmp_path / "model")
    request = Request(user="u3", k=8)
    ours, theirs = rec.recommend(request), again.recommend(request)
    assert [r.item_id for r in ours] == [r.item_id for r in theirs]
    np.testing.assert_allclose([r.score for r in ours], [r.score for r in theirs], atol=1e-5)
    members = again._state.lm.members
    assert [m.share for m in members] == [1.0, 0.5] and members[1].model.config.mode == "yes_no"
    assert LM in {source.name for r in theirs for source in r.sources}

    again.add_items([Item("new", "a thing that was not there")])
    assert len(again._state.lm.counts) == len(ITEMS) + 1
    ranked = again.rank(["new", Item("adhoc", "some words"), "i4"], user="u3")
    assert {r.item_id for r in ranked} == {"new", "adhoc", "i4"}
    again.save(tmp_path / "model")
    assert [r.item_id for r in Recommender.load(tmp_path / "model").recommend(request)]
    again.forget("u3")


def save_members(rec, folder):
    rec._state.lm.save(folder / "adapter")
    return folder / "adapter"


def test_where_all_read_words_none_scores_more_than_each_does_alone():
    few, more = Said(knowing(EVEN), scored=3), Said(knowing(ODD), scored=5)
    both = SeveralModels([Member(few, 1.0), Member(more, 1.0)])
    assert (both.scored, both.scores_all, both.proposes) == (5, False, False)


def test_an_evaluation_trains_both_and_reports_both(base, tmp_path):
    found = evaluate(ITEMS, EVENTS, settings(base), folder=tmp_path).result
    training = found["training"]
    assert training["steps"] == 6
    (further,) = training["beside"]
    assert further["mode"] == "yes_no" and further["steps"] == 6
    assert further["joining"]["chosen"] in further["joining"]["ndcg@10"]
    assert further["joining"] in found["recipe"]["log"]
    # What is kept is taken up again.
    again = evaluate(ITEMS, EVENTS, settings(base), folder=tmp_path).result
    assert again["systems"] == found["systems"]
    assert again["training"]["beside"] == training["beside"]


def test_what_cannot_be_is_a_clear_error(tuned, base, tmp_path):
    rec, _ = tuned
    with pytest.raises(ModelError, match="several language models"):
        rec.finetune(since="last")
    other = [{"lm": {"mode": "yes_no", "base": "another"}}]
    with pytest.raises(ConfigError, match="one base"):
        rec.configure({"beside": other})
    assert rec.config.beside[0].lm.base == str(base)
    with pytest.raises(ConfigError, match="one base"):
        evaluate(ITEMS, EVENTS, settings(base, beside=other))
    with pytest.raises(ModelError, match="holds several language models"):
        load_models(save_members(rec, tmp_path), base, rec.texts, None, engine=object())
    with pytest.raises(ConfigError, match="yes_no"):
        rec.finetune(stream=[])
    rec.save(tmp_path / "model")
    for content in ("[]", '{"shares": ["x"]}', '{"shares": [1, 2, 3]}'):
        next((tmp_path / "model").rglob(SEVERAL)).write_text(content)
        with pytest.raises(ModelError):
            Recommender.load(tmp_path / "model").stages(user="u3")


def test_a_run_of_both_that_is_killed_goes_on_with_the_second(base, tmp_path):
    rec, folder, steps = Recommender.fit(ITEMS, EVENTS, settings(base)), tmp_path / "run", []

    def die(progress, done):
        steps.append(progress.step)
        if len(steps) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rec.finetune(folder=folder, on_step=die)
    steps.clear()
    rec.finetune(folder=folder, on_step=lambda progress, done: steps.append(progress.step))
    # The first is finished and trained no more; its last steps are not repeated.
    assert steps[-6:] == [1, 2, 3, 4, 5, 6] and len(steps) <= 6
    rec.save(tmp_path / "model")
    assert not list(folder.rglob("*.safetensors"))
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["language_model"]
