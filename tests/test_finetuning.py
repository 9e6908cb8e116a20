"""Fine-tuning as a product: steps in parts, early ends, logs, cards, and a model that is continued."""

import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
from programs import ROOT, program

from llmrec import Event, Item, Recommender, cli
from llmrec.card import hash_ids
from llmrec.errors import ConfigError, DataError, ModelError
from llmrec.evaluation.split import training_log
from llmrec.families import Texts, TrainingLog
from llmrec.fetch import licence_of
from llmrec.index.faiss_index import FaissIndex
from llmrec.language_model import LanguageModel, load_language_model
from llmrec.lm_training import train_language_model
from llmrec.metrics import summary
from llmrec.mining import cut, mined_choices
from llmrec.protocols import Query
from llmrec.recipe import HeldOut, ranks_in
from llmrec.run_log import RunLog, read_lines
from llmrec.score.config import ItemTokensConfig, TrainingConfig, WordsConfig
from llmrec.score.line_tasks import LikelihoodTask
from llmrec.score.tasks import Choice, ItemTokensTask, ListwiseTask
from llmrec.sequences import Replay, Source, shares
from llmrec.tensors import random_state, read_tensors, set_random_state
from llmrec.testing import tiny_lm, toy_data
from llmrec.training import LoRATrainer, trainable
from llmrec.word_model import WordLanguageModel

ITEMS = 12
VECTORS = np.eye(ITEMS, dtype=np.float32)
LINES = [f"thing number {code}" for code in range(ITEMS)]
HISTORIES = [
    np.array([(s + t) % ITEMS for t in range(3 + s % 5)], np.int32) for s in range(ITEMS) for _ in range(3)
]
WEIGHTS = [
    np.random.default_rng(row).uniform(0.1, 3, len(h)).astype(np.float32) for row, h in enumerate(HISTORIES)
]
HELD_OUT = HeldOut(
    [Query(np.array([s], np.int32)) for s in range(ITEMS)],
    np.array([(s + 1) % ITEMS for s in range(ITEMS)], np.int32),
)


class NamedEncoder:
    fingerprint = "e"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"))


def texts():
    return Texts(LINES, VECTORS, NamedEncoder(), FaissIndex(ITEMS))


def shape(base, **values):
    small = {"layers": 2, "rank": 4, "head_dim": 16, "precision": "float32"}
    plain = {"dropout": 0.0, "id_dropout": 0.0, "id_out_dropout": 0.0}
    return ItemTokensConfig(base=str(base), **{**small, **plain, **values})


def settings(**values):
    return TrainingConfig(**{"minutes": None, "steps": 8, "tokens_per_step": 60, "warmup_steps": 2, **values})


def train(base, folder, on_step=None, lm=None, **values):
    return train_language_model(
        TrainingLog(HISTORIES, WEIGHTS),
        HELD_OUT,
        texts(),
        base,
        lm or shape(base),
        settings(**values),
        data="d",
        folder=folder,
        on_step=on_step,
    )


def assert_same(one, other):
    theirs = dict(other.model.named_parameters())
    for name, parameter in trainable(one.model).items():
        assert torch.equal(parameter, theirs[name]), name


def assert_alike(one, other, tolerance):
    """The same answers: what changes none, such as a bias of all output vectors, follows rounding errors."""
    probabilities = [lm.scorer.log_probs(HISTORIES) for lm in (one, other)]
    np.testing.assert_allclose(*probabilities, atol=tolerance)


# ---- steps in parts ----------------------------------------------------------------------------------


def tasks(base):
    """A task of each kind, with weights that differ."""
    vectors = LanguageModel.new(shape(base), base, VECTORS, np.ones(ITEMS))
    yield ItemTokensTask(vectors.model, Source(HISTORIES, WEIGHTS), 5, settings())
    words = {"base": str(base), "rank": 4, "precision": "float32", "window": 3, "listed": 5}
    lm = WordLanguageModel.new(WordsConfig(mode="likelihood", **words), base, LINES, np.ones(ITEMS))
    yield LikelihoodTask(lm.scorer.model, Source(HISTORIES, WEIGHTS), settings())
    for mode in ("yes_no", "letters"):
        lm = WordLanguageModel.new(WordsConfig(mode=mode, **words), base, LINES, np.ones(ITEMS))
        rng = np.random.default_rng(0)
        choices = [
            Choice(Query(h[:-1]), rng.permutation(ITEMS)[:4].astype(np.int32), 1, float(w[-1]))
            for h, w in zip(HISTORIES, WEIGHTS, strict=True)
        ]
        yield ListwiseTask(lm.scorer, choices, settings(tokens_per_step=400))


