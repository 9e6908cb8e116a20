"""A saved recommender shared by processes: its store by URL, changed items, saves that would overwrite."""

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from llmrec import Event, Item, Recommender
from llmrec.errors import ConflictError, DataError, NotFoundError, RequestError, StoreError
from llmrec.serve import ServeConfig, Service
from llmrec.serve.models import ItemIn
from llmrec.state import State
from llmrec.testing import toy_data

LIGHT = {"encoder": {"name": "light", "dim": 16}, "retrieval": {"search": False}}


def ids(found):
    return [r.item_id for r in found]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def opened(folder):
    """Load the saved recommender as another process would; all are closed in the end."""
    made = []

    def load(**arguments):
        made.append(Recommender.load(folder, **arguments))
        return made[-1]

    first = Recommender.fit(*toy_data(), LIGHT)
    first.save(folder)
    first.close()
    yield load
    for one in made:
        one.close()


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def tables(postgres):
    return set(postgres.psql("COPY (SELECT tablename FROM pg_tables) TO STDOUT").split())


# ---- events in a database -------------------------------------------------------------------------------


def test_events_live_in_the_database_and_its_url_nowhere(postgres, database, folder, monkeypatch, tmp_path):
    url = database.replace("postgres:@", "postgres:secret@")
    before = tables(postgres)
    config = {**LIGHT, "store": {"url": url}}
    rec = Recommender.fit(*toy_data(), config)
    assert tables(postgres) == before, "nothing is left of a recommender that is never saved"
    rec.save(folder)
    assert not list(folder.glob("*.sqlite*"))
    assert b"secret" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    name = manifest(folder)["events"].removeprefix("postgresql:")
    assert tables(postgres) - before == {f"{name}_events", f"{name}_items"}
    with pytest.raises(StoreError, match="set LLMREC_STORE_URL"):
        Recommender.load(folder)
    monkeypatch.setenv("LLMREC_STORE_URL", url)
    other = Recommender.load(folder)
    assert other.history("u1") == rec.history("u1") != []
    assert other.observe("new", "i4") and ids(rec.recommend(user="new"))[0] == "i5"
    rec.add_items([Item("zz", "Zeppelin")])
    assert other.follow() == 1 and ids(other.search("zeppelin", k=1)) == ["zz"]
    other.refit()
    other.save(folder)
    assert rec.forget("new") == 1 and other.history("new") == []
    rec.close()
    # A copy has a log of its own, and a model that is replaced takes its log along.
    other.save(tmp_path / "copy")
    assert len(tables(postgres) - before) == 4
    other.observe("new", "i4")
    assert Recommender.load(folder).history("new") == [] and Recommender.load(folder).history("u1")
    other.close()
    fresh = Recommender.fit(*toy_data(), config)
    fresh.save(folder)
    fresh.close()
    assert f"{name}_events" not in tables(postgres) and len(tables(postgres) - before) == 4


def test_a_url_that_leads_nowhere_is_found_before_anything_is_fitted():
    stages = []
    config = {**LIGHT, "store": {"url": "postgresql://u:secret@127.0.0.1:1/db"}}
    with pytest.raises(StoreError, match="cannot be used") as wrong:
        Recommender.fit(*toy_data(), config, on_stage=stages.append)
    assert stages == [] and "secret" not in str(wrong.value)


def test_events_move_from_the_file_into_the_database_once(database, folder, opened):
    file = opened()
    file.observe("live", "i3", timestamp=1, event_id="a")
    file.add_items([Item("zz", "Zeppelin")])
    moved = opened(store=database)
    assert not list(folder.glob("*.sqlite")) and manifest(folder)["changes"] == 0
    assert moved.history("live") == [Event("live", "i3", 1, 1.0, "a")] and "zz" in moved.catalog
    assert not moved.observe("live", "i3", event_id="a")
    again = opened(store=database)
    assert again.history("live") == moved.history("live") and again.folder == moved.folder
    for write in (
        lambda: file.observe("live", "i4"),
        lambda: file.forget("live"),
        lambda: file.add_items([Item("late", "Late")]),
    ):
        with pytest.raises(StoreError, match=r"replaced or removed.*load it again"):
            write()


def test_a_database_that_goes_away_is_an_error_of_the_library_and_comes_back(
    postgres, database, folder, opened
):
    rec = opened(store=database)
    postgres.stop()
    try:
        with pytest.raises(StoreError, match="cannot be used"):
            rec.observe("u1", "i3")
        with pytest.raises(StoreError, match="cannot be used"):
            rec.recommend(user="u1")
        assert rec.recommend(history=["i1"])
    finally:
        postgres.ensure_postgres_running()
    assert rec.observe("u1", "i3")


# ---- items ----------------------------------------------------------------------------------------------

WRITER = """
import sys
from llmrec import Item, Recommender
rec = Recommender.load(sys.argv[1])
for n in range(10**6):
    rec.add_items([Item(f"{sys.argv[2]}{n}", f"Zeppelin {n}", attributes={"year": 1900 + n})])
    print(n, flush=True)
"""


