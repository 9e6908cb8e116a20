from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.errors import DataError, RequestError
from llmrec.events import EventLog, live_events
from llmrec.types import Event, Item

CATALOG = Catalog.load([Item(item_id, f"title {item_id}") for item_id in ("10", "9", "2", "007", "7")])


def frame(rows, columns=("user_id", "item_id", "timestamp")):
    return pl.DataFrame(rows, schema=list(columns), orient="row", strict=False)


def ids(log, user_id):
    return [CATALOG.ids[code] for code in log.history(log.users.index(user_id))]


def test_events_are_grouped_by_user_and_ordered_by_time_then_input():
    log = EventLog.load(
        frame([("b", "10", 5), ("a", "9", 9), ("b", "2", 1), ("a", "10", 9), ("b", "9", 5)]), CATALOG
    )
    assert log.users == ["a", "b"] and log.n_users == 2 and len(log) == 5
    assert ids(log, "b") == ["2", "10", "9"] and ids(log, "a") == ["9", "10"]
    assert log.timestamp.tolist() == [9, 9, 1, 5, 5] and log.offsets.tolist() == [0, 2, 5]
    assert log.user.dtype == log.item.dtype == np.int32 and log.weight.dtype == np.float32
    assert log.require_clock("decay") is log.timestamp


def test_ties_by_item_compare_digits_as_integers_and_other_ids_as_text():
    rows = frame([("a", item, 1) for item in ("10", "9", "7", "2", "007")])
    assert ids(EventLog.load(rows, CATALOG, ties="item"), "a") == ["2", "007", "7", "9", "10"]
    words = Catalog.load([Item(item, "t") for item in ("10", "9", "x")])
    log = EventLog.load(rows.filter(pl.col("item_id").is_in(["10", "9"])).reverse(), words, ties="item")
    assert [words.ids[code] for code in log.item] == ["10", "9"]


ITEMS = Catalog.load([Item(str(n), "t") for n in range(6)])
events = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=60
)


@settings(max_examples=100, deadline=None)
@given(events, st.sampled_from(["input", "item"]), st.sampled_from(["time", "none"]))
def test_order_equals_a_plain_sort(rows, ties, clock):
    log = EventLog.load(frame([(u, str(i), t) for u, i, t in rows]), ITEMS, ties=ties, clock=clock)
    users = sorted({user for user, _, _ in rows})
    key = (lambda row: (row[2], row[1] if ties == "item" else 0)) if clock == "time" else (lambda row: 0)
    expected = [row for user in users for row in sorted((r for r in rows if r[0] == user), key=key)]
    assert [(log.users[u], int(i)) for u, i in zip(log.user, log.item, strict=True)] == [
        r[:2] for r in expected
    ]
    assert log.users == users
    assert (
        log.timestamp is None if clock == "none" else log.timestamp.tolist() == [row[2] for row in expected]
    )
    seen: set[tuple[str, int]] = set()
    # A row that is there twice is one choice.
    once = set(expected) if clock == "time" else expected
    repeats = sum((row[:2] in seen) or seen.add(row[:2]) or 0 for row in once)
    assert log.repeat_share() == pytest.approx(repeats / len(once))
    again = EventLog.load(log.to_events(ITEMS), ITEMS, clock=clock)
    assert again.fingerprint == log.fingerprint and again.users == log.users


@settings(max_examples=100, deadline=None)
@given(events, st.integers(1, 5))
def test_core_equals_dropping_one_user_or_item_at_a_time(rows, k):
    log = EventLog.load(frame([(u, str(i), t) for u, i, t in rows]), ITEMS)
    left = [(log.users[u], int(i)) for u, i in zip(log.user, log.item, strict=True)]
    while True:
        counts = Counter(part for row in left for part in row)
        rare = next((part for part, count in counts.items() if count < k), None)
        if rare is None:
            break
        left = [row for row in left if rare not in row]
    core = log.core(k)
    assert [(core.users[u], int(i)) for u, i in zip(core.user, core.item, strict=True)] == left
    assert core.report.rows_kept == len(left) and core.offsets[-1] == len(left)
    assert core.users == sorted({user for user, _ in left})