def test_the_parts_of_a_batch_have_its_loss_and_its_gradient_in_every_mode(base):
    for task in tasks(base):
        batch = next(iter(task.epoch(np.random.default_rng(1), 3)))
        parts = task.split(batch, 3)
        assert len(parts) == 3 and sum(map(task.events, parts)) == task.events(batch)
        assert task.split(batch, 1) == [list(batch)]
        whole = task.loss(batch)
        whole.backward()
        expected = {n: p.grad.clone() for n, p in trainable(task.model).items() if p.grad is not None}
        task.model.zero_grad()
        total = 0.0
        for part in parts:
            loss = task.loss(part) * (task.weight(part) / task.weight(batch))
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(float(whole), abs=1e-5)
        for name, gradient in expected.items():
            found = dict(task.model.named_parameters())[name].grad
            torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)


def test_accumulated_steps_are_those_of_one_larger_batch(base, tmp_path):
    large, one = train(base, tmp_path / "one", tokens_per_step=60)
    small, three = train(base, tmp_path / "three", tokens_per_step=20, accumulate=3)
    assert one.events == three.events
    for a, b in zip(one.curve, three.curve, strict=True):
        assert a["train_nats"] == pytest.approx(b["train_nats"], abs=1e-5)
    assert_alike(large, small, 1e-4)


def test_pieces_are_dealt_out_evenly_and_none_is_lost():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        sizes = rng.integers(0, 50, n).tolist()
        for parts in (1, 3, 8):
            dealt = shares(sizes, parts)
            assert sorted(itertools.chain(*dealt)) == list(range(n))
            assert len(dealt) == min(parts, n) and all(dealt)
            loads = [sum(sizes[i] for i in part) for part in dealt]
            assert max(loads) - min(loads) <= max(sizes) + n


def test_gradient_checkpointing_changes_memory_and_nothing_else(base, tmp_path):
    calls = {}

    def run(wanted):
        lm = LanguageModel.new(shape(base, dropout=0.2, id_dropout=0.3), base, VECTORS, np.ones(ITEMS))
        layer = lm.model.body.get_base_model().layers[0]
        layer.self_attn.register_forward_hook(lambda *_: calls.update({wanted: calls.get(wanted, 0) + 1}))
        config = settings(steps=3, gradient_checkpointing=wanted)
        losses = []
        task = ItemTokensTask(lm.model, Source(HISTORIES, WEIGHTS), 5, config)
        LoRATrainer(task, config, tmp_path / str(wanted), "f").run(
            None, lambda p, done: losses.append(p.loss)
        )
        assert not lm.model.body.is_gradient_checkpointing
        return lm, losses

    (kept, one), (again, other) = run(False), run(True)
    assert calls == {False: 3, True: 6}
    assert one == pytest.approx(other, abs=1e-6)
    assert_alike(kept, again, 1e-5)


def test_a_model_without_gradient_checkpointing_says_so(base, tmp_path):
    lm = LanguageModel.new(shape(base), base, VECTORS, np.ones(ITEMS))
    lm.model.body.get_base_model().supports_gradient_checkpointing = False
    config = settings(gradient_checkpointing=True)
    with pytest.raises(ModelError, match="no gradient checkpointing"):
        LoRATrainer(ItemTokensTask(lm.model, Source(HISTORIES, None), 5, config), config, tmp_path, "f").run()


def test_runs_of_either_precision_follow_each_other_in_one_process(base, tmp_path):
    for name, precision in (("a", "float32"), ("b", "bfloat16"), ("c", "float32")):
        lm, report = train(base, tmp_path / name, lm=shape(base, precision=precision), steps=2)
        assert report.steps == 2 and lm.dtype == getattr(torch, precision)


# ---- resuming, ending, logging -----------------------------------------------------------------------


class Killed(Exception):
    pass


def lines(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "log.jsonl")]


def test_a_killed_run_of_accumulated_steps_has_the_curve_and_the_log_of_a_whole_one(base, tmp_path):
    values = {"steps": 12, "accumulate": 2, "tokens_per_step": 30, "log_steps": 2, "checkpoint_seconds": 1e-9}
    dropped = shape(base, dropout=0.3, id_dropout=0.3)
    whole, report = train(base, tmp_path / "whole", lm=dropped, **values)

    def die(progress, done):
        if progress.step == 8:
            raise Killed

    with pytest.raises(Killed):
        train(base, tmp_path / "run", die, lm=dropped, **values)
    written = lines(tmp_path / "run")
    assert written[-1]["step"] == 8  # later than the checkpoint: it must not stay
    with (tmp_path / "run" / "log.jsonl").open("a") as opened:
        opened.write('{"run": "cut sho')
    steps = []
    resumed, again = train(base, tmp_path / "run", lambda p, done: steps.append(p.step), lm=dropped, **values)
    assert steps[0] == 8
    assert_same(whole, resumed)
    for a, b in zip(report.curve, again.curve, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "step"] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    assert len([x for x in lines(tmp_path / "run") if x["kind"] == "validation"]) == len(report.curve)
    # A finished run that is given again adds nothing.
    train(base, tmp_path / "run", lm=dropped, **values)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_the_random_state_of_one_process_is_found_again_among_those_of_several():
    cpu, before = torch.device("cpu"), torch.get_rng_state()
    states, drawn = [], []
    for seed in (3, 4, 5):
        torch.manual_seed(seed)
        torch.rand(7)
        states.append(random_state(cpu))
        drawn.append(torch.rand(4))
    for row in (2, 0, 1):
        set_random_state(torch.stack(states)[row], cpu)
        assert torch.equal(torch.rand(4), drawn[row])
    torch.set_rng_state(before)


