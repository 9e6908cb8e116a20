"""Each check lets an honest evaluation pass and catches the leak that is planted here."""

from dataclasses import replace

import numpy as np
import pytest

from llmrec.assembly import make_texts
from llmrec.catalog import Catalog
from llmrec.encode.light import LightEncoder
from llmrec.errors import LeakError
from llmrec.evaluation.leaks import (
    check_language_model,
    check_recipe,
    check_retrievers,
    check_split,
    count_duplicates,
)
from llmrec.evaluation.split import Part, Split, leave_last_out
from llmrec.events import EventLog
from llmrec.families import TrainingLog
from llmrec.recipe import Recipe, RetrievalConfig, fit_retrievers
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.retrieve.sequence import SequenceRetriever
from llmrec.retrieve.sequence_config import SequenceConfig
from llmrec.retrieve.transitions import TransitionsConfig, TransitionsRetriever
from llmrec.search import search_recipe
from llmrec.testing import toy_data
from llmrec.types import Event, Item


@pytest.fixture(scope="module")
def split():
    items, events = toy_data(users=60, items=40)
    catalog = Catalog.load(items)
    return leave_last_out(EventLog.load(events, catalog))


@pytest.fixture(scope="module")
def weighted():
    items, events = toy_data(users=60, items=40)
    events = [replace(e, weight=1.0 + n % 3) for n, e in enumerate(events)]
    catalog = Catalog.load(items)
    return leave_last_out(EventLog.load(events, catalog))


@pytest.fixture(scope="module")
def texts():
    lines = Catalog.load(toy_data(users=60, items=40)[0]).lines()
    return make_texts(lines, LightEncoder.fit(lines, 16))


def with_test_events(split):
    """What an evaluation would fit on that forgot to take the last event out."""
    return [np.append(h, split.log.history(u)[-1:]) for u, h in enumerate(split.train)]


def test_test_events_of_small_weight_are_noticed(split):
    log = replace(split.log, weight=np.full_like(split.log.weight, 5e-4))
    small = replace(split, log=log)
    honest = PopularityRetriever.fit(small.train, 40, small.training.weights)
    assert check_retrievers({"popularity": honest}, small, None)[0] == ["popularity"]
    histories = with_test_events(small)
    weights = [np.full(len(history), 5e-4) for history in histories]
    with pytest.raises(LeakError, match="does not count the training events alone"):
        check_retrievers({"popularity": PopularityRetriever.fit(histories, 40, weights)}, small, None)


@pytest.mark.parametrize("which", ["split", "weighted"])
def test_honestly_fitted_retrievers_pass(which, texts, request):
    split = request.getfixturevalue(which)
    assert check_split(split) == ["split"]
    for settings in (
        {},
        {
            "ease": EASEConfig(l2=5, fit_decay=0.8, keep=10),
            "transitions": TransitionsConfig(window=2, backward=0),
        },
        {"transitions": {"keep": 5}},
        {"ease": {"max_items": 10, "neighbours": 12}},
        {"families": ("ease", "transitions", "als", "gru4rec"), "gru4rec": {"dim": 4, "epochs": 1}},
    ):
        recipe = Recipe.default(RetrievalConfig(**settings))
        fitted = fit_retrievers(split.training, texts, recipe)
        checked, unchecked = check_retrievers(fitted, split, texts.vectors)
        learning = {"popularity", "ease", "transitions", "gru4rec"} & set(recipe.settings)
        assert set(checked) == learning and unchecked == [n for n in recipe.settings if n == "als"]


@pytest.mark.parametrize(
    ("fit", "word"),
    [
        (lambda h: PopularityRetriever.fit(h, 40), "popularity"),
        (lambda h: TransitionsRetriever.fit(h, 40, TransitionsConfig()), "transitions"),
        (lambda h: TransitionsRetriever.fit(h, 40, TransitionsConfig(keep=5)), "transitions"),
        (lambda h: EASERetriever.fit(h, 40, EASEConfig(l2=20)), "EASE"),
    ],
)
def test_a_retriever_that_has_seen_test_events_is_caught(split, fit, word):
    check_retrievers({"x": fit(split.train)}, split)
    with pytest.raises(LeakError, match=word):
        check_retrievers({"x": fit(with_test_events(split))}, split)


def test_one_leaked_event_is_enough_where_counts_are_kept(split):
    row = next(
        u for u in split.test.users if len(split.train[u]) and split.log.history(u)[-1] not in split.train[u]
    )
    leaked = list(split.train)
    leaked[row] = np.append(leaked[row], split.log.history(row)[-1])
    with pytest.raises(LeakError, match="popularity"):
        check_retrievers({"x": PopularityRetriever.fit(leaked, 40)}, split)
    config = SequenceConfig(dim=4, layers=1, epochs=1)
    model = SequenceRetriever.fit("gru4rec", leaked, np.zeros((40, 0), np.float32), config)
    with pytest.raises(LeakError, match="gru4rec"):
        check_retrievers({"gru4rec": model}, split)


