"""What every family of retrievers must do, and that its flags tell the truth."""

import json

import numpy as np
import pytest

from llmrec.assembly import make_texts
from llmrec.catalog import Catalog
from llmrec.encode.light import LightEncoder
from llmrec.errors import ConfigError
from llmrec.evaluation.split import training_log
from llmrec.events import EventLog
from llmrec.families import FAMILIES, TrainingLog
from llmrec.protocols import Query
from llmrec.recipe import Recipe, RetrievalConfig, fit_retrievers, load_retrievers, retriever_arrays
from llmrec.testing import toy_data
from llmrec.types import Item

ITEMS, EVENTS = toy_data(users=50, items=30)
CATALOG = Catalog.load([*ITEMS, Item("zz", "Amber Bridge", "", ITEMS[0].attributes)])
LOG = training_log(EventLog.load(EVENTS, CATALOG))
TEXTS = make_texts(CATALOG.lines(), LightEncoder.fit(CATALOG.lines(), 16))
SMALL = {"dim": 8, "layers": 1, "window": 6, "epochs": 2, "tokens_per_step": 500}
CONFIG = RetrievalConfig(
    families=tuple(FAMILIES),
    gru4rec=SMALL,
    caser=SMALL,
    sasrec=SMALL,
    als={"dim": 4},
    lightgcn={"dim": 8, "steps": 5, "batch": 100},
    topics={"dim": 3},
)
RECIPE = Recipe.default(CONFIG)


@pytest.fixture(scope="module")
def retrievers():
    return fit_retrievers(LOG, TEXTS, RECIPE)


HISTORY = Query(LOG.histories[3], mask=np.arange(len(CATALOG)) % 3 > 0)
WORDS = Query(text="Amber Bridge", mask=np.ones(len(CATALOG), dtype=bool))
ASKED = [HISTORY, Query(), WORDS, Query(LOG.histories[5][:1])]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_hits_are_allowed_distinct_finite_and_best_first(retrievers, name):
    assert retrievers[name].name == name
    found = retrievers[name].retrieve(ASKED, 7)
    assert len(found) == len(ASKED)
    for query, hits in zip(ASKED, found, strict=True):
        assert hits.items.dtype == np.int32 and hits.scores.dtype == np.float32
        assert len(hits.items) == len(set(hits.items.tolist())) <= 7
        assert query.mask is None or query.mask[hits.items].all()
        assert np.isfinite(hits.scores).all() and (np.diff(hits.scores) <= 0).all()
        alone = retrievers[name].retrieve([query], 7)[0]
        np.testing.assert_allclose(np.sort(alone.scores), np.sort(hits.scores), atol=1e-4)
    assert retrievers[name].retrieve([], 3) == []


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_family_asks_for_is_what_it_needs(retrievers, name):
    asked = [Query(HISTORY.history), *ASKED[1:]]
    history, nothing, words, _ = (len(hits.items) > 0 for hits in retrievers[name].retrieve(asked, 7))
    asks = FAMILIES[name].asks
    assert (history, nothing, words) == {
        "": (True, True, True),
        "history": (True, False, False),
        "words": (False, False, True),
    }[asks]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_new_items_are_proposed_where_the_family_says_so(retrievers, name):
    new = CATALOG.code("zz")
    only = np.arange(len(CATALOG)) == new
    query = Query(LOG.histories[3], "Amber Bridge", only)
    assert (new in retrievers[name].retrieve([query], 3)[0].items) == FAMILIES[name].new_items


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_made_again_from_arrays_without_objects(retrievers, name):
    arrays = retriever_arrays({name: retrievers[name]})
    assert (name in arrays) == FAMILIES[name].learns
    assert all(a.dtype != object for of in arrays.values() for a in of.values())
    copies = {n: {key: np.array(a) for key, a in of.items()} for n, of in arrays.items()}
    again = load_retrievers(copies, TEXTS, Recipe({name: RECIPE.settings[name]}, *[RECIPE.history] * 3))
    for one, two in zip(retrievers[name].retrieve(ASKED, 9), again[name].retrieve(ASKED, 9), strict=True):
        assert one.items.tolist() == two.items.tolist()
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_fitting_needs_a_clock_where_the_family_says_so_and_an_empty_log_is_defined(name):
    family, settings = FAMILIES[name], RECIPE.settings[name]
    without = TrainingLog(LOG.histories)
    if family.clock:
        with pytest.raises(ConfigError, match="time stamps"):
            family.fit(without, TEXTS, settings)
    else:
        family.fit(without, TEXTS, settings)
    empty = family.fit(TrainingLog([], None, []), TEXTS, settings)
    assert len(empty.retrieve(ASKED, 3)) == len(ASKED)


def test_a_recipe_of_all_families_survives_json():
    assert Recipe.from_dict(json.loads(json.dumps(RECIPE.as_dict()))) == RECIPE


def test_without_a_search_every_configured_family_has_a_weight():
    recipe = Recipe.default(RetrievalConfig(families=("als", "recent", "sasrec"), search=False))
    assert recipe.history.retrievers == {"als": 1.0, "recent": 0.1, "sasrec": 1.0, "profile": 0.05}
    assert "popularity" not in Recipe.default(RetrievalConfig()).history.retrievers, "as before"


def test_heads_that_do_not_divide_are_a_clear_error():
    with pytest.raises(ValueError, match="heads must divide dim, got 2 and 9"):
        RetrievalConfig(sasrec={"dim": 9})


def test_an_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown families svd; known are again, als, bm25"):
        RetrievalConfig(families=("ease", "svd"))
