"""The evaluation as a whole: chance, order of input, repetition, interruption, typed queries, memory."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from llmrec import offline, stages
from llmrec.candidates import Weights
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import ConfigError, DataError, LeakError
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.memory import remembered
from llmrec.evaluation.pools import drawn_pools
from llmrec.evaluation.run import compared, run_systems
from llmrec.evaluation.split import Part
from llmrec.evaluation.typed import attribute_queries, evaluate_search
from llmrec.events import EventLog
from llmrec.families import TrainingLog
from llmrec.metrics import compare_all
from llmrec.offline import evaluate
from llmrec.pipeline import Pipeline
from llmrec.protocols import Hits
from llmrec.recommender import Recommender
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.rules import compile_where
from llmrec.search import known_item_queries, search_recipe
from llmrec.testing import tiny_lm, toy_data
from llmrec.types import Item

LIGHT = {"encoder": {"name": "light", "dim": 16}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tiny_lm(tmp_path_factory.mktemp("lm"))
    return {
        **LIGHT,
        "lm": {"base": str(base), "layers": 2, "rank": 4, "head_dim": 16, "precision": "float32"},
        "training": {"minutes": None, "steps": 12, "tokens_per_step": 300, "checkpoint_seconds": 1e-9},
    }


class Blind:
    """Finds nothing, or gives everything one score."""

    name = "blind"

    def retrieve(self, queries, k):
        return [Hits(np.empty(0, np.int32), np.empty(0, np.float32)) for _ in queries]

    def score(self, queries, candidates):
        return [np.zeros(len(c), np.float32) for c in candidates]


def random_part(users=2000, items=200):
    rng = np.random.default_rng(1)
    histories = [np.empty(0, np.int32)] * users
    targets = rng.integers(0, items, users).astype(np.int32)
    return Part(np.arange(users), histories, targets, np.arange(users))


def test_a_constant_scorer_ranks_like_chance_in_the_catalogue_and_in_drawn_pools():
    part, active = random_part(), np.ones(200, dtype=bool)
    constant = PopularityRetriever(np.zeros(200, np.float32))
    pipeline = Pipeline({"popularity": constant}, *[Weights({"popularity": 1.0})] * 3)
    full = run_systems(part, pipeline, active, True, with_lm=False)
    assert abs((full.ranks["merge"] == 1).mean() - 1 / 200) < 3 * math.sqrt(1 / 200 / 2000)
    pools = drawn_pools(part, 9, active, True, seed=0)
    blind = Pipeline({"popularity": constant, "blind": Blind()}, *[Weights({"popularity": 1.0})] * 3, Blind())
    drawn = run_systems(part, blind, active, True, with_lm=False, pools=pools)
    for name in ("blind", "popularity", "merge"):
        ranks = drawn.ranks[name]
        assert sorted(set(ranks.tolist())) == list(range(1, 11)), "every target is in its pool"
        assert abs((ranks <= 3).mean() - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 2000), name


def test_a_permuted_log_gives_the_same_numbers_under_the_item_tie_rule():
    items, events = toy_data(users=60, items=40)
    rows = [{"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp // 10_000} for e in events]
    frame = pl.DataFrame(rows)
    assert frame.select("user_id", "timestamp").n_unique() < frame.height, "there must be ties"
    settings = {**LIGHT, "data": {"ties": "item"}}
    found = [
        evaluate(source, log, settings, lm=False).result
        for source, log in (
            (items, frame),
            (items[::-1], frame.sample(fraction=1, shuffle=True, seed=3)),
        )
    ]
    for name in ("systems", "beyond", "segments", "comparisons", "search"):
        assert found[0][name] == found[1][name], name


def test_two_runs_with_one_seed_are_equal_and_a_killed_one_goes_on_to_the_same(config, tmp_path):
    data = toy_data()
    once = evaluate(*data, config).result

    class Killed(Exception):
        pass

    def die(progress, done):
        if progress.step == 7:
            raise Killed

    with pytest.raises(Killed):
        evaluate(*data, config, folder=tmp_path, on_step=die)
    steps = []
    again = evaluate(*data, config, folder=tmp_path, on_step=lambda p, done: steps.append(p.step)).result
    assert steps[0] == 7 and again["cached"] == {"retrievers": True, "lm": True}
    third = evaluate(*data, config, folder=tmp_path, on_step=lambda p, done: steps.append(-1)).result
    assert -1 not in steps, "a finished training is read back"
    for name in ("systems", "probabilities", "beyond", "segments", "comparisons", "search", "recipe"):
        assert once[name] == again[name] == third[name], name
    # Whatever decides a stage makes it anew: other validation users, other texts, other items.
    for users, anew in (
        ({"search_users": 20}, {"retrievers": False, "lm": True}),
        ({"lm_users": 20}, {"retrievers": False, "lm": False}),
    ):
        other = {**config, "retrieval": users}
        assert evaluate(*data, other, folder=tmp_path).result["cached"] == anew, users
    renamed = [replace(item, title=f"{item.title} again") for item in data[0]]
    assert evaluate(renamed, data[1], config, folder=tmp_path, lm=False).result["cached"] == {
        "retrievers": False
    }
    more = [*data[0], Item("zz", "New")]
    assert evaluate(more, data[1], config, folder=tmp_path, lm=False).result["cached"] == {
        "retrievers": False
    }
    for kept in tmp_path.glob("retrievers-*/recipe.json"):
        kept.write_text("{")
    again = evaluate(*data, config, folder=tmp_path, lm=False).result
    assert again["cached"] == {"retrievers": False} and again["systems"]["merge"] == once["systems"]["merge"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be kept"):
        evaluate(*data, config, folder=tmp_path / "file")


@pytest.mark.parametrize("split", ["leave-last", "time", "cold-item", "cold-user"])
def test_every_protocol_runs_to_a_report_without_leaks(config, split):
    share = {} if split == "leave-last" else {"share": 0.2}
    result = evaluate(*toy_data(), {**config, "protocol": {"split": split} | share}).result
    assert result["protocol"]["split"] == split
    assert set(result["leaks"]["checked"]) >= {"split", "ease", "recipe and blend", "adapter"}
    assert result["leaks"]["unchecked"] == []
    if split == "cold-item":
        assert set(result["segments"]) >= {"target new"} and "target head" not in result["segments"]
        recall = {name: values["recall@20"] for name, values in result["systems"].items()}
        # Counts know nothing of an item without events; texts do.
        assert recall["transitions"] == 0 and recall["ease"] > 0
    assert result["probabilities"]["lm"]["nats"] > 0


def test_what_is_served_is_held_against_the_best_retriever_too_and_what_was_not_checked_is_named(tmp_path):
    rng = np.random.default_rng(0)
    ranks = {name: rng.integers(0, 20, 300) for name in ("popularity", "ease", "merge", "lm", "default")}
    found = compared(ranks, "ease")
    pairs = [("default", "merge"), ("lm", "merge"), ("merge", "ease"), ("default", "ease")]
    assert [(c.a, c.b) for c in found] == [pair for pair in pairs for _ in range(2)]
    again = compare_all(ranks, pairs)
    assert [c.as_dict() for c in found] == [c.as_dict() for c in again]
    # Where the model is left out, the merge against it says all.
    left_out = compared({**ranks, "default": ranks["merge"]}, "ease")
    assert ("default", "ease") not in {(c.a, c.b) for c in left_out}
    pytest.importorskip("implicit")
    families = {"retrieval": {"families": ["als", "transitions"]}}
    page = evaluate(*toy_data(), {**LIGHT, **families}, lm=False).report(tmp_path, "...")
    text = page.read_text(encoding="utf-8")
    assert "Not checked: als." in text and "no fitted parameter" not in text


def test_what_is_not_full_ranking_is_marked_in_results_and_tables(tmp_path):
    result = evaluate(*toy_data(), {**LIGHT, "protocol": {"negatives": 20}}, lm=False).result
    assert "not comparable" in result["protocol"]["ranking"] and not result["protocol"]["comparable"]
    assert result["systems"]["popularity"]["recall@10"] < 1.0


def test_candidates_that_were_mined_for_test_are_refused_for_validation(tmp_path):
    items, events = toy_data()
    path = tmp_path / "c.parquet"
    users = sorted({e.user_id for e in events})
    lists = [[i.item_id for i in items[:15]]] * len(users)
    pl.DataFrame({"user_id": users, "candidates": lists}).write_parquet(path)
    settings = {**LIGHT, "protocol": {"candidates": path}}
    result = evaluate(items, events, settings, lm=False).result["protocol"]
    assert len(result["candidates_sha256"]) == 64 and 0 < result["target_in_candidates"] < 1
    assert result["seen_items"] == "as listed"
    with pytest.raises(LeakError, match="was made for test"):
        evaluate(items, events, settings, lm=False, part="validation")
    settings["protocol"]["candidate_part"] = "any"
    evaluate(items, events, settings, lm=False, part="validation")


def test_an_evaluation_that_fits_on_test_events_fails_loudly(monkeypatch):
    def leaky(log, held_out, *rest):
        longer = [np.append(h, t).astype(np.int32) for h, t in zip(log.histories, last, strict=True)]
        return search_recipe(TrainingLog(longer), held_out, *rest)

    log = EventLog.load(toy_data()[1], Catalog.load(toy_data()[0]))
    last = [log.history(u)[-1] for u in range(log.n_users)]

    monkeypatch.setattr(stages, "choose_recipe", leaky)
    with pytest.raises(LeakError, match="worthless"):
        evaluate(*toy_data(), LIGHT, lm=False)
    monkeypatch.undo()
    whole = offline.make_split

    def forgetful(log, protocol):
        split = whole(log, protocol)
        split.fitted[:] = True
        return split

    monkeypatch.setattr(offline, "make_split", forgetful)
    with pytest.raises(LeakError, match="among the training events"):
        evaluate(*toy_data(), LIGHT, lm=False)


def test_what_was_expected_and_what_it_took_are_both_in_the_result():
    said = []
    result = evaluate(*toy_data(), LIGHT, lm=False, on_stage=said.append).result
    assert any(words.startswith("expected: about") for words in said)
    assert set(result["seconds_expected"]) <= set(result["seconds"])


def test_an_attribute_query_has_the_items_that_hold_the_value():
    catalog = Catalog.load(toy_data()[0])
    queries = attribute_queries(catalog, 50, seed=0)
    assert queries
    for text, relevant in queries:
        having = np.zeros(len(catalog), dtype=bool)
        for name in ("genres", "brand"):
            having |= compile_where({name: text}, catalog)
        assert np.flatnonzero(having).tolist() == relevant.tolist()
        assert len(relevant) >= 5
    assert attribute_queries(Catalog.load([i for i in toy_data()[0]][:1]), 5, 0) == []


def test_known_items_are_sought_by_anybody_as_search_finds_them():
    items, events = toy_data(users=40)
    rec = Recommender.fit(items, events, LIGHT)
    log = EventLog.load(events, rec.catalog)
    part = Part.of(log, log.offsets[1:] - 1)
    found = evaluate_search(part, rec._state.pipeline(), rec.catalog, users=25, queries=5, seed=3)
    users = part.sample(25, 3)
    typed = known_item_queries(users.held_out(rec.catalog.active, False), rec.catalog.lines(), 4)
    gains = []
    for query, target in zip(typed.queries, users.targets, strict=True):
        ids = [hit.item_id for hit in rec.search(query.text, k=10)]
        wanted = rec.catalog.ids[target]
        gains.append(1 / math.log2(ids.index(wanted) + 2) if wanted in ids else 0.0)
    anybody = found["anybody"]
    assert anybody["queries"] == len(gains) and anybody["comparisons"] == []
    assert anybody["systems"]["default"]["ndcg@10"] == pytest.approx(np.mean(gains)) and np.mean(gains) > 0


def test_a_stage_that_fails_is_not_kept(tmp_path):
    cache = StageCache(tmp_path)

    def write(made, place):
        (place / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cache.get("stage", [1], lambda: 5, write, lambda place: 6)
    assert list(tmp_path.iterdir()) == []
    kept = cache.get("stage", [1], lambda: 5, lambda made, place: None, lambda place: 6)
    assert (kept, cache.get("stage", [1], lambda: 7, lambda made, place: None, lambda place: 6)) == (5, 6)
    assert cache.get("stage", [2], lambda: 7, lambda made, place: None, lambda place: 6) == 7


def test_a_model_that_has_read_the_rows_is_found_out_and_one_that_has_not_is_not(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rng = np.random.default_rng(0)
    # As files are sorted: the item id rises, so a near id is likely for who has not read them, too.
    rows = [
        [f"{u}", f"{item}", "4.0", f"{rng.integers(10**8, 10**9)}"]
        for u in range(1, 17)
        for item in np.sort(rng.choice(900, 11, replace=False) + 100)
    ]
    base = tiny_lm(tmp_path / "lm", layers=2, hidden=64)
    header = "userId,movieId,rating,timestamp"
    fresh = remembered(header, rows, base, users=16)
    assert not fresh.gain.low > 0 and "no sign" in str(fresh)

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    slices = [rows[11 * u + start : 11 * u + start + 9] for u in range(16) for start in range(3)]
    texts = ["\n".join([header, *(",".join(row) for row in slice_)]) + "\n" for slice_ in slices]
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(220):
        optimiser.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(base)
    known = remembered(header, rows, base, users=16)
    assert known.gain.low > 0 and known.preferred > 0.7 and "seems to know" in str(known)
    with pytest.raises(DataError, match="two users"):
        remembered(header, rows[:11], base)


def test_the_protocol_of_a_file_is_the_one_that_runs(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[protocol]\nsplit = "cold-user"\nshare = 0.2\n[encoder]\nname = "light"\n'
    )
    result = evaluate(*toy_data(), Config.of(tmp_path / "c.toml"), lm=False).result
    assert result["protocol"]["users"] == 12 and result["config"]["protocol"]["split"] == "cold-user"


def test_thresholds_and_weights_that_mean_nothing_are_refused():
    for data in ({"rating_threshold": float("nan")}, {"event_weights": {"view": -1.0}}):
        with pytest.raises(ConfigError):
            Config.of({"data": data})