@pytest.mark.parametrize("patience", [None, 2, 3])
def test_a_run_ends_after_so_many_validations_without_a_better_one(base, tmp_path, patience):
    lm = LanguageModel.new(shape(base), base, VECTORS, np.ones(ITEMS))
    config = settings(steps=16, validations=8, patience=patience)
    values = iter([0.1, 0.3, 0.2, 0.2, 0.3, 0.1, 0.1, 0.1])
    task = ItemTokensTask(lm.model, Source(HISTORIES, None), 5, config)
    report = LoRATrainer(task, config, tmp_path, "f").run(lambda: {"ndcg@10": next(values)})
    assert report.best == 0.3 and report.best_step == 4
    seen = 8 if patience is None else 2 + patience
    assert len(report.curve) == seen and report.steps == 2 * seen
    assert report.early == (patience is not None)
    assert ("no better" in str(report)) == report.early


def test_a_log_is_of_one_run_and_holds_no_numbers_that_json_has_not(tmp_path):
    log = RunLog(tmp_path, "a")
    log.add("step", 1, {"loss": float("nan"), "rate": 0.5})
    log.add("step", 2, {"loss": 1.0})
    # On disk at once.
    assert [line["loss"] for line in read_lines(log.path)] == [None, 1.0]
    log.close()
    RunLog(tmp_path, "a", 1, 1).close()
    assert [line["step"] for line in read_lines(log.path)] == [1]
    RunLog(tmp_path, "b", 1, 1).close()
    assert read_lines(log.path) == []


def test_tensorboard_has_the_numbers_of_the_log_or_says_what_to_install(base, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(base, tmp_path, steps=4, tensorboard=True, log_steps=1)
    log = read_lines(tmp_path / "log.jsonl")
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / log[0]["run"])).Reload()
    for kind, name in (("step", "loss"), ("validation", "ndcg@10")):
        found = [(e.step, e.value) for e in board.Scalars(f"{kind}/{name}")]
        expected = [(x["step"], pytest.approx(x[name], rel=1e-6)) for x in log if x["kind"] == kind]
        assert found == expected and found

    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "llmrec\[tensorboard\]"'):
        train(base, tmp_path / "other", steps=1, tensorboard=True)
    assert not (tmp_path / "other").exists()


def test_the_rate_is_up_after_a_tenth_of_a_short_run(base, tmp_path):
    task = next(tasks(base))
    for name, warmup, expected in (
        ("short", 1000, [1 / 1000, 0.475, 0.9, 0.85]),
        ("long", 2, [0.5, 0.95, 0.9, 0.85]),
    ):
        config = settings(steps=20, warmup_steps=warmup, log_steps=1)
        trainer, rates = LoRATrainer(task, config, tmp_path / name, "f"), []
        trainer.run(
            on_step=lambda p, done, of=trainer, to=rates: to.append(of.optimiser.param_groups[0]["lr"])
        )
        np.testing.assert_allclose(np.array(rates[:4]) / config.learning_rate, expected, err_msg=name)


def test_validations_that_take_long_are_fewer_in_a_run_by_minutes(base, tmp_path):
    def slow():
        time.sleep(0.4)
        return {"ndcg@10": 0.0}

    def curve(name, validate, **values):
        config = settings(**{"minutes": 0.05, "steps": None, **values})
        return LoRATrainer(next(tasks(base)), config, tmp_path / name, "f").run(validate).curve

    # A quarter of three seconds holds one of .4 s; the first is before it is known how long it takes.
    assert len(curve("slow", slow)) == 2
    assert len(curve("fast", lambda: {"ndcg@10": 0.0})) >= 8
    # A run of steps has to repeat itself.
    assert len(curve("steps", slow, minutes=None, steps=8, validations=4)) == 4


# ---- weights and replay ------------------------------------------------------------------------------