@settings(max_examples=60, deadline=None)
@given(events, st.integers(0, 4))
def test_drop_last_shortens_every_history_and_keeps_user_indices(rows, n):
    log = EventLog.load(frame([(u, str(i), t) for u, i, t in rows]), ITEMS)
    shorter = log.drop_last(n)
    assert shorter.users == log.users
    for user in range(log.n_users):
        assert (
            shorter.history(user).tolist() == log.history(user).tolist()[: max(0, len(log.history(user)) - n)]
        )


def test_one_user_and_one_item_are_a_log():
    log = EventLog.load(frame([("a", "10", 1)]), CATALOG)
    assert len(log) == log.n_users == 1 and log.repeat_share() == 0.0
    empty = log.drop_last(1)
    assert (
        len(empty) == 0 and empty.n_users == 1 and empty.repeat_share() == 0.0 and empty.core(2).n_users == 0
    )
    assert empty.to_events(CATALOG) == []


def test_all_problems_are_reported_at_once_or_dropped_and_counted():
    rows = frame(
        [("a", "10", 1), (None, "10", 2), ("a", " ", 3), ("a", "x", 4), ("b", "y", 5), ("a", "9", None)]
    )
    with pytest.raises(DataError) as raised:
        EventLog.load(rows, CATALOG)
    for part in (
        "1 row: null or blank user_id (row 2)",
        "1 row: null or blank item_id (row 3)",
        "2 rows: item is not in the catalogue (rows 4, 5), e.g. 'x', 'y'",
        "1 row: timestamp missing or not readable (row 6)",
        "the policy 'drop'",
    ):
        assert part in str(raised.value)
    log = EventLog.load(rows, CATALOG, policy="drop")
    assert log.users == ["a"] and ids(log, "a") == ["10"] and log.report.rows_kept == 1
    assert log.report.dropped["item is not in the catalogue"] == 2
    with pytest.raises(DataError, match="no rows left"):
        EventLog.load(frame([("a", "x", 1)]), CATALOG, policy="drop")


def test_number_ids_and_duplicates():
    log = EventLog.load(frame([(1.0, 10, 5), (1.0, 10, 5), (2.0, 9, 5)]), CATALOG)
    assert log.users == ["1", "2"] and len(log) == 3
    assert log.report.notes == ("kept although they repeat user, item and time stamp of another row: 1",)


@pytest.mark.parametrize(
    ("stamps", "seconds", "unit"),
    [
        ([1577836800, 1577836801], 1577836800, ""),
        ([1577836800.0, 0.0], 1577836800, ""),
        (["1577836800", " 5 "], 1577836800, ""),
        (["1577836800.0", "1.5778368e9"], 1577836800, ""),
        (["2020-01-01", "1969-12-31"], 1577836800, ""),
        (["2020-01-01 00:00", "2021-01-01T00:00:07.25"], 1577836800, ""),
        (["2020-01-01T01:30:00+01:30", "2020-01-01T00:00:00Z"], 1577836800, ""),
        (["2020-01-01 01:00:00+01", "2020-01-01 00:00:00+00"], 1577836800, ""),
        ([20231332, 20231124], 20231332, ""),
        (["2019-12-31 19:00:00 -0500", "2020-01-01T00:00:00+00:00"], 1577836800, ""),
        ([dt.datetime(2020, 1, 1), dt.datetime(1960, 1, 1)], 1577836800, ""),
        ([dt.date(2020, 1, 1), dt.date(2020, 1, 2)], 1577836800, ""),
        ([dt.datetime(2020, 1, 1, tzinfo=dt.UTC)] * 2, 1577836800, ""),
        ([1577836800999, 1577836800000], 1577836800, "milliseconds"),
        ([1577836800_000_000, 1577836800_000_001], 1577836800, "microseconds"),
        ([1577836800_000_000_000, 1577836800_000_000_001], 1577836800, "nanoseconds"),
        (["1577836800000", "1577836800000"], 1577836800, "milliseconds"),
        ([-5, 3], -5, ""),
    ],
)
def test_time_stamps_of_every_spelling(stamps, seconds, unit):
    rows = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["10", "9"], "timestamp": stamps})
    log = EventLog.load(rows, CATALOG)
    assert log.timestamp[0] == seconds and log.timestamp.dtype == np.int64
    assert log.report.notes == ((f"timestamp was read as {unit}",) if unit else ())


