"""Fine-tuning: it learns a planted rule, restarts where it was, and an adapter knows what it belongs to."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from llmrec import progress, sequences, training
from llmrec.errors import ConfigError, DataError, ModelError
from llmrec.families import Texts, TrainingLog
from llmrec.index.faiss_index import FaissIndex
from llmrec.language_model import LanguageModel, load_language_model
from llmrec.lm_training import ranks_among, train_language_model
from llmrec.protocols import Query
from llmrec.recipe import HeldOut
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.item_tokens import Stretch
from llmrec.score.tasks import ItemTokensTask
from llmrec.sequences import Source, Window, batches, next_item_loss, windows
from llmrec.tensors import read_tensors, write_tensors
from llmrec.testing import tiny_lm

ITEMS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"))


VECTORS = np.eye(ITEMS, dtype=np.float32)
# After item i always comes item i + 1.
RULE = [np.array([(s + t) % ITEMS for t in range(6)], dtype=np.int32) for s in range(ITEMS) for _ in range(4)]
HELD_OUT = HeldOut(
    [Query(np.array([s], dtype=np.int32)) for s in range(ITEMS)],
    np.array([(s + 1) % ITEMS for s in range(ITEMS)], dtype=np.int32),
)


class NamedEncoder:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


def texts(encoder="e"):
    index = FaissIndex(VECTORS.shape[1])
    return Texts([f"item {code}" for code in range(ITEMS)], VECTORS, NamedEncoder(encoder), index)


def config(base):
    return ItemTokensConfig(base=str(base), layers=2, rank=4, head_dim=32, precision="float32", dropout=0.1)


def settings(**values):
    chosen = {
        "minutes": None,
        "steps": 60,
        "head_learning_rate": 1e-2,
        "tokens_per_step": 300,
        "warmup_steps": 3,
    }
    return TrainingConfig(**{**chosen, **values})


def train(base, folder, on_step=None, **values):
    return train_language_model(
        TrainingLog(RULE),
        HELD_OUT,
        texts(),
        base,
        config(base),
        settings(**values),
        data="d",
        folder=folder,
        on_step=on_step,
    )


def test_a_planted_rule_is_learned(base, tmp_path):
    lm, report = train(base, tmp_path / "run")
    hits = lm.scorer.retrieve(HELD_OUT.queries, 1)
    assert [int(h.items[0]) for h in hits] == HELD_OUT.targets.tolist()
    assert report.best == 1.0
    assert report.curve[-1]["nats"] < 0.5 * math.log(ITEMS)
    assert report.steps == 60


class Killed(Exception):
    pass


def test_a_run_killed_after_a_checkpoint_ends_as_if_it_had_not_been(base, tmp_path):
    whole, _ = train(base, tmp_path / "whole", steps=12)

    def die(progress, done):
        if progress.step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(base, tmp_path / "run", die, steps=12, checkpoint_seconds=1e-9)
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    steps = []
    resumed, report = train(
        base, tmp_path / "run", lambda p, done: steps.append(p.step), steps=12, checkpoint_seconds=1e-9
    )
    assert steps[0] == 7
    assert report.steps == 12
    for name, parameter in training.trainable(whole.model).items():
        torch.testing.assert_close(parameter, dict(resumed.model.named_parameters())[name], msg=name)


def test_a_checkpoint_that_cannot_be_read_is_as_none(base, tmp_path, caplog):
    train(base, tmp_path / "run", steps=3)
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    steps = []
    train(base, tmp_path / "run", lambda p, done: steps.append(p.step), steps=3)
    assert steps == [1, 2, 3] and "cannot be read" in caplog.text


def test_a_run_that_diverges_ends_with_an_error_and_leaves_no_state_that_is_not_a_number(base, tmp_path):
    with pytest.raises(ModelError, match=r"diverged at step \d+, .*lower training\.learning_rate"):
        train(base, tmp_path / "run", head_learning_rate=1e30, warmup_steps=0, steps=30, clip=1e30)
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in read_tensors(path)[0].values())


def test_a_model_that_tells_nothing_apart_has_no_part_in_the_order_of_its_candidates():
    items = [np.array([7, 3, 9], np.int32)] * 4
    targets = np.array([7, 7, 3, 1], np.int32)
    scores = [np.zeros(3), np.full(3, np.nan), np.array([1.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.0])]
    assert ranks_among(items, scores, targets).tolist() == [3, 3, 1, 0]


def test_who_sets_steps_alone_trains_so_many_and_endless_runs_are_refused():
    assert TrainingConfig(steps=5).minutes is None and TrainingConfig().minutes == 20
    assert TrainingConfig(steps=5, minutes=2).minutes == 2
    with pytest.raises(ValidationError, match="finite"):
        TrainingConfig(minutes=math.inf)
    with pytest.raises(ConfigError, match="an end, got inf"):
        TrainingConfig().lasting(math.inf)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        TrainingConfig(seed=-1)


def test_a_checkpoint_of_another_run_is_not_continued(base, tmp_path):
    train(base, tmp_path / "run", steps=4, checkpoint_seconds=1e-9)
    steps = []
    train(base, tmp_path / "run", lambda p, done: steps.append(p.step), steps=5, checkpoint_seconds=1e-9)
    assert steps == [1, 2, 3, 4, 5]


def test_batches_hold_every_window_once_and_stay_within_the_budget():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 200)
    pieces = windows([np.full(n, i, dtype=np.int32) for i, n in enumerate(lengths)], 40, rng)
    grouped = batches(pieces, overhead=5, tokens=200, rng=rng)
    seen = sorted(int(piece.items[0]) for batch in grouped for piece in batch)
    assert seen == list(range(200))
    for batch in grouped:
        assert len(batch) * (5 + max(map(len, batch))) <= 200 or len(batch) == 1


def test_the_loss_is_the_weighted_mean_negative_log_probability_of_what_followed(base):
    lm = LanguageModel.new(config(base), base, VECTORS, np.full(ITEMS, 3))
    lm.model.eval()
    histories = [RULE[0], RULE[1][:3]]
    weights = np.random.default_rng(4).uniform(0.1, 3, 9).astype(np.float32)
    batch = [Window(histories[0], weights[:6]), Window(histories[1], weights[6:])]
    with torch.inference_mode():
        loss = next_item_loss(lm.model, batch, negatives=0)
    nats = [-lm.scorer.log_probs([h[:t]])[0][h[t]] for h in histories for t in range(len(h))]
    assert float(loss) == pytest.approx(np.average(nats, weights=weights), abs=1e-4)


@pytest.mark.parametrize("width", [1, 9, 40])
def test_windows_side_by_side_have_the_states_that_they_have_alone(base, width):
    lm = LanguageModel.new(config(base), base, VECTORS, np.full(ITEMS, 3))
    lm.model.eval()
    lengths = [3, 6, 1, 6, 2, 5, 4, 4]
    pieces = [RULE[5 * i][:n] for i, n in enumerate(lengths)]
    with torch.inference_mode():
        states, order = lm.model.packed(
            [Stretch.of(Window(piece, np.ones(len(piece), np.float32))) for piece in pieces], width
        )
        assert sorted(order) == list(range(len(pieces)))
        alone = [lm.model.before(torch.from_numpy(pieces[i].astype(np.int64))[None])[0] for i in order]
    torch.testing.assert_close(states, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_packed_batch_is_that_of_the_padded_one(base):
    lm = LanguageModel.new(config(base), base, VECTORS, np.full(ITEMS, 3))
    lm.model.eval()
    rng = np.random.default_rng(5)
    weights = [rng.uniform(0.1, 3, len(h)).astype(np.float32) for h in RULE]
    task = ItemTokensTask(lm.model, Source(RULE, weights), 4, settings())
    grouped = list(task.epoch(rng))
    assert sum(map(task.events, grouped)) == sum(map(len, RULE))
    assert all(task.events(batch) <= 300 for batch in grouped)
    for batch in grouped:
        with torch.inference_mode():
            expected = next_item_loss(lm.model, batch, negatives=0)
            assert float(task.loss(batch)) == pytest.approx(float(expected), abs=1e-4)


def test_events_of_little_weight_change_little(base, tmp_path):
    """Of two followers of an item, the one whose events weigh more is expected."""
    follows = [np.array([s, 10 + t], dtype=np.int32) for s in range(8) for t in (0, 1, 1)]
    heavy = [np.array([1, 9 if h[1] == 10 else 0.1], dtype=np.float32) for h in follows]
    best = []
    for weights in (None, heavy):
        lm, _ = train_language_model(
            TrainingLog(follows, weights),
            HeldOut([], np.empty(0, np.int32)),
            texts(),
            base,
            config(base),
            settings(steps=40),
            data="d",
            folder=tmp_path / str(weights is None),
        )
        best.append([int(h.items[0]) for h in lm.scorer.retrieve([Query(h[:1]) for h in follows], 1)])
    assert set(best[0]) == {11}
    assert set(best[1]) == {10}


def test_items_without_events_are_no_alternatives_in_training(base, monkeypatch):
    counts = np.full(ITEMS, 3)
    counts[5:25] = 0
    lm = LanguageModel.new(config(base), base, VECTORS, counts)
    lm.model.eval()
    history = RULE[2]
    chosen = np.union1d(np.flatnonzero(counts), history)
    rows = [lm.scorer.log_probs([history[:t]])[0] for t in range(len(history))]
    nats = [np.log(np.exp(row[chosen]).sum()) - row[i] for row, i in zip(rows, history, strict=True)]
    batch = [Window(history, np.ones(len(history), np.float32))]
    with torch.inference_mode():
        assert float(next_item_loss(lm.model, batch, negatives=0)) == pytest.approx(np.mean(nats), abs=1e-4)
        monkeypatch.setattr(sequences, "FULL_SOFTMAX_UP_TO", 1)
        torch.manual_seed(0)
        sampled = next_item_loss(lm.model, batch, negatives=200_000)
    assert float(sampled) == pytest.approx(np.mean(nats), abs=0.01)


def test_sampled_softmax_approaches_the_full_one(base, monkeypatch):
    counts = np.arange(1, ITEMS + 1)
    lm = LanguageModel.new(config(base), base, VECTORS, counts)
    lm.model.eval()
    batch = windows(RULE[:8], 10, np.random.default_rng(0))
    with torch.inference_mode():
        full = next_item_loss(lm.model, batch, negatives=0)
        monkeypatch.setattr(sequences, "FULL_SOFTMAX_UP_TO", 1)
        torch.manual_seed(0)
        sampled = next_item_loss(lm.model, batch, negatives=200_000)
    assert float(sampled) == pytest.approx(float(full), abs=0.01)


def test_an_adapter_scores_the_same_after_saving_and_refuses_what_it_was_not_trained_with(base, tmp_path):
    lm, _ = train(base, tmp_path / "run", steps=5)
    lm.save(tmp_path / "adapter")
    again = load_language_model(tmp_path / "adapter", base, texts("e"), "d")
    asked = [RULE[0], RULE[5][:2]]
    np.testing.assert_array_equal(again.scorer.log_probs(asked), lm.scorer.log_probs(asked))
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} == {".json", ".safetensors", ".md"}

    # Matrices of fewer layers would be left as they were drawn, those of more left out.
    matrices = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, layers = matrices.read_bytes(), read_tensors(matrices)[0]
    for some in (
        {n: t for n, t in layers.items() if ".1." not in n},
        {**layers, "base_model.x": torch.ones(1)},
    ):
        write_tensors(matrices, some, {})
        with pytest.raises(ModelError, match="of another body"):
            load_language_model(tmp_path / "adapter", base, texts("e"), "d")
    matrices.write_bytes(whole)

    other = tiny_lm(tmp_path / "other", seed=7)
    with pytest.raises(ModelError, match=r"another base: [0-9a-f]{12}\.\.\. then, [0-9a-f]{12}"):
        load_language_model(tmp_path / "adapter", other, texts("e"), "d")
    with pytest.raises(ModelError, match="another encoder"):
        load_language_model(tmp_path / "adapter", base, texts("f"), "d")
    card = json.loads((tmp_path / "adapter" / "card.json").read_text())
    card["card"]["prompt_sha256"] = "0" * 64
    (tmp_path / "adapter" / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="another prompt"):
        load_language_model(tmp_path / "adapter", base, texts("e"), "d")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no complete adapter"):
        load_language_model(tmp_path / "adapter", base, texts("e"), "d")


def test_other_data_than_it_was_trained_on_is_a_warning(base, tmp_path, caplog):
    lm, _ = train(base, tmp_path / "run", steps=1)
    lm.save(tmp_path / "adapter")
    load_language_model(tmp_path / "adapter", base, texts("e"), "d")
    assert not caplog.records
    load_language_model(tmp_path / "adapter", base, texts("e"), "later")
    assert "other events than the retrievers" in caplog.text


def test_a_log_that_can_be_read_once_alone_is_an_error_and_no_endless_run(base, tmp_path, monkeypatch):
    epochs = []

    def once(self, rng, parts=1):
        epochs.append(rng)
        return epoch(self, rng, parts) if len(epochs) == 1 else []

    epoch = ItemTokensTask.epoch
    monkeypatch.setattr(ItemTokensTask, "epoch", once)
    with pytest.raises(DataError, match="as often as it is read"):
        train(base, tmp_path, steps=10_000)
    assert len(epochs) == 2


def test_of_states_that_rank_alike_the_one_is_kept_under_which_the_choices_are_likeliest(base, tmp_path):
    nats = iter(range(100, 0, -1))
    task = ItemTokensTask(
        LanguageModel.new(config(base), base, VECTORS, np.ones(ITEMS)).model,
        Source(RULE, None),
        6,
        settings(),
    )
    trainer = training.LoRATrainer(task, settings(steps=16, validations=8, patience=2), tmp_path, "f")
    report = trainer.run(lambda: {"ndcg@10": 0.25, "nats": float(next(nats))})
    assert report.best_step == report.steps == 16 and not report.early


def test_how_a_run_is_kept_and_computed_does_not_make_it_another():
    frugal = TrainingConfig(gradient_checkpointing=True, checkpoint_seconds=5, tensorboard=True)
    assert frugal.learned == TrainingConfig().learned != TrainingConfig(clip=2.0).learned
    assert TrainingConfig().lasting("5").minutes == 5.0
    for bad in ("soon", 0, float("nan"), []):
        with pytest.raises(ConfigError, match="more than 0 minutes"):
            TrainingConfig().lasting(bad)


def test_nothing_to_train_on_is_a_clear_error():
    with pytest.raises(DataError, match="no events to train on"):
        Source([RULE[0][:0]], None)


def test_a_run_that_learns_by_heart_cools_down_and_ends(base, tmp_path):
    """Histories without a rule can only be learned by heart."""
    rng = np.random.default_rng(0)
    noise = [rng.permutation(ITEMS)[:6].astype(np.int32) for _ in range(8)]
    fresh = [rng.permutation(ITEMS)[:4].astype(np.int32) for _ in range(100)]
    held_out = HeldOut([Query(h[:-1]) for h in fresh], np.array([h[-1] for h in fresh], np.int32))
    rates, killed = [], []

    def run(folder, on_step=None):
        values = settings(steps=400, validations=40, tokens_per_step=60, checkpoint_seconds=1e-9)
        return train_language_model(
            TrainingLog(noise),
            held_out,
            texts(),
            base,
            config(base),
            values,
            data="d",
            folder=folder,
            on_step=on_step,
        )

    whole, report = run(tmp_path / "whole", lambda p, done: rates.append((p.cooling, done)))
    assert report.early and report.steps < 200
    lowest = min(report.curve, key=lambda row: row["nats"])
    start = next(c for c, _ in rates if c is not None)
    assert start.start - start.end == -lowest["events"] and report.events >= start.end
    assert [done for _, done in rates] == sorted(done for _, done in rates) and rates[-1][1] >= 1
    assert "by heart" in str(report)

    def die(progress, done):
        if progress.cooling is not None and progress.events > start.start + 60:
            killed.append(progress.step)
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", die)
    resumed, again = run(tmp_path / "run")
    assert again.curve[-1]["nats"] == report.curve[-1]["nats"] and again.steps == report.steps > killed[0]
    for name, parameter in training.trainable(whole.model).items():
        torch.testing.assert_close(parameter, dict(resumed.model.named_parameters())[name], msg=name)


def test_a_run_cools_only_once_the_held_out_loss_has_risen():
    def curve(*nats):
        return [{"events": 100.0 * (n + 1), "nats": value} for n, value in enumerate(nats)]

    assert progress.cooling(curve(7.0), 1.0) is None
    assert progress.cooling(curve(7.0, 6.5, 6.9), 0.9) is None
    assert progress.cooling(curve(7.0, 6.5, 6.9, 7.1), 0.6) == progress.Cooling(400, 600, 0.6)
    assert progress.cooling([{"events": 1.0, "ndcg@10": 0.1}] * 3, 1.0) is None