def test_choices_count_as_much_as_their_events(base):
    *_, yes_no, _ = tasks(base)
    batch = yes_no.epoch(np.random.default_rng(2), 100)[0]
    alone = [float(yes_no.loss([choice])) for choice in batch]
    weights = [choice.weight for choice in batch]
    assert len(set(weights)) > 5
    assert float(yes_no.loss(batch)) == pytest.approx(np.average(alone, weights=weights), abs=1e-4)


def test_mined_choices_carry_the_weights_of_the_log():
    items, events = toy_data(users=30, items=20, seed=3)
    weighted = [Event(e.user_id, e.item_id, e.timestamp, 1.0 + n % 4) for n, e in enumerate(events)]
    rec = Recommender.fit(items, weighted, {"encoder": {"name": "light"}, "retrieval": {"search": False}})
    state, log = rec._state, rec._log()
    train_log = training_log(log)
    # A list of all items, so that none of them is missing from it.
    choices = mined_choices(state, train_log, listed=20, limit=10_000, seed=0)
    expected = sorted(w for h in train_log.weights for w in h[cut(len(h)) :].tolist())
    assert sorted(choice.weight for choice in choices) == expected and len(set(expected)) == 4
    # From given places on, with retrievers that know nothing later.
    ends = [len(h) - 1 for h in train_log.histories]
    last = mined_choices(state, train_log, 20, 10_000, 0, ends)
    assert len(last) == len(ends)
    assert sorted(len(c.query.history) for c in last) == sorted(ends)


def test_old_events_are_context_and_some_are_drawn_anew_in_each_epoch():
    fresh, old = [np.arange(6, dtype=np.int32)], [np.full(2, 7 + n, np.int32) for n in range(5)]
    weights = [np.array([0, 0, 0, 0, 1, 2], np.float32)]
    source = Source(fresh, weights, Replay(old, None, 4))
    drawn = set()
    for seed in range(20):
        pieces = source(np.random.default_rng(seed), 4)
        counted = [w for piece in pieces if piece.items[0] < 7 for w in piece.weights.tolist() if w]
        assert sorted(counted) == [1, 2] and all(piece.weights.any() for piece in pieces)
        again = [int(piece.items[0]) for piece in pieces if piece.items[0] >= 7]
        assert len(again) == len(set(again)) == 2
        drawn |= set(again)
    assert drawn == {7, 8, 9, 10, 11}
    with pytest.raises(DataError, match="no events to train on"):
        Source(fresh, [np.zeros(6, np.float32)])


# ---- the card ----------------------------------------------------------------------------------------


def test_the_licence_of_a_base_is_what_its_files_say(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("_", ".", 1)).write_text(text)
        return tmp_path / name

    page = "---\nlicense: mit\n---\n"
    named = "---\nlicense: other\nlicense_name: model-community\n---\n"
    for expected, files in {
        "unknown": {},
        "Apache-2.0": {"llmrec_json": '{"licence": "Apache-2.0"}', "README_md": page},
        "mit": {"llmrec_json": "{", "README_md": "---\ntags: [a]\nlicense: 'mit'\n---\nlicense: other\n"},
        "model-community": {"README_md": named},
        "BSD 3-Clause": {"README_md": "license: mit\n", "LICENSE_txt": "\n  BSD 3-Clause\n\nmore"},
    }.items():
        assert licence_of(folder(expected, **files)) == expected


def test_the_page_beside_an_adapter_says_what_its_card_holds(base, tmp_path):
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    lm, report = train(base, tmp_path / "run", steps=4)
    lm.save(tmp_path / "adapter")
    page = (tmp_path / "adapter" / "README.md").read_text()
    card = json.loads((tmp_path / "adapter" / "card.json").read_text())["card"]
    assert card["training"]["licence"] == "mit" and 'license: "mit"' in page
    data = card["training"]["data"]
    events = sum(map(len, HISTORIES))
    assert data == {"users": len(HISTORIES), "events": events, "items": ITEMS, "held_out": ITEMS}
    assert f"| events | {events} |" in page and f"| training.steps | {report.steps} |" in page
    for row in report.curve:
        assert f"| {row['step']} | {row['events']} | {row['train_nats']:.4f} | {row['ndcg@10']:.4f} |" in page
    assert page.count("| kept |") == 1 and card["base_sha256"] in page
    assert str(base.parent) not in page
    # A card of before has less to say, and is still read.
    less = {**card, "training": {}}
    stored = json.loads((tmp_path / "adapter" / "card.json").read_text())
    (tmp_path / "adapter" / "card.json").write_text(json.dumps({**stored, "card": less}))
    again = load_language_model(tmp_path / "adapter", base, texts(), "d")
    again.save(tmp_path / "again")
    assert "unknown" in (tmp_path / "again" / "README.md").read_text()


