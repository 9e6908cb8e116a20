"""The evaluation as a whole: chance, order of input, repetition, interruption, typed queries, memory."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from llmrec import offline, stages
from llmrec.catalog import Catalog
from llmrec.config import Config
from llmrec.errors import LeakError
from llmrec.evaluation.cache import StageCache
from llmrec.evaluation.memory import remembered
from llmrec.evaluation.pools import drawn_pools
from llmrec.evaluation.run import run_systems
from llmrec.evaluation.split import Part
from llmrec.evaluation.typed import attribute_queries
from llmrec.events import EventLog
from llmrec.families import TrainingLog
from llmrec.offline import evaluate
from llmrec.pipeline import Pipeline, Weights
from llmrec.protocols import Hits
from llmrec.retrieve.popularity import PopularityRetriever
from llmrec.rules import compile_where
from llmrec.search import search_recipe
from llmrec.testing import tiny_lm, toy_data

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
    assert steps[0] == 7 and again["cached"] == {"retrievers": True}
    third = evaluate(*data, config, folder=tmp_path, on_step=lambda p, done: steps.append(-1)).result
    assert -1 not in steps, "a finished training is read back"
    for name in ("systems", "probabilities", "beyond", "segments", "comparisons", "search", "recipe"):
        assert once[name] == again[name] == third[name], name
    other = {**config, "retrieval": {"search_users": 20}}
    assert evaluate(*data, other, folder=tmp_path, lm=False).result["cached"] == {"retrievers": False}


@pytest.mark.parametrize("split", ["leave-last", "time", "cold-item", "cold-user"])
def test_every_protocol_runs_to_a_report_without_leaks(config, split):
    result = evaluate(*toy_data(), {**config, "protocol": {"split": split, "share": 0.2}}).result
    assert result["protocol"]["split"] == split
    assert set(result["leaks"]["checked"]) >= {"split", "ease", "recipe", "adapter"}
    if split == "cold-item":
        assert set(result["segments"]) >= {"target new"} and "target head" not in result["segments"]
        assert result["systems"]["ease"]["recall@20"] == 0, "no linear model knows an item without events"
    assert result["probabilities"]["lm"]["nats"] > 0


def test_sampled_negatives_are_marked_wherever_a_number_is_shown(config):
    result = evaluate(*toy_data(), {**LIGHT, "protocol": {"negatives": 9}}, lm=False).result
    assert "not comparable" in result["protocol"]["ranking"] and not result["protocol"]["comparable"]
    assert result["systems"]["merge"]["recall@10"] == 1.0, "the target is one of ten"


def test_an_evaluation_that_fits_on_test_events_fails_loudly(monkeypatch):
    def leaky(log, held_out, *rest):
        longer = [np.append(h, 0).astype(np.int32) for h in log.histories]
        return search_recipe(TrainingLog(longer), held_out, *rest)

    monkeypatch.setattr(stages, "search_recipe", leaky)
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

    items, _ = toy_data(users=40, items=60)
    rng = np.random.default_rng(0)
    # No rule: what comes next can only be known by heart.
    rows = [
        (f"u{u}", items[int(i)].item_id, n) for u in range(30) for n, i in enumerate(rng.permutation(60)[:12])
    ]
    catalog = Catalog.load(items)
    log = EventLog.load(pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), catalog)
    base = tiny_lm(tmp_path / "lm", layers=2, hidden=64)
    fresh = remembered(log, catalog, base, users=30)
    assert not fresh.gain.low > 0 and "no sign" in str(fresh)

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [
        "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows if u == f"u{n}")
        for n in range(30)
    ]
    tokens = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=0)
    labels = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(base)
    known = remembered(log, catalog, base, users=30)
    assert known.gain.low > 0 and known.preferred > 0.7 and "by heart" in str(known)


def test_the_protocol_of_a_file_is_the_one_that_runs(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[protocol]\nsplit = "cold-user"\nshare = 0.2\n[encoder]\nname = "light"\n'
    )
    result = evaluate(*toy_data(), Config.of(tmp_path / "c.toml"), lm=False).result
    assert result["protocol"]["users"] == 12 and result["config"]["protocol"]["split"] == "cold-user"