def test_items_that_were_put_survive_kills_of_two_processes_that_put_them(folder, opened):
    opened().close()
    command = [sys.executable, "-c", WRITER, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    writers = {name: subprocess.Popen([*command, name], **pipes) for name in "ab"}
    put = {}
    for writer in writers.values():
        for line in writer.stdout:
            if int(line) >= 15:
                break
    for name, writer in writers.items():
        writer.kill()
        put[name] = 1 + int((["15", *writer.stdout.read().split()])[-1])
        writer.wait()
    rec = opened()
    for name, count in put.items():
        kept = [i for i in rec.catalog.ids if i.startswith(name)]
        assert kept[:count] == [f"{name}{n}" for n in range(count)] and len(kept) <= count + 1
    assert rec.catalog.item(rec.catalog.code("a7")) == Item("a7", "Zeppelin 7", "", {"year": 1907})
    assert "a7" in ids(rec.recommend(history=["i1"], k=len(rec.catalog))) and ids(
        rec.search("zeppelin 7", k=1)
    )
    rec.save(folder)
    assert opened().catalog.ids == rec.catalog.ids


def test_two_processes_follow_each_other_and_end_with_the_same_catalogue(opened):
    one, two = opened(), opened()
    one.add_items([Item("x", "Zeppelin X")])
    two.add_items([Item("y", "Zeppelin Y"), Item("i3", "Zeppelin Three", attributes={"brand": "Dune"})])
    one.remove_items(["y"])
    two.add_items([Item("x", "Harbour X")])
    with pytest.raises(DataError, match="year"):
        one.add_items([Item("bad", "Bad", attributes={"year": "soon"})])
    with pytest.raises(RequestError, match="unknown"):
        one.remove_items(["nowhere"])
    assert one.follow() == 1 and two.follow() == one.follow() == 0
    three = opened()
    for rec in (one, two, three):
        # What was put and removed again has its code for whoever loads later, too.
        assert rec.catalog.ids == [*sorted(f"i{n}" for n in range(40)), "x", "y"]
        assert rec.catalog.item(rec.catalog.code("i3")).attributes == {"brand": "Dune"}
        assert ids(rec.search("harbour", k=1)) == ["x"]
        assert "y" not in ids(rec.search("zeppelin", k=50))
    assert one.catalog.fingerprint == two.catalog.fingerprint


def test_what_one_process_put_is_known_to_all_at_the_first_request_that_names_it(opened):
    one, two = opened(), opened()
    one.add_items([Item("x", "Zeppelin X"), Item("y", "Zeppelin Y"), Item("z", "Zeppelin Z")])
    assert two.observe("u1", "x")
    one.add_items([Item("a", "Airship A"), Item("b", "Airship B")])
    service = Service(two, ServeConfig(follow_seconds=3600))
    try:
        assert service.item("a").title == "Airship A"
        one.add_items([Item("c", "Airship C"), Item("d", "Airship D")])
        assert service.put_item("c", ItemIn(title="Airship C, larger"))[1] is False
        one.add_items([Item("e", "Airship E")])
        service.remove_item("e")
        with pytest.raises(NotFoundError, match="nowhere"):
            service.item("nowhere")
    finally:
        service.close()
    with pytest.raises(RequestError, match="unknown item 'nowhere'"):
        two.observe("u1", "nowhere")


def test_an_event_waits_for_an_item_that_another_thread_is_taking_over(opened, monkeypatch):
    one, two = opened(), opened()
    one.add_items([Item("x", "Zeppelin X")])
    taking, grow = threading.Event(), State.with_catalog

    def slowly(self, catalog, **how):
        taking.set()
        time.sleep(0.3)
        return grow(self, catalog, **how)

    monkeypatch.setattr(State, "with_catalog", slowly)
    follower = threading.Thread(target=two.follow)
    follower.start()
    assert taking.wait(30) and two.observe("u1", "x")
    follower.join()


def test_a_refit_takes_in_the_events_of_items_that_another_process_put(opened):
    one, two = opened(), opened()
    one.add_items([Item("x", "Zeppelin X")])
    one.observe_many([Event(f"u{n}", "x") for n in range(30)])
    two.refit()
    assert ids(two.recommend(k=40)).index("x") < 5


def test_all_processes_give_an_item_the_same_code_however_often_it_is_put(opened):
    """Vectors on a server are kept by code: another order there would be another item's vector."""
    rng, processes = np.random.default_rng(3), [opened(), opened()]
    late = []
    for n in range(40):
        rec, name = processes[rng.integers(2)], f"n{rng.integers(9)}"
        if rng.random() < 0.3 and name in rec.catalog:
            rec.remove_items([name])
        else:
            rec.add_items([Item(name, f"Zeppelin {n}", attributes={"brand": f"b{n}"})])
        if n % 8 == 0:
            late.append(opened())
    everybody = [*processes, *late, opened()]
    for rec in everybody:
        rec.follow()
    codes = {tuple(rec.catalog.ids) for rec in everybody}
    assert len(codes) == 1 and len(everybody[0].catalog) > 45
    active = {tuple(rec.catalog.active.tolist()) for rec in everybody}
    assert len(active) == 1 and not all(next(iter(active)))


def test_an_item_that_is_put_while_others_read_is_never_half_there(opened):
    rec, failed = opened(), []

    def read():
        try:
            for _ in range(40):
                assert rec.search("zeppelin", k=50) is not None and rec.recommend(history=["i1", "i2"], k=50)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(20):
        rec.add_items([Item(f"z{n}", f"Zeppelin {n}"), Item("i5", f"Zeppelin five {n}")])
    for thread in threads:
        thread.join()
    assert failed == []
    found = ids(rec.search("zeppelin", k=50))
    assert {f"z{n}" for n in range(20)} | {"i5"} <= set(found)


# ---- saves ----------------------------------------------------------------------------------------------


def test_a_save_refuses_to_overwrite_what_another_process_fitted(folder, opened, tmp_path):
    one, two, three = opened(), opened(), opened()
    one.add_items([Item("of-one", "Zeppelin One")])
    one.save(folder)
    two.refit()
    two.save(folder)
    assert manifest(folder)["model"] == two._model != one._model
    state = manifest(folder)["state"]
    for late in (one, three):
        with pytest.raises(ConflictError, match="save into another directory, or load it again"):
            late.save(folder)
    assert manifest(folder)["state"] == state
    two.save(folder)
    three.save(tmp_path / "other")
    assert "of-one" in Recommender.load(tmp_path / "other").catalog
    assert "of-one" in opened().catalog


def test_a_fit_into_the_directory_of_a_running_process_stops_it_from_losing_events(folder, opened):
    running = opened()
    running.observe("live", "i3")
    fresh = Recommender.fit(*toy_data(), LIGHT)
    fresh.save(folder)
    fresh.close()
    with pytest.raises(StoreError, match="replaced or removed"):
        running.observe("live", "i4")
    with pytest.raises(ConflictError):
        running.save(folder)
    assert running.recommend(user="live")


def test_tables_of_events_may_overlap_with_each_other_and_with_what_was_fitted(opened):
    rec = opened()
    before = rec.history("u1")
    rows = [{"user_id": "u1", "item_id": e.item_id, "timestamp": e.timestamp} for e in before]
    fresh = [{"user_id": "u1", "item_id": "i5", "timestamp": 2_000_000_000 + n // 2} for n in range(4)]
    report, new = rec.observe_table(rows + fresh)
    assert (report.rows_in, new) == (len(rows) + 4, 4)
    assert rec.observe_table(pl.DataFrame(fresh))[1] == 0
    assert len(rec.history("u1")) == len(before) + 4
    noon = datetime(2040, 1, 1, 12, tzinfo=UTC)
    rec.observe_many([Event("u1", "i5", noon), Event("u1", "i6", noon.timestamp() + 0.5)])
    assert [e.timestamp for e in rec.history("u1")[-2:]] == [int(noon.timestamp())] * 2


def test_a_live_event_counts_as_its_type_does_in_the_log():
    items = [{"item_id": f"i{n}", "title": f"Item {n}"} for n in range(6)]
    rows = [
        {"user_id": f"u{n % 7}", "item_id": f"i{n % 6}", "timestamp": n, "event": kind}
        for n, kind in enumerate(("buy", "view", "skip") * 14)
    ]
    data = {"event_weights": {"buy": 2, "view": 0.5, "skip": 0}}
    rec = Recommender.fit(items, rows, config={"encoder": {"name": "light"}, "data": data})
    live = [("buy", 100, 1.0), ("view", 101, 3.0), ("skip", 102, 1.0), (None, 103, 1.5)]
    told = [rec.observe("me", "i1", at, weight, event=kind) for kind, at, weight in live]
    assert told == [True, True, False, True]
    assert [(e.timestamp, e.weight) for e in rec.history("me")] == [(100, 2.0), (101, 1.5), (103, 1.5)]
    report, new = rec.observe_table([Event("you", "i2", 5, event="buy"), Event("you", "i2", 6, event="skip")])
    assert (report.rows_kept, new) == (1, 1) and [e.weight for e in rec.history("you")] == [2.0]
    with pytest.raises(RequestError, match=r"'wish' has no weight; .* lists 'buy', 'view'"):
        rec.observe("me", "i1", event="wish")


def test_a_retry_of_an_observed_event_counts_once(opened):
    rec = opened()
    assert [rec.observe("new", "i4", event_id="a") for _ in range(3)] == [True, False, False]
    assert rec.observe_many([Event("new", "i5", event_id="b"), Event("new", "i4", event_id="a")]) == 1
    with pytest.raises(DataError, match="is taken by an event with item 'i4'"):
        rec.observe("new", "i9", event_id="a")
    for bad in ("", "  ", "x" * 501, 7):
        with pytest.raises(RequestError, match="event_id must be text"):
            rec.observe("new", "i4", event_id=bad)
    assert [e.item_id for e in rec.history("new")] == ["i4", "i5"]
