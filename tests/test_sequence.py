"""Sequence models: no position sees a later item, a batch changes nothing, a planted rule is learned."""

import numpy as np
import pytest
import torch

from llmrec.protocols import Query
from llmrec.retrieve.encoders import Caser
from llmrec.retrieve.sequence import SequenceModel, SequenceRetriever
from llmrec.retrieve.sequence_config import SequenceConfig

KINDS = ("gru4rec", "caser", "sasrec")
ITEMS = 12
TEXT = np.eye(ITEMS, dtype=np.float32)
CONFIG = SequenceConfig(dim=16, layers=1, window=8, epochs=40, dropout=0.1, learning_rate=0.02)
RULE = [np.array([(s + t) % ITEMS for t in range(6)], dtype=np.int32) for s in range(ITEMS) for _ in range(4)]
ASKED = [Query(np.array([s], dtype=np.int32)) for s in range(ITEMS)]


def histories(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, ITEMS, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    return SequenceRetriever.fit(request.param, RULE, TEXT, CONFIG)


def test_a_planted_rule_is_learned(trained):
    hits = trained.retrieve(ASKED, 1)
    assert [int(h.items[0]) for h in hits] == [(s + 1) % ITEMS for s in range(ITEMS)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_a_later_item(kind):
    torch.manual_seed(0)
    model = SequenceModel(kind, CONFIG, np.ones(ITEMS, np.float32), TEXT).eval()
    codes = torch.randint(0, ITEMS, (1, 8))
    other = codes.clone()
    other[0, 5] = (other[0, 5] + 1) % ITEMS
    with torch.inference_mode():
        change = (model.after(codes) - model.after(other)).abs().amax(dim=-1)[0]
    # State t has read the items before position t.
    assert float(change[:6].max()) < 1e-6 < 1e-4 < float(change[6])


def test_a_padded_batch_scores_as_single_requests_do(trained):
    asked = histories(1, 7, 3, 30, 8)
    together = trained.scores(asked)
    alone = np.concatenate([trained.scores([h]) for h in asked])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(np.exp(together).sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(trained.scores([asked[3][-8:]])[0], together[3], atol=1e-4)


def test_the_window_of_convolutions_equals_filters_applied_by_hand():
    torch.manual_seed(1)
    model = Caser(6, 3, 0.0, filters=2, vertical=2).eval()
    vectors = torch.randn(1, 5, 6)
    with torch.inference_mode():
        states = model(vectors)
        padded = torch.cat([torch.zeros(1, 2, 6), vectors], dim=1)
        for t in range(5):
            latest = padded[0, t : t + 3]
            across = []
            for height, convolution in enumerate(model.horizontal, start=1):
                values = [
                    torch.relu(
                        (convolution.weight * latest[i : i + height].T).sum(dim=(1, 2)) + convolution.bias
                    )
                    for i in range(3 - height + 1)
                ]
                across.append(torch.stack(values).amax(dim=0))
            down = (model.vertical @ latest).flatten()
            expected = torch.relu(model.out(torch.cat([*across, down])))
            torch.testing.assert_close(states[0, t], expected)


def test_every_position_that_is_served_is_trained():
    long = [np.resize(RULE[s], 30) for s in range(ITEMS)]
    config = CONFIG.model_copy(update={"epochs": 2, "weight_decay": 0.0})
    torch.manual_seed(config.seed)
    fresh = SequenceModel("sasrec", config, np.ones(ITEMS, np.float32), TEXT).encoder.position.weight.detach()
    trained = SequenceRetriever.fit("sasrec", long, TEXT, config).model.encoder.position.weight.detach()
    assert len(trained) == config.window + 1
    assert float((trained - fresh).abs().amax(dim=1).min()) > 1e-3


def test_queries_without_a_history_get_nothing_and_masks_hold(trained):
    mask = np.zeros(ITEMS, dtype=bool)
    mask[[3, 7]] = True
    found = trained.retrieve([Query(), Query(histories(4)[0], mask=mask), Query(text="words")], 5)
    assert [len(h.items) for h in found] == [0, 2, 0]
    assert set(found[1].items.tolist()) == {3, 7}


def test_saved_arrays_make_the_same_model_and_new_items_have_a_vector_from_their_text(trained):
    grown = np.concatenate([TEXT, TEXT[4:5]])
    again = SequenceRetriever.from_arrays(trained.kind, trained.arrays(), grown, CONFIG)
    asked = histories(5)
    old, new = trained.scores(asked)[0], again.scores(asked)[0]
    assert len(new) == ITEMS + 1 and np.isfinite(new).all()
    np.testing.assert_allclose(np.diff(new[:ITEMS]), np.diff(old), atol=1e-4)
    assert not any(a.dtype == object for a in trained.arrays().values())


def test_an_item_of_the_same_text_without_events_is_found_where_its_twin_is(trained):
    text = np.concatenate([TEXT, TEXT[4:5]])
    model = SequenceRetriever.fit(trained.kind, RULE, text, CONFIG)
    ranks = np.argsort(np.argsort(-model.scores([np.array([3], np.int32)])[0]))
    assert ranks[4] == 0 and ranks[ITEMS] < ITEMS / 2, "after 3 comes 4, and the new item has the words of 4"


def test_validation_decides_which_state_is_kept_and_when_to_stop():
    values = iter([0.1, 0.5, 0.2, 0.3, 0.4, 0.9])
    seen = []

    def validate(model):
        seen.append(model.scores([RULE[0][:2]]))
        return next(values)

    config = CONFIG.model_copy(update={"patience": 3})
    kept = SequenceRetriever.fit("gru4rec", RULE, TEXT, config, validate=validate)
    assert len(seen) == 5, "three epochs without a better one"
    np.testing.assert_allclose(kept.scores([RULE[0][:2]]), seen[1], atol=1e-6)


def test_the_seed_decides_and_the_callers_random_state_is_left_alone():
    state = torch.get_rng_state()
    one, two = (
        SequenceRetriever.fit("sasrec", RULE, TEXT, CONFIG.model_copy(update={"epochs": 2})) for _ in "ab"
    )
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(one.scores(histories(4)), two.scores(histories(4)))


def test_no_events_and_no_text_are_defined():
    none = SequenceRetriever.fit("caser", [np.empty(0, np.int32)], np.zeros((3, 0), np.float32), CONFIG)
    assert np.isfinite(none.scores([np.array([1], np.int32)])).all()


def test_time_that_is_over_ends_an_epoch_too(monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr("llmrec.retrieve.sequence.time.monotonic", lambda: next(clock))
    epochs = []
    config = CONFIG.model_copy(update={"minutes": 1.0, "tokens_per_step": 1, "epochs": 50})
    many = histories(*[6] * 30)
    made = SequenceRetriever.fit(
        "gru4rec", many, TEXT, config, on_epoch=lambda epoch, nats, value: epochs.append(epoch)
    )
    # Two batches of thirty take 80 seconds, and the state after them is kept.
    assert epochs == [0] and next(clock) <= 160
    assert np.isfinite(made.scores(many[:1])).all()
