"""The item-token model: what it may see, what it falls back to, and that a batch changes nothing."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from llmrec.card import make_card
from llmrec.errors import ConfigError, ModelError
from llmrec.families import Texts, TrainingLog
from llmrec.index.aside import Aside
from llmrec.index.faiss_index import FaissIndex
from llmrec.language_model import LanguageModel, load_language_model
from llmrec.lm_training import train_language_model
from llmrec.protocols import Query
from llmrec.recipe import HeldOut
from llmrec.score.config import ItemTokensConfig, TrainingConfig
from llmrec.score.item_tokens import ItemTokenScorer
from llmrec.score.loading import load_body
from llmrec.score.nearest import Nearest
from llmrec.score.unseen import UNSEEN_SPREAD
from llmrec.sequences import pad, windows
from llmrec.testing import tiny_lm

ITEMS, DIM = 30, 12


class Named:
    fingerprint = "e"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(0).normal(size=(ITEMS, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def config(base, **settings):
    values = {"base": str(base), "layers": 2, "rank": 4, "head_dim": 16, "precision": "float32"}
    return ItemTokensConfig(**{**values, **settings})


@pytest.fixture(scope="module")
def lm(base, vectors):
    counts = np.arange(ITEMS)
    model = LanguageModel.new(config(base, window=20), base, vectors, counts, seed=1)
    with torch.no_grad():
        # Fresh LoRA matrices change nothing; these do.
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def histories(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, ITEMS, n).astype(np.int32) for n in lengths]


def test_a_padded_batch_scores_as_single_requests_do(lm):
    asked = histories(0, 1, 5, 20, 3, 19, 7)
    together = ItemTokenScorer(lm.model, 20).log_probs(asked)
    alone = np.concatenate([ItemTokenScorer(lm.model, 20).log_probs([h]) for h in asked])
    in_pieces = ItemTokenScorer(lm.model, 20, tokens=40).log_probs(asked)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(in_pieces, alone, atol=1e-4)


@pytest.mark.parametrize("make", ["llama", "gpt2", "qwen"])
def test_scores_are_those_of_the_formula_for_models_of_any_make(make, tmp_path, vectors):
    counts = np.arange(ITEMS) % 5
    made = LanguageModel.new(
        config(tiny_lm(tmp_path, make=make), layers=None), tmp_path, vectors, counts, seed=1
    )
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    m, asked = made.model.eval(), histories(0, 1, 5, 12)
    texts, known = torch.from_numpy(vectors), torch.from_numpy(counts > 0)[:, None]
    with torch.inference_mode():
        reads = m.text_in(texts) + m.id_in.weight * known
        gives = m.text_out(texts) + m.id_out.weight * known
        prior = torch.where(known[:, 0], torch.log1p(torch.from_numpy(counts).float()), m.unseen)
        words = m.body.get_input_embeddings()(m.instruction)
        for history, found in zip(asked, made.scorer.log_probs(asked), strict=True):
            inputs = torch.cat([words, reads[history.astype(int)]])[None]
            last = m.body(inputs_embeds=inputs).last_hidden_state[0, -1]
            logits = 2 / np.sqrt(m.state.out_features) * gives @ m.state(m.norm(last)) + prior
            np.testing.assert_allclose(found, torch.log_softmax(logits, 0).numpy(), atol=1e-4)


def test_log_probabilities_sum_to_one_over_the_catalogue(lm):
    np.testing.assert_allclose(np.exp(lm.scorer.log_probs(histories(0, 4, 9))).sum(axis=1), 1.0, atol=1e-5)


def test_no_position_sees_a_later_event(lm):
    first = histories(12)[0]
    second = first.copy()
    second[7] = (second[7] + 1) % ITEMS
    codes, _ = pad([first, second])
    with torch.inference_mode():
        states = lm.model.states(lm.model.hidden(codes))
    same = (states[0] - states[1]).abs().amax(dim=-1)
    assert float(same[:8].max()) < 1e-6
    assert float(same[8:].min()) > 1e-4


def test_only_the_window_is_read(lm):
    long = histories(30)[0]
    np.testing.assert_array_equal(lm.scorer.log_probs([long]), lm.scorer.log_probs([long[-20:]]))


def test_an_unseen_item_is_scored_by_its_text_alone(base, vectors):
    counts = np.full(ITEMS, 5)
    counts[[3, 4]] = 0
    same = vectors.copy()
    same[4] = same[3]
    model = LanguageModel.new(config(base), base, same, counts)
    scores = model.scorer.log_probs(histories(4))[0]
    assert np.isfinite(scores).all()
    assert scores[3] == pytest.approx(scores[4], abs=1e-6)
    read = model.scorer.log_probs([np.array([3], np.int32), np.array([4], np.int32)])
    np.testing.assert_allclose(read[0], read[1], atol=1e-6)


def test_in_training_some_items_are_known_by_their_text_alone_and_afterwards_none(base, vectors):
    drops = config(base, id_dropout=0.5, id_out_dropout=0.3)
    model = LanguageModel.new(drops, base, vectors, np.full(ITEMS, 5)).model.train()
    codes = torch.arange(ITEMS).repeat(400)
    text_in, text_out = (layer(model.text_vectors) for layer in (model.text_in, model.text_out))
    with torch.no_grad():
        dropped_in = (model.item_inputs(codes) == text_in[codes]).all(-1).float().mean()
        dropped_out = (model.outputs_of(codes) == text_out[codes]).all(-1).float().mean()
        assert dropped_in == pytest.approx(0.5, abs=0.03)
        assert dropped_out == pytest.approx(0.3, abs=0.03)
        model.eval()
        assert not (model.item_outputs() == text_out).all(-1).any()
        assert not (model.item_inputs(codes) == text_in[codes]).all(-1).any()


def test_with_a_zeroed_head_the_order_is_popularity(base, vectors):
    counts = np.random.default_rng(2).permutation(ITEMS)
    model = LanguageModel.new(config(base), base, vectors, counts)
    with torch.no_grad():
        model.model.state.weight.zero_()
        model.model.state.bias.zero_()
    hits = model.scorer.retrieve([Query(h) for h in histories(0, 6)], ITEMS)
    for found in hits:
        assert found.items.tolist() == np.argsort(-counts, kind="stable").tolist()


def test_score_and_retrieve_agree_and_respect_the_mask(lm):
    mask = np.zeros(ITEMS, dtype=bool)
    mask[[2, 5, 11]] = True
    query = Query(histories(6)[0], "", mask)
    hits = lm.scorer.retrieve([query], 10)[0]
    assert set(hits.items.tolist()) == {2, 5, 11}
    np.testing.assert_array_equal(lm.scorer.score([query], [hits.items])[0], hits.scores)


def graph(vectors, exact_up_to=10**6):
    index = FaissIndex(vectors.shape[1], exact_up_to=exact_up_to)
    index.add(vectors)
    return index


def asked_of(n=ITEMS):
    rng = np.random.default_rng(4)
    masks = [None, rng.random(n) < 0.5, None, rng.random(n) < 0.2]
    return [Query(h, "", mask) for h, mask in zip(histories(0, 3, 8, 20), masks, strict=True)]


def test_a_state_that_searches_an_index_ranks_as_all_items_scored_do(lm):
    whole, searched = lm.scorer, lm.scorer_of(lm.model, graph)
    every = np.arange(ITEMS, dtype=np.int32)
    for query, wanted, hits, own, all_of in zip(
        asked_of(),
        whole.retrieve(asked_of(), 7),
        searched.retrieve(asked_of(), 7),
        searched.score(asked_of(), [every] * 4),
        whole.score(asked_of(), [every] * 4),
        strict=True,
    ):
        assert hits.items.tolist() == wanted.items.tolist()
        # Up to one constant of the query, in proposals and scores alike.
        assert np.ptp(hits.scores - wanted.scores) < 1e-3 and np.ptp(own - all_of) < 1e-3
        np.testing.assert_allclose(own[hits.items], hits.scores, atol=1e-3)
        assert query.mask is None or query.mask[hits.items].all()


def test_the_index_of_states_grows_with_the_catalogue(lm, vectors, monkeypatch):
    monkeypatch.setattr("llmrec.language_model.EXACT_UP_TO", 20)
    served = LanguageModel(lm.model, lm.config, lm.wish)
    served.scorer.retrieve(asked_of(), 5)
    changed = np.concatenate([vectors, vectors[:3] * -1])
    changed[4] = vectors[9]
    # Grown twice before anything is searched again; the index is the old one with some vectors beside it.
    grown = served.grown(Texts([], changed[:-1], None, None)).grown(Texts([], changed, None, None))
    grown.scorer.retrieve(asked_of(ITEMS + 3), 1)
    assert isinstance(grown.scorer._nearest.index, Aside)
    assert grown.scorer._nearest.index.index is served.scorer._nearest.index
    exact = grown.scorer_of(grown.model)
    queries = [Query(h) for h in histories(0, 3, 8, 20)]
    for hits, wanted in zip(
        grown.scorer.retrieve(queries, ITEMS + 3), exact.retrieve(queries, ITEMS + 3), strict=True
    ):
        assert np.ptp(hits.scores - wanted.scores) < 1e-3
        assert set(hits.items.tolist()) == set(range(ITEMS + 3))


def test_a_graph_finds_nearly_all_of_the_best_under_a_bias():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 32))
    vectors = (centres[rng.integers(0, 60, 6000)] + 0.5 * rng.normal(size=(6000, 32))).astype(np.float32)
    bias = np.log1p(rng.zipf(1.5, 6000).clip(max=5000)).astype(np.float32)
    states = (centres[:40] + 0.3 * rng.normal(size=(40, 32))).astype(np.float32)
    nearest = Nearest.of(vectors, bias, lambda v: graph(v, exact_up_to=0))
    exact = states @ vectors.T + bias
    found = nearest.search(states, 20, [None] * 40)
    shared = [
        np.isin(np.argsort(-row)[:20], hits.items).mean() for row, hits in zip(exact, found, strict=True)
    ]
    assert np.mean(shared) > 0.95
    np.testing.assert_allclose(found[0].scores, exact[0][found[0].items], rtol=1e-4)


def test_the_cache_of_states_is_bounded_and_can_be_dropped(lm):
    scorer = ItemTokenScorer(lm.model, 20, cached=3)
    first = scorer.log_probs(histories(1, 2, 3, 4, 5))
    assert len(scorer._states) == 3
    np.testing.assert_allclose(scorer.log_probs(histories(1, 2, 3, 4, 5)), first, atol=1e-5)
    scorer.forget()
    assert not scorer._states
    # One that is kept does not keep the batch that it was read in.
    scorer.log_probs(histories(*range(1, 9)))
    assert all(s.untyped_storage().nbytes() == s.nbytes for s in scorer._states.values())


def test_growing_draws_nothing(lm, vectors):
    state = torch.get_rng_state()
    lm.grown(Texts([], np.concatenate([vectors, vectors[:2]]), None, None))
    assert torch.equal(torch.get_rng_state(), state)


def test_histories_that_the_base_model_cannot_read_are_refused(base, vectors):
    with pytest.raises(ConfigError, match=r"the base model reads 512: lower lm\.window"):
        LanguageModel.new(config(base, window=510), base, vectors, np.ones(ITEMS))


def test_growing_keeps_the_scores_of_old_items_up_to_the_normaliser(lm, vectors):
    grown = lm.grown(Texts([], np.concatenate([vectors, vectors[:2]]), None, None))
    asked = histories(5)
    old, new = lm.scorer.log_probs(asked)[0], grown.scorer.log_probs(asked)[0]
    assert len(new) == ITEMS + 2
    assert np.isfinite(new).all()
    shift = new[:ITEMS] - old
    assert np.ptp(shift) < 1e-4
    # What was computed of the old items is taken over, but for those whose texts are others.
    changed = np.concatenate([vectors, vectors[:2]])
    changed[3] = vectors[9]
    other = lm.grown(Texts([], changed, None, None))
    other.scorer.log_probs(asked)
    outputs, fresh = other.scorer._outputs[0], other.model.item_outputs()
    torch.testing.assert_close(outputs, fresh)
    torch.testing.assert_close(outputs[:3], lm.model.item_outputs()[:3])
    assert not torch.allclose(outputs[3], lm.model.item_outputs()[3])
    # Items that came later have id vectors once they have events.
    counts = np.ones(ITEMS + 2)
    assert (
        len(other.recounted(counts).model.id_in.weight)
        == ITEMS + 2
        == len(other.model.head()["id_out.weight"])
    )


def test_asking_for_more_layers_than_there_are_is_an_error(base):
    with pytest.raises(ModelError, match="99 layers"):
        load_body(base, 99, torch.float32)


def test_windows_hold_every_event_once_and_in_order():
    rng = np.random.default_rng(3)
    long = np.arange(257, dtype=np.int32)
    for _ in range(20):
        pieces = windows([long, long[:3], long[:0]], 50, rng)
        assert max(map(len, pieces)) <= 50
        assert np.concatenate([p.items for p in pieces[:-1]]).tolist() == long.tolist()
        assert pieces[-1].items.tolist() == [0, 1, 2]


def test_the_bias_of_items_without_events_is_what_held_out_users_say(base, vectors):
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 9, ITEMS)
    counts[:6] = 0
    lm = LanguageModel.new(config(base), base, vectors, counts, seed=2)
    asked = histories(*rng.integers(0, 6, 60), seed=6)
    # Three in ten choose something new, of which there are six items in thirty that count least.
    targets = np.where(rng.random(60) < 0.3, rng.integers(0, 6, 60), rng.integers(6, ITEMS, 60))
    held_out = HeldOut([Query(h) for h in asked], targets.astype(np.int32))

    def cost(bias):
        lm.model.unseen.fill_(float(bias))
        lm.scorer.forget()
        found = lm.scorer.log_probs(asked)
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-4)
        return -found[np.arange(60), targets].astype(np.float64).sum() + bias**2 / (2 * UNSEEN_SPREAD**2)

    expected = minimize_scalar(cost, bounds=(-8, 8), method="bounded").x
    lm.model.unseen.zero_()
    lm.fit_unseen(held_out)
    assert float(lm.model.unseen) == pytest.approx(expected, abs=0.02) and expected > 0.5
    share = np.exp(lm.scorer.log_probs(asked))[:, :6].sum(axis=1).mean()
    assert share == pytest.approx((targets < 6).mean(), abs=0.03)

    # Who chose nothing new says that it is rare, and nobody says nothing.
    lm.fit_unseen(HeldOut(held_out.queries, np.full(60, 20, np.int32)))
    assert float(lm.model.unseen) < -1
    before = float(lm.model.unseen)
    lm.fit_unseen(HeldOut([], np.empty(0, np.int32)))
    assert float(lm.model.unseen) == before
    # What was fitted to many stays where few are asked.
    lm.fit_unseen(HeldOut(held_out.queries[:2], held_out.targets[6:8]))
    assert abs(float(lm.model.unseen) - before) < abs(before)


def test_the_bias_of_items_without_events_is_kept_with_the_model(base, vectors, tmp_path):
    index = FaissIndex(DIM)
    index.add(vectors)
    texts = Texts([f"thing {code}" for code in range(ITEMS)], vectors, Named(), index)
    log = TrainingLog([np.arange(start, start + 5, dtype=np.int32) for start in range(20)])
    held_out = HeldOut([Query(h) for h in log.histories], np.full(20, 28, np.int32))
    steps = TrainingConfig(minutes=None, steps=2, validations=1)
    where = {"data": "d", "folder": tmp_path / "run"}
    lm, _ = train_language_model(log, held_out, texts, base, config(base), steps, **where)
    lm.fit_unseen(held_out)
    assert float(lm.model.unseen) > 1
    lm.save(tmp_path / "adapter")
    again = load_language_model(tmp_path / "adapter", base, texts, "d")
    asked = histories(3, 0, seed=3)
    np.testing.assert_allclose(again.scorer.log_probs(asked), lm.scorer.log_probs(asked), atol=1e-4)
    # An item that comes after training is no item without events: it counts what those with events do,
    # also once it was saved and loaded.
    more = Texts([*texts.lines, "new"], np.concatenate([vectors, vectors[28:29]]), Named(), index)
    grown = again.grown(more)
    grown.save(tmp_path / "grown")
    loaded = load_language_model(tmp_path / "grown", base, more, "d")
    seen = np.log1p(lm.counts[lm.counts > 0].astype(np.float64)).mean()
    for model in (grown, loaded):
        found = model.scorer.log_probs(asked)
        np.testing.assert_allclose(found[:, ITEMS] - found[:, 28], seen - float(lm.model.unseen), atol=1e-4)
    # Once it could be chosen and was not, it is one, and what is fitted to held-out users is of it too; but
    # not as long as few events have come since.
    later = loaded.recounted(np.append(9 * lm.counts, 0))
    found = later.scorer.log_probs(asked)
    np.testing.assert_allclose(found[:, ITEMS], found[:, 28], atol=1e-4)
    few = 1.05 * lm.counts.astype(np.float64)
    found = loaded.recounted(np.append(few, 0)).scorer.log_probs(asked)
    seen = np.log1p(few[few > 0]).mean()
    np.testing.assert_allclose(found[:, ITEMS] - found[:, 28], seen - float(lm.model.unseen), atol=1e-4)


def test_items_that_are_held_out_count_as_those_that_are_added_later(base, vectors, tmp_path):
    counts = np.arange(ITEMS) % 7
    held = counts == 0
    lm = LanguageModel.new(config(base), base, vectors, counts, late=held)
    lm.card = make_card("item_tokens", base, "e", "d", {})
    found = lm.model.bias()
    np.testing.assert_allclose(found[~held], np.log1p(counts[~held]), atol=1e-5)
    np.testing.assert_allclose(found[held], np.log1p(counts[~held]).mean(), atol=1e-5)
    # What held-out users choose, all of it held out, says nothing of how often new items are chosen.
    lm.fit_unseen(HeldOut([Query(h) for h in histories(3, 4)], np.array([0, 7], np.int32)))
    assert float(lm.model.unseen) == 0
    lm.save(tmp_path)
    again = load_language_model(tmp_path, base, Texts([""] * ITEMS, vectors, Named(), None), "d")
    np.testing.assert_allclose(again.model.bias(), found, atol=1e-6)