# ---- continuing --------------------------------------------------------------------------------------

N = 24
CATALOGUE = [Item(f"i{n:02d}", f"thing number {n} {chr(97 + n)}{chr(97 + n)}") for n in range(N)]
DAY = 86_400


def day(number, first, users=48, seed=0):
    """A day on which people choose among twelve items, each time the one after the last."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(users):
        start = int(rng.integers(12))
        events += [
            Event(f"d{number}u{user}", f"i{first + (start + t) % 12:02d}", number * DAY + 60 * user + t)
            for t in range(5)
        ]
    return events


def follows(rec, first):
    """NDCG@10 of the model alone, over the catalogue, for the item after each of twelve."""
    queries = []
    for n in range(12):
        mask = np.ones(N, np.bool_)
        mask[first + n] = False
        queries.append(Query(np.array([first + n], np.int32), "", mask))
    targets = np.array([first + (n + 1) % 12 for n in range(12)], np.int32)
    hits = rec._ready(lm=True).lm.scorer.retrieve(queries, 10)
    return summary(ranks_in((h.items for h in hits), targets), ["ndcg@10"])["ndcg@10"]


@pytest.fixture
def yesterday(base):
    lm = {"base": str(base), "layers": 2, "rank": 4, "head_dim": 32, "precision": "float32"}
    training = {
        "minutes": None,
        "steps": 60,
        "head_learning_rate": 1e-2,
        "tokens_per_step": 250,
        "warmup_steps": 3,
    }
    config = {"encoder": {"name": "light"}, "retrieval": {"search": False}, "lm": lm, "training": training}
    rec = Recommender.fit(CATALOGUE, day(1, 0), config)
    rec.finetune()
    return rec


def train_with(rec, **values):
    rec.configure({"training": {**rec.config.training.model_dump(), **values}})


def test_a_continued_model_learns_the_new_rule_and_keeps_the_old_one(yesterday, tmp_path):
    rec = yesterday
    old, new = follows(rec, 0), follows(rec, 12)
    assert old > 0.8 > 0.5 > new
    rec.observe_many(day(2, 12, seed=1))
    rec.save(tmp_path / "model")
    report = rec.finetune(since="last")
    continued = report.continued
    # The newest event of the first day, to the second.
    assert continued.since == max(e.timestamp for e in day(1, 0))
    # Of half of 48 users the last of 5 events is held out; as many old ones are drawn.
    assert continued.fresh == continued.replayed == 48 * 5 - 24
    assert continued.kept and continued.comparison.low > 0 and continued.comparison.users == 12
    assert "kept: " in str(report) and "1970-01-02" in str(report)
    assert follows(rec, 12) > 0.8 and follows(rec, 0) > 0.8
    # The card names the second day now.
    assert rec._state.lm.card.training["data"]["until"] == max(e.timestamp for e in day(2, 12, seed=1))
    rec.save(tmp_path / "model")
    assert not (tmp_path / "model" / "training").exists()
    again = Recommender.load(tmp_path / "model")
    assert follows(again, 12) == follows(rec, 12)
    adapter = next((tmp_path / "model").glob("state-*/adapter/log.jsonl")).parent
    assert "kept: " in (adapter / "README.md").read_text()
    with pytest.raises(DataError, match="too little is new"):
        again.finetune(since="last")


def test_a_continued_run_that_is_killed_goes_on_in_another_process(yesterday, tmp_path):
    yesterday.observe_many(day(2, 12, seed=1))
    train_with(yesterday, checkpoint_seconds=1e-9, steps=12)
    yesterday.save(tmp_path / "model")
    whole = yesterday.finetune(since="last", folder=tmp_path / "whole")

    def die(progress, done):
        if progress.step == 7:
            raise Killed

    with pytest.raises(Killed):
        Recommender.load(tmp_path / "model").finetune(since="last", on_step=die)
    steps = []
    again = Recommender.load(tmp_path / "model")
    report = again.finetune(since="last", on_step=lambda p, done: steps.append(p.step))
    assert steps[0] == 7
    assert [{**row, "seconds": 0} for row in report.training.curve] == [
        {**row, "seconds": 0} for row in whole.training.curve
    ]


def test_without_replay_more_is_forgotten(yesterday):
    rec = yesterday
    rec.observe_many(day(2, 12, seed=1))
    train_with(rec, replay=0.0, steps=200)
    report = rec.finetune(since="last")
    assert report.continued.replayed == 0 and follows(rec, 12) > 0.8
    assert follows(rec, 0) < 0.8


def test_a_continued_model_that_is_worse_is_refused(yesterday, tmp_path):
    rec = yesterday
    # The rule goes on, which the model knows; rates that are far too high spoil it.
    rec.observe_many(day(2, 0, seed=1))
    rec.save(tmp_path / "model")
    before = {n: p.detach().clone() for n, p in rec._state.lm.model.named_parameters()}
    page = next((tmp_path / "model").glob("state-*/adapter/README.md")).read_text()
    train_with(rec, learning_rate=0.3, head_learning_rate=0.3, validations=1, steps=20)
    report = rec.finetune(since="last")
    assert not report.continued.kept and report.continued.comparison.high < 0
    assert "not kept, the earlier model stays" in str(report)
    for name, parameter in rec._state.lm.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert follows(rec, 0) > 0.8
    rec.save(tmp_path / "model")
    pages = {p.read_text() for p in (tmp_path / "model").glob("state-*/adapter/README.md")}
    assert pages == {page}
    assert not (tmp_path / "model" / "training").exists()


def test_what_cannot_be_continued_is_a_clear_error(yesterday, base):
    rec = yesterday
    with pytest.raises(DataError, match=r"too little is new to continue: 0 events of 0 users"):
        rec.finetune(since="last")
    until = rec._state.lm.card.training["data"]["until"]
    rec.observe_many(day(2, 12, users=4))
    with pytest.raises(DataError, match=f"give {until} or later"):
        rec.finetune(since=until - 1)
    for wrong in (True, "yesterday", 1.5):
        with pytest.raises(DataError, match="'last' or whole seconds"):
            rec.finetune(since=wrong)
    with pytest.raises(DataError, match="20 events of 4 users"):
        rec.finetune(since=until)
    rec.configure({"lm": {**rec.config.lm.model_dump(), "rank": 8}})
    with pytest.raises(ConfigError, match="rank 4 -> 8"):
        rec.finetune(since="last")

    plain = {"encoder": {"name": "light"}, "retrieval": {"search": False}}
    with pytest.raises(ModelError, match="no tuned language model to continue"):
        Recommender.fit(CATALOGUE, day(1, 0), plain).finetune(since="last")


@pytest.mark.parametrize("mode", ["likelihood", "yes_no"])
def test_models_that_read_words_are_continued_too(base, mode):
    lm = {
        "base": str(base),
        "rank": 4,
        "precision": "float32",
        "mode": mode,
        "window": 3,
        "listed": 4,
        "candidates": 6,
        "mined": 60,
        "judged": 20,
    }
    training = {"minutes": None, "steps": 3, "validations": 1, "tokens_per_step": 400}
    config = {"encoder": {"name": "light"}, "retrieval": {"search": False}, "lm": lm, "training": training}
    rec = Recommender.fit(CATALOGUE, day(1, 0, users=20), config)
    rec.finetune()
    earlier = rec._state.lm
    rec.observe_many(day(2, 12, users=20, seed=1))
    report = rec.finetune(since="last")
    assert report.training.steps == 3 and report.continued.comparison.users == 5
    assert (rec._state.lm is not earlier) == report.continued.kept
    if report.continued.kept:
        # Items of the second day count now.
        assert rec._state.lm.counts[12:].sum() > 0 == earlier.counts[12:].sum()


def test_the_command_line_continues(yesterday, tmp_path, monkeypatch, capsys):
    yesterday.observe_many(day(2, 12, seed=1))
    yesterday.save(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["llmrec", "finetune", str(tmp_path / "model"), "--continue"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert not ended.value.code and "kept: " in shown.out
    rec = Recommender.load(tmp_path / "model")
    # The retrievers know the new day as well.
    assert rec._state.log == rec._log().fingerprint


# ---- programs ----------------------------------------------------------------------------------------

CONFIGS = ROOT / "finetune" / "configs"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    items, events = toy_data(users=40, items=20, seed=1)
    rows = [{"item_id": i.item_id, "title": i.title} for i in items]
    pl.DataFrame(rows).write_parquet(folder / "items.parquet")
    rows = [{"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp} for e in events]
    pl.DataFrame(rows).write_parquet(folder / "events.parquet")
    return ["--items", str(folder / "items.parquet"), "--events", str(folder / "events.parquet")]


def toml(path, lm, training):
    """A small configuration in a file; values are as JSON, which for these is TOML too."""
    sections = {"encoder": {"name": "light"}, "retrieval": {"search": False}, "lm": lm, "training": training}
    parts = [
        "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())])
        for name, values in sections.items()
    ]
    path.write_text("\n".join(parts))
    return str(path)


@pytest.mark.parametrize("mode", ["yes_no", "letters", "likelihood"])
def test_the_program_for_words_goes_from_a_log_to_an_adapter(base, files, tmp_path, capsys, mode):
    lm = {"mode": "yes_no", "base": str(base), "rank": 4, "precision": "float32", "window": 4}
    lm |= {"candidates": 5, "listed": 5, "mined": 80, "judged": 20}
    config = toml(tmp_path / "c.toml", lm, {"steps": 3, "validations": 1, "tokens_per_step": 300})
    arguments = [*files, "--out", str(tmp_path / "out"), "--config", config, "--mode", mode]
    listwise = program("finetune/listwise")
    listwise.main(arguments)
    shown = capsys.readouterr()
    assert "3 steps" in shown.out and "lm - merge, ndcg@10" in shown.out and "untrained: ndcg@10" in shown.err
    assert ("mined 80 lists" in shown.err) == (mode != "likelihood")
    adapter = tmp_path / "out" / "adapter"
    assert shown.out.splitlines()[-1] == str(adapter)
    assert f"in mode `{mode}`" in (adapter / "README.md").read_text()
    assert (adapter / "log.jsonl").read_text() and not (tmp_path / "out" / ".adapter").exists()
    # It is of these items, in this order.
    ids = sorted(pl.read_parquet(files[1])["item_id"])
    card = json.loads((adapter / "card.json").read_text())["card"]
    assert card["training"]["data"]["items_sha256"] == hash_ids(ids)
    # The finished run is taken up: no step is taken again, and the adapter is the same.
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    listwise.main(arguments)
    assert "step 1," not in capsys.readouterr().err
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights


def test_the_program_does_not_train_on_what_another_log_left_in_its_folder(base, files, tmp_path, capsys):
    lora, lm = program("finetune/lora"), {"base": str(base), "layers": 1, "rank": 2, "head_dim": 8}
    config = toml(tmp_path / "c.toml", lm, {"steps": 1, "tokens_per_step": 100})
    arguments = [*files, "--out", str(tmp_path / "out"), "--config", config]
    for _ in range(2):
        lora.main(arguments)
    shown = capsys.readouterr()
    assert shown.out.count("1 steps") == 2 and "its retrievers are kept" in shown.err
    fewer = tmp_path / "fewer.parquet"
    pl.read_parquet(files[3]).head(-1).write_parquet(fewer)
    with pytest.raises(ConfigError, match="fitted on other events"):
        lora.main([*files[:3], str(fewer), *arguments[4:]])
    text = (tmp_path / "c.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("[retrieval]", "[retrieval]\ndepth = 50"))
    with pytest.raises(ConfigError, match="other data, encoder or retrieval settings"):
        lora.main(arguments)


def test_the_program_for_words_refuses_a_model_that_reads_vectors(base, files, tmp_path):
    config = toml(tmp_path / "c.toml", {"base": str(base)}, {"steps": 3})
    with pytest.raises(
        ConfigError, match=r"c\.toml has no lm\.mode of likelihood, generate, yes_no, letters"
    ):
        program("finetune/listwise").main([*files, "--out", str(tmp_path / "out"), "--config", config])


def test_configurations_of_accelerate_are_ones_that_it_can_load():
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.name: load_config_from_file(str(path)) for path in CONFIGS.glob("*.accelerate.yaml")}
    assert {name: one.num_processes for name, one in found.items()} == {
        "eight-gpus.accelerate.yaml": 8,
        "eight-gpus-fsdp.accelerate.yaml": 8,
        "two-processes.accelerate.yaml": 2,
    }
    for name, one in found.items():
        assert one.use_cpu == (name == "two-processes.accelerate.yaml")
        # The launcher of one process ignores their number.
        assert one.distributed_type == ("FSDP" if "fsdp" in name else "MULTI_GPU")
    assert found["eight-gpus-fsdp.accelerate.yaml"].fsdp_config["fsdp_version"] == 2


SHARDS = """
import sys
from pathlib import Path

