"""Splits by time, by new items and by new users; pools; and what the configuration refuses."""

import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import ConfigError, DataError
from llmrec.evaluation.leaks import check_split
from llmrec.evaluation.pools import complete, drawn_pools, fixed_pools
from llmrec.evaluation.protocol import ProtocolConfig, make_split
from llmrec.evaluation.split import Part, leave_last_out
from llmrec.events import EventLog
from llmrec.types import Event, Item

CATALOG = Catalog.load([Item(f"i{n}", f"title {n}") for n in range(20)])
rows = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 19), st.integers(0, 50)), min_size=30, max_size=90
)


def log_of(events, clock="time", ties="input"):
    return EventLog.load([Event(u, f"i{i}", t) for u, i, t in events], CATALOG, clock=clock, ties=ties)


def split_or_none(log, **protocol):
    try:
        return make_split(log, ProtocolConfig(**protocol))
    except DataError:
        return None


@settings(max_examples=80, deadline=None)
@given(rows, st.sampled_from(["leave-last", "time", "cold-item", "cold-user"]), st.sampled_from([0.1, 0.3]))
def test_every_split_passes_the_leak_checks_and_holds_what_its_name_says(events, name, share):
    log = log_of(events)
    split = split_or_none(log, split=name, **{} if name == "leave-last" else {"share": share})
    if split is None:
        return
    check_split(split)
    for part in (split.validation, split.test):
        assert len(set(part.users.tolist())) == len(part), "one target a user"
    if name == "time":
        start = log.timestamp[split.validation.events].min()
        assert log.timestamp[split.fitted].max() < start
        assert log.timestamp[split.validation.events].max() < log.timestamp[split.test.events].min()
        for user, event in zip(split.test.users, split.test.events, strict=True):
            later = log.timestamp[log.offsets[user] : event]
            boundary = np.quantile(log.timestamp, 1 - share, method="higher")
            assert (later < boundary).all(), "the target is the first event of its stretch"
    if name == "cold-item":
        held_out = set(log.item[~split.fitted].tolist())
        assert not held_out & set(log.item[split.fitted].tolist())
        assert {*split.test.targets.tolist(), *split.validation.targets.tolist()} <= held_out
        assert not set(split.test.targets.tolist()) & set(split.validation.targets.tolist())
        later = set(split.test.targets.tolist())
        assert not any(later & set(h.tolist()) for h in split.validation.histories)
        first = {i: log.timestamp[log.item == i].min() for i in np.unique(log.item)}
        assert min(first[i] for i in held_out) >= max(first[i] for i in set(first) - held_out)
    if name == "cold-user":
        assert not set(log.user[split.fitted].tolist()) & {*split.test.users, *split.validation.users}
        assert (split.test.events == log.offsets[1:][split.test.users] - 1).all()


def test_times_are_read_from_seconds_dates_and_text_and_need_a_clock():
    day = int(datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC).timestamp())
    events = [(u, i, day - 100 + 50 * i) for u in "abc" for i in range(6)]
    log = log_of(events)
    splits = [
        make_split(log, ProtocolConfig(split="time", validation_from=low, test_from=day + 60))
        for low in (day, datetime.date(2020, 1, 2), "2020-01-02", "2020-01-02T00:00:00Z")
    ]
    assert len({tuple(s.fitted) for s in splits}) == 1
    assert splits[0].fitted.sum() == 6
    assert [CATALOG.ids[i] for i in splits[0].validation.targets] == ["i2"] * 3
    with pytest.raises(DataError, match="needs time stamps"):
        make_split(log_of(events, clock="none"), ProtocolConfig(split="time"))
    with pytest.raises(DataError, match="leaves no test events"):
        make_split(log, ProtocolConfig(split="time", validation_from=day, test_from=day + 10**6))
    with pytest.raises(DataError, match="must be before"):
        make_split(log, ProtocolConfig(split="time", validation_from=day, test_from=day))