def test_a_leaked_event_of_an_item_with_thousands_is_seen_in_its_count():
    events = [("many", "i0", n) for n in range(5000)] + [("u", "i1", 1), ("u", "i1", 2), ("u", "i0", 3)]
    catalog = Catalog.load([Item(f"i{n}", "t") for n in range(2)])
    split = leave_last_out(EventLog.load([Event(*row) for row in events], catalog))
    check_retrievers({"x": PopularityRetriever.fit(split.train, 2)}, split)
    with pytest.raises(LeakError, match="popularity"):
        check_retrievers({"x": PopularityRetriever.fit([*split.train, np.array([0], np.int32)], 2)}, split)


def change(part, **fields):
    values = {n: getattr(part, n) for n in ("users", "histories", "targets", "events")}
    return Part(**{**values, **fields})


def test_a_target_in_the_training_events_or_in_its_own_history_is_caught(split):
    fitted = split.fitted.copy()
    fitted[split.test.events[5]] = True
    with pytest.raises(LeakError, match="1 test targets are among the training events"):
        check_split(Split(split.log, fitted, split.validation, split.test))
    longer = [np.append(h, t) for h, t in zip(split.test.histories, split.test.targets, strict=True)]
    with pytest.raises(LeakError, match="history of user 'u0' is not what came before"):
        check_split(Split(split.log, split.fitted, split.validation, change(split.test, histories=longer)))
    with pytest.raises(LeakError, match="validation of user 'u0' holds a test event"):
        check_split(Split(split.log, split.fitted, split.test, split.test))
    with pytest.raises(LeakError, match="not the event it is said to be"):
        other = (split.test.targets + 1) % 40
        check_split(Split(split.log, split.fitted, split.validation, change(split.test, targets=other)))


def test_settings_chosen_on_test_are_caught(split, texts):
    active = np.ones(40, dtype=bool)
    validation, test = split.validation.held_out(active, True), split.test.held_out(active, True)
    honest, _ = search_recipe(split.training, validation, texts, RetrievalConfig())
    assert check_recipe(honest, validation) == ["recipe and blend"]
    assert check_recipe(Recipe.default(RetrievalConfig()), validation) == [], "nothing was chosen"
    peeked, _ = search_recipe(split.training, test, texts, RetrievalConfig())
    with pytest.raises(LeakError, match=r"recipe \(held-out events\) was made on other events"):
        check_recipe(peeked, validation)


def test_an_adapter_that_was_trained_or_chosen_on_test_events_is_caught(split):
    active = np.ones(40, dtype=bool)
    validation, test = split.validation.held_out(active, True), split.test.held_out(active, True)
    counts = np.bincount(np.concatenate(split.train), minlength=40).astype(np.float32)
    leaked = with_test_events(split)
    card = {"histories_sha256": split.training.sha256(), "selected_on_sha256": validation.sha256()}
    assert "adapter" in check_language_model(counts, card, split, validation)
    with pytest.raises(LeakError, match="adapter was made on other events"):
        wrong = {**card, "histories_sha256": TrainingLog(leaked).sha256()}
        check_language_model(counts, wrong, split, validation)
    with pytest.raises(LeakError, match="choice of the adapter's state"):
        wrong = {**card, "selected_on_sha256": test.sha256()}
        check_language_model(counts, wrong, split, validation)
    with pytest.raises(LeakError, match="language model's prior"):
        check_language_model(counts + np.eye(40, dtype=np.float32)[3], card, split, validation)


def test_a_validation_history_with_a_test_event_is_caught(split):
    earlier = split.test.events - 3
    with pytest.raises(LeakError, match="holds a test event"):
        part = Part.of(split.log, earlier[earlier >= split.log.offsets[split.test.users]])
        check_split(Split(split.log, split.fitted, split.test.take(part.users), part))


def test_repeated_rows_and_near_duplicates_are_counted():
    titles = ["red lamp", "red lamp", "blue boat", "green shoe", "steel pan"]
    catalog = Catalog.load([Item(f"i{n}", title) for n, title in enumerate(titles)])
    rows = [("a", "i2", 1), ("a", "i3", 2), ("a", "i0", 3), ("a", "i1", 4)]
    rows += [("b", "i0", 1), ("b", "i2", 2), ("b", "i2", 2), ("b", "i4", 3)]
    log = EventLog.load([Event(*row) for row in rows], catalog)
    texts = make_texts(catalog.lines(), LightEncoder.fit(catalog.lines(), 4))
    split = leave_last_out(log)
    # User a's test target i1 has the words of i0, which is in the history.
    assert count_duplicates(split, split.test, texts.vectors, texts.index) == {
        "repeated_rows": 1, "repeated_pairs": 1, "near_duplicate_items": 2, "targets_near_history": 1
    }  # fmt: skip
    assert count_duplicates(split, split.validation, texts.vectors, texts.index)["targets_near_history"] == 0
    clockless = EventLog.load([Event(*row) for row in rows], catalog, clock="none")
    again = leave_last_out(clockless)
    found = count_duplicates(again, again.test, texts.vectors, texts.index)
    assert (found["repeated_rows"], found["repeated_pairs"]) == (None, 1)