@pytest.mark.parametrize(
    ("stamps", "message"),
    [
        (["2020-01-01", "5"], "mixes formats: 1 row: numbers (row 2); 1 row: ISO dates (row 1)"),
        (["2020-01-01", "2020-01-01T00:00:00"], "mixes formats"),
        (["2020-01-01T00:00:00", "2020-01-01T00:00:00Z"], "mixes formats"),
        (
            [1577836800, 1577836800000],
            "mixes formats: 1 row: milliseconds (row 2); 1 row: smaller units (row 1)",
        ),
        ([1577836800000, 1577836800000000], "mixes formats"),
        (["yesterday", "01/02/2020"], "2 rows: timestamp missing or not readable (rows 1, 2)"),
        (["2020-13-01", "2020-02-30"], "2 rows: timestamp missing or not readable (rows 1, 2)"),
        ([float("nan"), 2.5], "1 row: timestamp missing or not readable (row 1)"),
        ([20231124, 20231231], "is a date such as 20231124"),
        (["20231124", "20240229"], "is a date such as 20231124"),
        (
            ["2020-01-01T00:00:00+99", "2020-01-01T00:00:00+15:00"],
            "2 rows: timestamp missing or not readable",
        ),
        ([float("nan"), float("inf")], "2 rows: timestamp missing or not readable (rows 1, 2)"),
        (["99999999999999999999", "1"], "1 row: timestamp missing or not readable (row 1)"),
        ([None, None], "2 rows: timestamp missing or not readable"),
        ([True, False], "column 'timestamp' holds Boolean"),
    ],
)
def test_bad_time_stamps_are_data_errors_with_counts_and_rows(stamps, message):
    rows = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["10", "9"], "timestamp": stamps})
    with pytest.raises(DataError, match=re.escape(message)):
        EventLog.load(rows, CATALOG)
    assert len(EventLog.load(rows, CATALOG, clock="none")) == 2


def test_a_log_without_clock_refuses_what_needs_one():
    rows = frame([("a", "10"), ("a", "9")], ("user_id", "item_id"))
    with pytest.raises(DataError, match=r"no column 'timestamp'.*clock='none'"):
        EventLog.load(rows, CATALOG)
    log = EventLog.load(rows, CATALOG, clock="none")
    assert log.timestamp is None and log.to_events(CATALOG)[0] == Event("a", "10", None, 1.0)
    with pytest.raises(DataError, match="a time split needs time stamps"):
        log.require_clock("a time split")
    with pytest.raises(DataError, match="clock is 'time' or 'none'"):
        EventLog.load(rows, CATALOG, clock="maybe")


def test_ratings_weights_and_event_types_decide_what_counts():
    columns = ("user_id", "item_id", "rating", "weight", "event")
    rows = frame(
        [
            ("a", "10", 5.0, 1.0, "buy"),
            ("a", "9", 2.0, 1.0, "buy"),
            ("a", "2", 4.0, 2.0, "view"),
            ("a", "7", 4.0, 1.0, "bot"),
        ],
        columns,
    )
    weights = {"buy": 3.0, "view": 0.5, "bot": 0}
    log = EventLog.load(rows, CATALOG, clock="none", rating_threshold=4, event_weights=weights)
    assert ids(log, "a") == ["10", "2"] and log.weight.tolist() == [3.0, 1.0]
    assert log.report.dropped == {"rating below 4": 1, "event type of weight 0": 1}
    plain = EventLog.load(rows.with_columns(quantity=1), CATALOG, clock="none")
    assert plain.weight.tolist() == [1, 1, 2, 1]
    (note,) = plain.report.notes
    assert note.startswith(
        "columns that are not read: rating, where every one counts (data.rating_threshold); "
    )
    assert note.endswith("event, where every type counts 1 (data.event_weights); quantity")
    assert log.report.notes == ()

    def fails(message, table=rows, **options):
        with pytest.raises(DataError, match=message):
            EventLog.load(table, CATALOG, clock="none", **options)

    fails("rating_threshold needs a column 'rating'", rows.drop("rating"), rating_threshold=4)
    fails("event_weights needs a column 'event'", rows.drop("event"), event_weights=weights)
    fails(
        "1 rows have an event type without a weight: 'view'.*lists 'buy', 'bot'",
        event_weights={"buy": 1, "bot": 0},
    )
    fails("must be finite", event_weights={"buy": float("inf")})
    for bad in (0.0, -1.0, float("nan"), float("inf"), None, 1e60):
        fails(
            r"2 rows: weight is not finite and above 0",
            rows.with_columns(weight=pl.Series([1.0, bad, bad, 1.0])),
        )
    unrated = rows.with_columns(rating=pl.Series(["5", "x", None, "4"]))
    fails(r"2 rows: rating is not a number \(rows 2, 3\)", unrated, rating_threshold=4)
    assert len(EventLog.load(unrated, CATALOG, clock="none", rating_threshold=4, policy="drop")) == 2