import numpy as np
import torch

from llmrec.adapter import fresh_adapter
from llmrec.language_model import LanguageModel
from llmrec.processes import Processes
from llmrec.protocols import Query
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.loading import load_causal
from llmrec.score.tasks import ItemTokensTask
from llmrec.sequences import Source
from llmrec.sharding import ShardedLayers
from llmrec.training import LoRATrainer

team, words = Processes(), torch.arange(12).reshape(2, 6)
for base in sys.argv[1:]:
    torch.manual_seed(0)
    causal, _ = load_causal(Path(base), None, torch.float32)
    body = fresh_adapter(causal, ItemTokensConfig())
    trained = {n: p for n, p in body.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    names = list(body.state_dict())

    def run():
        body.zero_grad()
        states = body(input_ids=words).last_hidden_state
        states.square().sum().backward()
        return states.detach(), {n: p.grad.clone() for n, p in trained.items()}

    size = sum(p.numel() for n, p in body.named_parameters() if ".layers." in n or ".h." in n)
    before = run()
    layers = ShardedLayers(body, team)
    parts = [p for p in body.parameters() if hasattr(p, "to_local")]
    own = sum(p.to_local().numel() for p in parts)
    frozen = size - sum(p.numel() for p in trained.values())
    assert parts and 0.45 * frozen < own < 0.55 * frozen, (own, frozen)
    during = run()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            body(input_ids=words)
        # Behind each reading a process keeps its part alone.
        held = [p for n, p in body.named_parameters() if n not in trained and (".layers." in n or ".h." in n)]
        assert len(held) == len(parts) and all(hasattr(p, "to_local") for p in held)
    during = run()
    assert len(list(body.parameters())) == len(names)
    layers.restore()
    after = run()
    for found in (during, after):
        torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-5)
    assert list(body.state_dict()) == names
    assert {n for n, p in body.named_parameters() if p.requires_grad} == set(trained)
    assert all(p is trained[n] for n, p in body.named_parameters() if n in trained)
    assert not any(hasattr(p, "to_local") for p in body.parameters())

