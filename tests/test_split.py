from __future__ import annotations

import numpy as np
import pytest

from llmrec.catalog import Catalog
from llmrec.errors import DataError
from llmrec.evaluation.split import cold_item_split, leave_last_out, tail
from llmrec.events import EventLog
from llmrec.types import Event, Item

CATALOG = Catalog.load([Item(letter, f"title {letter}") for letter in "abcdef"])
# Users of four, one, three and two events, not in the order of time.
ROWS = [
    ("long", "d", 4), ("long", "a", 1), ("one", "f", 9), ("long", "c", 3), ("long", "a", 2),
    ("three", "e", 30), ("three", "b", 10), ("two", "c", 6), ("two", "a", 5), ("three", "d", 20),
]  # fmt: skip


def log_of(rows):
    return EventLog.load([Event(*row) for row in rows], CATALOG)


def words(histories):
    return ["".join(CATALOG.ids[code] for code in history) for history in histories]


def test_leave_last_out_takes_the_last_two_events_of_users_with_three():
    log = log_of(ROWS)
    split = leave_last_out(log)
    assert log.users == ["long", "one", "three", "two"]
    assert words(split.train) == ["aa", "f", "b", "ac"]
    assert [log.users[u] for u in split.validation.users] == ["long", "three"]
    assert words(split.validation.histories) == ["aa", "b"]
    assert words([split.validation.targets]) == ["cd"]
    assert split.test.users.tolist() == split.validation.users.tolist()
    assert words(split.test.histories) == ["aac", "bd"] and words([split.test.targets]) == ["de"]
    assert split.test.targets.dtype == np.int32


def test_the_tail_is_the_last_event_of_users_with_two():
    log = log_of(ROWS)
    train, part = tail(log)
    assert train.weights is None and [t.tolist() for t in train.stamps] == [[1, 2, 3], [9], [10, 20], [5]]
    assert words(train.histories) == ["aac", "f", "bd", "a"]
    assert [log.users[u] for u in part.users] == ["long", "three", "two"]
    assert words(part.histories) == ["aac", "bd", "a"] and words([part.targets]) == ["dec"]


def test_a_log_without_a_user_of_three_events_cannot_be_split():
    with pytest.raises(DataError, match="at least 3 events; none of 2 has them"):
        leave_last_out(log_of([("one", "a", 1), ("two", "a", 1), ("two", "b", 2)]))
    train, part = tail(log_of([("one", "a", 1)]))
    assert (
        words(train.histories) == ["a"]
        and len(part) == 0
        and part.held_out(CATALOG.active, True).queries == []
    )


def test_held_out_queries_mask_removed_items_and_seen_ones_only_if_told():
    part = leave_last_out(log_of(ROWS)).test
    active = CATALOG.without_items(["f"]).active
    kept, excluded = part.held_out(active, False), part.held_out(active, True)
    assert kept.targets.tolist() == part.targets.tolist()
    assert ["".join(np.array(list("abcdef"))[q.mask]) for q in kept.queries] == ["abcde", "abcde"]
    assert ["".join(np.array(list("abcdef"))[q.mask]) for q in excluded.queries] == ["bde", "ace"]
    assert active.tolist() == [True] * 5 + [False], "the caller's mask stays as it was"


def test_a_sample_of_users_is_seeded_in_the_old_order_and_known_by_its_hash():
    rows = [(f"u{n:02}", item, t) for n in range(30) for t, item in enumerate("abc")]
    log = log_of(rows)
    part = leave_last_out(log).test
    some = part.sample(10, seed=1)
    assert len(some) == 10 and (np.diff(some.users) > 0).all()
    assert some.users.tolist() == part.sample(10, seed=1).users.tolist() != part.sample(10, 2).users.tolist()
    assert (
        some.sha256(log.users) == part.sample(10, 1).sha256(log.users) != part.sample(10, 2).sha256(log.users)
    )
    assert part.sample(None, 0) is part and part.sample(30, 0) is part
    for user, history, target in zip(some.users, some.histories, some.targets, strict=True):
        assert words([[*history, target]]) == ["abc"] == words([log.history(user)])


def test_a_split_by_cold_items_that_leaves_nobody_to_validate_on_is_refused():
    # Whoever meets the second last item has met the last one before, in a log without a clock.
    log = EventLog.load([Event("u", item) for item in "abcd"], CATALOG, clock="none")
    refused = 0
    for seed in range(20):
        try:
            assert len(cold_item_split(log, 0.25, seed).validation)
        except DataError as error:
            assert "no validation events" in str(error)
            refused += 1
    assert 0 < refused < 20