def test_event_values_are_read_like_tables():
    rows = [Event("a", "9", 7), Event("b", "x", 1), Event("a", "10", 3, 2.5)]
    with pytest.raises(DataError, match="1 row: item is not in the catalogue"):
        EventLog.load(rows, CATALOG)
    log = EventLog.load(rows, CATALOG, policy="drop")
    assert ids(log, "a") == ["10", "9"] and log.users == ["a"] and log.weight.tolist() == [2.5, 1.0]
    with pytest.raises(DataError, match="1 row: timestamp missing"):
        EventLog.load([Event("a", "9")], CATALOG)
    assert len(EventLog.load([Event("a", "9")], CATALOG, clock="none")) == 1


def test_removed_items_stay_in_histories():
    log = EventLog.load(frame([("a", "9", 1)]), CATALOG.without_items(["9"]))
    assert ids(log, "a") == ["9"]


def test_fingerprint_sees_every_change():
    logs = [
        EventLog.load(frame(rows), CATALOG, clock=clock)
        for rows in ([("a", "9", 1)], [("b", "9", 1)], [("a", "10", 1)], [("a", "9", 2)])
        for clock in ("time", "none")
    ]
    assert len({log.fingerprint for log in logs}) == 7  # without a clock, the last equals the first


MILLION = """
import json, resource, sys, time
import numpy as np, polars as pl
from llmrec.catalog import Catalog
from llmrec.events import EventLog
folder, rng, n = sys.argv[1], np.random.default_rng(0), 1_000_000
user, item, stamp = rng.integers(0, 50_000, n), rng.integers(0, 100_000, n), rng.integers(1, 10**9, n)
pl.DataFrame({"item_id": [str(i) for i in range(100_000)], "title": [f"Item {i}" for i in range(100_000)]}
).write_parquet(folder + "/items.parquet")
table = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": stamp}).with_columns(
    pl.format("u{}", "user_id").alias("user_id"), pl.col("item_id").cast(pl.String))
table.write_parquet(folder + "/events.parquet")
start = time.perf_counter()
catalog = Catalog.load(folder + "/items.parquet")
log = EventLog.load(folder + "/events.parquet", catalog, ties="item")
seconds = time.perf_counter() - start
order = np.lexsort((item, stamp, user))
one = log.users.index(f"u{user[0]}")
same = log.history(one).tolist() == item[order][user[order] == user[0]].tolist()
events = log.to_events(catalog)
start = time.perf_counter()
again = EventLog.load(events, catalog)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"rows": len(log), "same": same, "again": len(again), "seconds": seconds,
                  "values": time.perf_counter() - start, "gib": peak}))
"""