# A batch of one history is for one process alone; the other has to read along.
lm = LanguageModel.new(
    ItemTokensConfig(base=sys.argv[1], layers=2, rank=4, precision="float32"),
    Path(sys.argv[1]), np.eye(6, dtype=np.float32), np.ones(6),
)
training = TrainingConfig(steps=6, minutes=None, validations=3, patience=None)
task = ItemTokensTask(lm.model, Source([np.arange(6, dtype=np.int32)], None), 10, training)
queries = [Query(np.arange(3, dtype=np.int32))]
asked = [np.arange(6, dtype=np.int32)]
validate = lambda: {"ndcg@10": float(lm.scorer_of(lm.model).score(queries, asked)[0][3])}
report = LoRATrainer(task, training, Path(sys.argv[2]).parent / "run", "f").run(validate)
assert report.steps == 6 and len(report.curve) >= 3
assert len(lm.scorer.retrieve(queries, 3)[0].items) == 3
print("alike")
team.end()
"""


def launched(*command, **env):
    """Two processes on the processor run a program."""
    launcher = ["--config_file", str(CONFIGS / "two-processes.accelerate.yaml"), "--main_process_port", "0"]
    started = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *map(str, command)]
    done = subprocess.run(
        started, capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_that_are_spread_over_two_processes_compute_the_same_and_come_back(tmp_path):
    (tmp_path / "shards.py").write_text(SHARDS)
    bases = [tiny_lm(tmp_path / make, make=make) for make in ("llama", "gpt2")]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PYTHONPATH": str(ROOT)}
    assert launched(tmp_path / "shards.py", *bases, **fsdp).count("alike") == 2


@pytest.mark.full
def test_two_processes_have_the_curve_of_one_with_twice_the_batch(base, files, tmp_path):
    """Within 1e-5 nats at every step; dropout is off, since each process draws its own."""
    lm = json.loads(shape(base).model_dump_json(exclude_none=True))
    training = {"steps": 12, "log_steps": 1, "validations": 3, "checkpoint_seconds": 0.01}
    found = []
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, tokens, env in (("one", 120, {}), ("two", 60, {}), ("sharded", 60, fsdp)):
        config = toml(tmp_path / f"{name}.toml", lm, {**training, "tokens_per_step": tokens})
        command = [ROOT / "finetune" / "lora.py", *files, "--config", config, "--out", tmp_path / name]
        if name == "one":
            alone = [sys.executable, *map(str, command)]
            said = subprocess.run(
                alone, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=600, check=True
            ).stdout
        else:
            said = launched(*command, **env)
        assert said.count("12 steps") == 1  # one process speaks
        adapter = next((tmp_path / name).glob("state-*/adapter"))
        found.append((read_lines(adapter / "log.jsonl"), read_tensors(adapter / "head.safetensors")[0]))
        # One process writes: nothing is left of others, and what it wrote can be read.
        assert not list((tmp_path / name).rglob("*.tmp")) and not (tmp_path / name / "training").exists()
        assert Recommender.load(tmp_path / name).recommend(user="u1", k=3)
    one, head = found[0]
    for two, other in found[1:]:
        for a, b in zip(one, two, strict=True):
            assert [a[key] for key in ("kind", "step", "events")] == [
                b[key] for key in ("kind", "step", "events")
            ]
            for key in {"loss", "train_nats", "nats"} & set(a):
                assert a[key] == pytest.approx(b[key], abs=1e-5)
        torch.testing.assert_close(head["id_in.weight"], other["id_in.weight"], atol=1e-4, rtol=1e-3)
