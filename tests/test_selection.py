"""Forward selection: it finds the families that pay, says why others are out, and keeps its time."""

import numpy as np
import pytest

from llmrec import search, selection
from llmrec.assembly import make_texts
from llmrec.catalog import Catalog
from llmrec.encode.light import LightEncoder
from llmrec.evaluation.split import tail
from llmrec.events import EventLog
from llmrec.families import FAMILIES, TrainingLog
from llmrec.pipeline import Pipeline
from llmrec.protocols import Query
from llmrec.recipe import ALWAYS, HeldOut, Recipe, RetrievalConfig, ranks_in
from llmrec.search import epoch_users
from llmrec.selection import BY_COST, choose_recipe, select_families
from llmrec.testing import toy_data

ITEMS, EVENTS = toy_data(users=250, items=40)
CATALOG = Catalog.load(ITEMS)
LOG, PART = tail(EventLog.load(EVENTS, CATALOG))
HELD_OUT = PART.held_out(CATALOG.active, True)
TEXTS = make_texts(CATALOG.lines(), LightEncoder.fit(CATALOG.lines(), 16))
SMALL = {"dim": 8, "layers": 1, "window": 6, "epochs": 3, "tokens_per_step": 500}
CONFIG = RetrievalConfig(
    gru4rec=SMALL,
    caser=SMALL,
    sasrec=SMALL,
    als={"dim": 4},
    lightgcn={"dim": 8, "steps": 5},
    topics={"dim": 3},
)


@pytest.fixture(scope="module")
def selected():
    return select_families(LOG, HELD_OUT, TEXTS, CONFIG, minutes=5)


def entries(recipe, search):
    return [entry for entry in recipe.log if entry["search"] == search]


def test_every_family_by_history_is_tried_and_the_planted_rule_decides(selected):
    recipe, retrievers = selected
    assert set(BY_COST) == {name for name, family in FAMILIES.items() if family.asks != "words"}
    tried = {e["family"]: e for e in entries(recipe, "family")}
    assert set(tried) == set(BY_COST) and not [e for e in tried.values() if "left out" in e]
    steps = entries(recipe, "forward selection")
    assert steps[0]["best"] == "transitions" and steps[0]["added"]
    assert [s["added"] for s in steps] == [True] * (len(steps) - 1) + [steps[-1]["added"]]
    added = [s["best"] for s in steps if s["added"]]
    assert set(recipe.settings) == set(retrievers) == {*added, *ALWAYS}
    for step in steps:
        assert step["added"] == (step["gain"] > step["standard_error"] - 1e-5)


def test_the_selected_recipe_serves_what_the_log_of_the_search_says(selected):
    recipe, retrievers = selected
    pipeline = Pipeline(retrievers, recipe.history, recipe.query, recipe.similar)
    lists = [c.items for c in pipeline.recommend(HELD_OUT.queries, 10)]
    assert (ranks_in(lists, HELD_OUT.targets) == 1).mean() > 0.5
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    for kind in ("gru4rec", "caser", "sasrec"):
        assert len(entries(recipe, kind)) <= 3


def test_what_cannot_be_tried_says_why():
    recipe, _ = select_families(TrainingLog(LOG.histories), HELD_OUT, TEXTS, CONFIG, minutes=1e-4)
    reasons = {e["family"]: e.get("left out") for e in entries(recipe, "family")}
    assert reasons["recent"] == "the log has no clock" and reasons["sasrec"] == "the time was over"
    assert reasons["popularity"] is None and entries(recipe, "forward selection")


def test_without_minutes_the_configured_families_are_searched():
    recipe, _ = choose_recipe(LOG, HELD_OUT, TEXTS, CONFIG)
    assert set(recipe.settings) == {"ease", "transitions", *ALWAYS}
    assert not entries(recipe, "forward selection")


def test_who_chose_an_epoch_does_not_choose_the_weights(selected):
    users = HeldOut([Query(np.array([n], np.int32)) for n in range(40)], np.arange(40, dtype=np.int32))
    choosing, judging = epoch_users(["ease", "gru4rec"], users, 0)
    both = np.concatenate([choosing.targets, judging.targets])
    assert sorted(both) == list(range(40)) and len(choosing.targets) == 20
    assert epoch_users(["ease", "transitions"], users, 0) == (users, users)
    one = users.take(np.array([0]))
    assert epoch_users(["gru4rec"], one, 0) == (one, one)


@pytest.mark.parametrize("minutes", [None, 1.0])
def test_states_are_chosen_by_other_users_than_judge_them(monkeypatch, minutes):
    asked = {}

    def fit_family(name, log, texts, start, held_out, trials):
        asked.setdefault(name, held_out.sha256())
        return start, FAMILIES[name].fit(log, texts, start)

    def with_weights(recipe, retrievers, held_out, *rest):
        asked["weights"] = held_out.sha256()
        return recipe

    for module in (search, selection):
        monkeypatch.setattr(module, "fit_family", fit_family)
        monkeypatch.setattr(module, "with_weights", with_weights)
    config = CONFIG.model_copy(update={"families": ("ease", "gru4rec"), "search_minutes": minutes})
    choose_recipe(LOG, HELD_OUT, TEXTS, config)
    assert asked["gru4rec"] != asked["ease"] == asked["weights"]


def test_one_held_out_user_is_enough():
    config = CONFIG.model_copy(update={"families": ("ease", "gru4rec"), "search_minutes": None})
    recipe, _ = choose_recipe(LOG, HELD_OUT.take(np.array([0])), TEXTS, config)
    assert "gru4rec" in recipe.settings


def test_a_sequence_model_is_fitted_again_for_as_many_epochs_as_were_best(selected):
    config = CONFIG.model_copy(update={"families": ("gru4rec",)})
    recipe, retrievers = choose_recipe(LOG, HELD_OUT, TEXTS, config)
    values = [e["ndcg@10"] for e in entries(recipe, "gru4rec")]
    settings = recipe.settings["gru4rec"]
    assert settings.epochs == int(np.argmax(values)) + 1 and settings.minutes is None
    again = FAMILIES["gru4rec"].fit(LOG, TEXTS, settings)
    history = [HELD_OUT.queries[0].history]
    np.testing.assert_allclose(again.scores(history), retrievers["gru4rec"].scores(history), atol=1e-4)
