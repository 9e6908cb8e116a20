"""Each check lets an honest evaluation pass and catches the leak that is planted here."""

from dataclasses import replace

import numpy as np
import pytest

from llmrec.assembly import make_texts
from llmrec.catalog import Catalog
from llmrec.encode.light import LightEncoder
from llmrec.errors import LeakError
from llmrec.evaluation.leaks import (
    check_counts,
    check_provenance,
    check_retrievers,
    check_split,
    count_duplicates,
)
from llmrec.evaluation.split import Part, Split, leave_last_out
from llmrec.events import EventLog
from llmrec.recipe import Recipe, RetrievalConfig, fit_retrievers, hash_histories
from llmrec.retrieve.linear import EASEConfig, EASERetriever
from llmrec.retrieve.popularity import PopularityRetriever
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


@pytest.mark.parametrize("which", ["split", "weighted"])
def test_honestly_fitted_retrievers_pass(which, texts, request):
    split = request.getfixturevalue(which)
    check_split(split)
    for settings in ({}, {"ease": EASEConfig(l2=5, fit_decay=0.8, keep=10)}):
        recipe = Recipe.default(RetrievalConfig(**settings))
        check_retrievers(fit_retrievers(split.training, texts, recipe), split)


@pytest.mark.parametrize(
    ("fit", "word"),
    [
        (lambda h: PopularityRetriever.fit(h, 40), "popularity"),
        (lambda h: TransitionsRetriever.fit(h, 40, TransitionsConfig()), "transitions"),
        (lambda h: EASERetriever.fit(h, 40, EASEConfig(l2=20)), "EASE"),
    ],
)
def test_a_retriever_that_has_seen_test_events_is_caught(split, fit, word):
    check_retrievers({"x": fit(split.train)}, split)
    with pytest.raises(LeakError, match=word):
        check_retrievers({"x": fit(with_test_events(split))}, split)


def test_one_leaked_event_is_enough_for_counts_and_transitions(split):
    row = next(
        u for u in split.test.users if len(split.train[u]) and split.log.history(u)[-1] not in split.train[u]
    )
    leaked = list(split.train)
    leaked[row] = np.append(leaked[row], split.log.history(row)[-1])
    with pytest.raises(LeakError, match="popularity"):
        check_retrievers({"x": PopularityRetriever.fit(leaked, 40)}, split)
    counts = np.bincount(np.concatenate(leaked), minlength=40).astype(np.float32)
    with pytest.raises(LeakError, match="language model's counts"):
        check_counts(counts, split)
    check_counts(np.bincount(np.concatenate(split.train), minlength=40).astype(np.float32), split)


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
    with pytest.raises(LeakError, match="validation and test at once"):
        check_split(Split(split.log, split.fitted, split.test, split.test))
    with pytest.raises(LeakError, match="not the event it is said to be"):
        other = (split.test.targets + 1) % 40
        check_split(Split(split.log, split.fitted, split.validation, change(split.test, targets=other)))


def test_settings_chosen_on_test_and_an_adapter_trained_on_it_are_caught(split, texts):
    active = np.ones(40, dtype=bool)
    validation, test = split.validation.held_out(active, True), split.test.held_out(active, True)
    honest, _ = search_recipe(split.training, validation, texts, RetrievalConfig())
    check_provenance(hash_histories(split.train), honest, split, validation)
    check_provenance(None, honest, split, validation)
    with pytest.raises(LeakError, match="adapter was made on other events"):
        check_provenance(hash_histories(with_test_events(split)), honest, split, validation)
    peeked, _ = search_recipe(split.training, test, texts, RetrievalConfig())
    with pytest.raises(LeakError, match=r"recipe \(held-out events\) was made on other events"):
        check_provenance(None, peeked, split, validation)


def test_repeated_rows_and_near_duplicates_are_counted():
    titles = ["red lamp", "red lamp", "blue boat", "green shoe", "steel pan"]
    catalog = Catalog.load([Item(f"i{n}", title) for n, title in enumerate(titles)])
    rows = [("a", "i2", 1), ("a", "i3", 2), ("a", "i0", 3), ("a", "i1", 4)]
    rows += [("b", "i0", 1), ("b", "i2", 2), ("b", "i2", 2), ("b", "i4", 3)]
    log = EventLog.load([Event(*row) for row in rows], catalog)
    texts = make_texts(catalog.lines(), LightEncoder.fit(catalog.lines(), 4))
    found = count_duplicates(leave_last_out(log), texts.vectors, texts.index)
    # User a's test target i1 has the words of i0, which is in the history.
    assert (found.repeated_rows, found.near_duplicate_items, found.targets_near_history) == (1, 2, 1)