def test_without_a_clock_cold_items_are_drawn_by_the_seed():
    log = log_of([(u, (ord(u) + i) % 20, 0) for u in "abcdefgh" for i in range(8)], clock="none")
    drawn = [make_split(log, ProtocolConfig(split="cold-item", seed=s)).fitted for s in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    for useless in ({}, {"split": "time", "validation_from": 1, "test_from": 2}):
        with pytest.raises(ConfigError, match="share is of splits that are drawn"):
            make_split(log, ProtocolConfig(share=0.2, **useless))
    with pytest.raises(DataError, match="cannot hold out a share"):
        make_split(log_of([(u, i, 0) for u in "abc" for i in range(4)]), ProtocolConfig(split="time"))
    few = log_of([("a", 0, 0), ("a", 1, 0)], clock="none")
    for name in ("cold-item", "cold-user"):
        with pytest.raises(DataError, match="too few"):
            make_split(few, ProtocolConfig(split=name))


def test_all_problems_of_a_protocol_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        Config.of({"protocol": {"split": "last", "share": 0.7, "users": 0, "tests": 1}})
    for word in ("split", "share", "users", "tests"):
        assert f"protocol.{word}" in str(raised.value)
    with pytest.raises(ConfigError, match="needs a clock"):
        Config.of({"protocol": {"split": "time"}, "data": {"clock": "none"}})
    for wrong in (
        {"validation_from": 1},
        {"validation_from": 1, "test_from": 2},
        {"negatives": 5, "candidates": "x"},
        {"candidate_count": 5},
    ):
        with pytest.raises(ConfigError, match="protocol"):
            Config.of({"protocol": wrong})


def test_what_is_not_full_ranking_says_so():
    assert ProtocolConfig().ranking == "full catalogue"
    for protocol in (ProtocolConfig(negatives=99), ProtocolConfig(candidates="c.parquet")):
        assert "not comparable" in protocol.ranking and not protocol.full_ranking


@pytest.fixture
def part():
    return leave_last_out(log_of([(u, (3 * i + ord(u)) % 20, i) for u in "abcd" for i in range(6)])).test


def test_drawn_pools_hold_the_target_and_unseen_items_and_do_not_depend_on_the_sample(part):
    active = np.ones(20, dtype=bool)
    active[0] = False
    pools = drawn_pools(part, 5, active, True, seed=1)
    for pool, history, target in zip(pools, part.histories, part.targets, strict=True):
        assert len(pool) == len(set(pool.tolist())) == 6 and target in pool
        assert not set(pool.tolist()) - {int(target)} & set(history.tolist())
        assert 0 not in set(pool.tolist()) - {int(target)}
    repeated = part.targets[:1]
    histories = [np.append(part.histories[0], repeated), *part.histories[1:]]
    again = Part(part.users, histories, part.targets, part.events)
    assert repeated[0] not in drawn_pools(again, 5, active, True, seed=1)[0], "a miss, as in full ranking"
    assert repeated[0] in drawn_pools(again, 5, active, False, seed=1)[0]
    again = drawn_pools(part.take(np.array([2])), 5, active, True, seed=1)
    assert again[0].tolist() == pools[2].tolist()


def test_fixed_pools_are_read_by_source_and_may_be_made_to_hold_the_target(part, tmp_path):
    path = tmp_path / "candidates.parquet"
    target = CATALOG.ids[part.targets[0]]
    others = [i for i in CATALOG.ids if i != target][:6]
    table = {
        "user_id": ["a", "a", "nobody"],
        "source": ["x", "y", "x"],
        "candidates": [others, [*others[:2], target, *others[2:]], others],
    }
    pl.DataFrame(table).write_parquet(path)
    users = list("abcd")
    kept, pools = fixed_pools(path, part, users, CATALOG, source="x")
    assert kept.users.tolist() == [0] and sorted(CATALOG.ids[i] for i in pools[0]) == sorted(others)
    _, pools = fixed_pools(path, part, users, CATALOG, source="x", count=4)
    assert {CATALOG.ids[i] for i in pools[0]} == {*others[:3], target}
    _, pools = fixed_pools(path, part, users, CATALOG, source="y", count=4)
    assert {CATALOG.ids[i] for i in pools[0]} == {*others[:3], target}
    with pytest.raises(DataError, match="user 'a' has fewer than 8 candidates"):
        fixed_pools(path, part, users, CATALOG, source="x", count=9)
    with pytest.raises(DataError, match="known are x, y"):
        fixed_pools(path, part, users, CATALOG, source="z")
    with pytest.raises(DataError, match="more than one list"):
        fixed_pools(path, part, users, CATALOG)
    pl.DataFrame({**table, "candidates": [["strange"], others, others]}).write_parquet(path)
    with pytest.raises(DataError, match="1 candidates of user 'a' are unknown"):
        fixed_pools(path, part, users, CATALOG, source="x")
    pl.DataFrame({"user_id": ["a"], "candidates": ["i1"]}).write_parquet(path)
    with pytest.raises(DataError, match="must be lists"):
        fixed_pools(path, part, users, CATALOG)


def test_a_pool_is_ranked_to_its_end():
    pool = np.array([4, 2, 9, 7], dtype=np.int32)
    assert complete(np.array([9], dtype=np.int32), pool).tolist() == [9, 4, 2, 7]


def test_a_part_is_what_came_before_each_event():
    log = log_of([("a", 3, 1), ("a", 5, 2), ("b", 7, 1)])
    part = Part.of(log, np.array([1, 2]))
    assert [h.tolist() for h in part.histories] == [[CATALOG.code("i3")], []]
    assert part.targets.tolist() == [CATALOG.code("i5"), CATALOG.code("i7")]