def test_a_million_events_and_a_hundred_thousand_items_load_in_seconds(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path)], check=True, capture_output=True, text=True
    )
    result = pl.read_json(run.stdout.encode()).row(0, named=True)
    assert result["rows"] == result["again"] == 1_000_000 and result["same"]
    assert result["seconds"] < 20 and result["values"] < 20 and result["gib"] < 2


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not here")
def test_real_logs_have_the_published_cores():
    def core(name, clock, ties):
        catalog = Catalog.load(DATA / name / "items.parquet", policy="drop")
        log = EventLog.load(DATA / name / "events.parquet", catalog, clock=clock, ties=ties, policy="drop")
        core = log.core(5)
        return core.n_users, len(np.unique(core.item)), len(core)

    assert core("ml-latest-small", "time", "item") == (610, 3650, 90_274)
    users, items, _ = core("amazon-beauty", "none", "input")
    assert 22_327 <= users <= 22_332 and 12_000 < items <= 12_086


def test_a_weight_beyond_the_largest_is_refused_and_says_what_to_do():
    rows = frame([("a", "10", 1), ("a", "9", 2)]).with_columns(weight=pl.Series([1000.0, 1000.1]))
    with pytest.raises(DataError, match=r"weight above 1,000: .*divide.*\(row 2\)"):
        EventLog.load(rows, CATALOG)
    with pytest.raises(RequestError, match="at most 1,000"):
        live_events([Event("a", "10", weight=2000.0)], CATALOG, "time", 5)


def test_a_live_event_may_have_the_numbers_of_a_table_and_stands_in_a_list():
    (event,) = live_events([Event("a", "10", np.int64(7), np.float32(2.5))], CATALOG, "time", 9)
    assert event == Event("a", "10", 7, 2.5) and type(event.timestamp) is int and type(event.weight) is float
    with pytest.raises(RequestError, match="a list of events"):
        live_events(Event("a", "10"), CATALOG, "time", 9)


def test_ids_with_the_character_nul_are_refused_as_databases_would():
    catalog = Catalog.load([Item("1", "A")])
    with pytest.raises(DataError, match=r"user_id.*NUL"):
        EventLog.load(frame([("a\0b", "1", 5)]), catalog)
    with pytest.raises(DataError, match=r"item_id.*NUL"):
        Catalog.load([Item("1\0", "A")])
    for event in (Event("a\0b", "1", 5), Event("a", "1", 5, event_id="x\0")):
        with pytest.raises(RequestError, match="without NUL"):
            live_events([event], catalog, "time", 9)


def test_a_log_says_its_days_and_what_is_later_than_today():
    log = EventLog.load(frame([("a", "10", 0), ("a", "9", 2_700_000_000)]), CATALOG)
    assert log.span() == "from 1970-01-01 to 2055-07-24"
    assert any("later than today" in note and note.endswith(": 1") for note in log.report.notes)
    assert EventLog.load(frame([("a", "10", 0)]), CATALOG, clock="none").span() == ""


def test_time_stamps_are_read_as_they_are_said_to_be_written_and_parts_of_a_second_go():
    def load(stamps, written=None):
        rows = [{"user_id": str(n), "item_id": "a", "timestamp": stamp} for n, stamp in enumerate(stamps)]
        return EventLog.load(
            rows, Catalog.load([Item("a", "A")]), timestamp_format=written
        ).timestamp.tolist()

    noon = 1_700_049_600
    assert load([noon + 0.9, noon + 1.25]) == load([f"{noon}.9", f"{noon + 1}.25"]) == [noon, noon + 1]
    assert load(["11/15/2023 12:00"], "%m/%d/%Y %H:%M") == [noon]
    assert load(["15.11.2023"], "%d.%m.%Y") == [noon - 43_200]
    assert load(["2023-11-15 14:00 +0200"], "%Y-%m-%d %H:%M %z") == [noon]
    for text, written in (("soon", "%m/%d/%Y"), ("11/15/2023", "%Q"), ("11/15/2023 4", "%m/%d/%Y %H")):
        with pytest.raises(DataError, match=f"timestamp_format.*{written}"):
            load([text], written)


def test_ids_that_are_spelled_otherwise_are_named():
    catalog = Catalog.load([Item("1", "A"), Item("2", "B")])
    for item in ("1.0", "002"):
        with pytest.raises(DataError, match=f"the catalogue has '[12]' where the events have '{item}'"):
            EventLog.load([{"user_id": "u", "item_id": item, "timestamp": 1}], catalog)
