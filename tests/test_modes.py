"""The modes that read words as part of a recommender: learned from, chosen, served, saved, grown."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmrec import Event, Item, Recommender, Request
from llmrec.candidates import LM
from llmrec.config import Config
from llmrec.errors import ConfigError, ModelError
from llmrec.evaluation.split import tail
from llmrec.features import Features
from llmrec.mining import cut, first_parts, mined_choices
from llmrec.recipe import fit_retrievers, ranks_in
from llmrec.score.config import TrainingConfig
from llmrec.score.tasks import ListwiseTask
from llmrec.testing import tiny_lm, toy_data
from llmrec.training import LoRATrainer
from llmrec.word_model import WordLanguageModel

MODES = ("likelihood", "generate", "yes_no", "letters")
ITEMS, EVENTS = toy_data(users=80, items=30, seed=1)


def config(base, mode, **lm):
    return Config.of(
        {
            "encoder": {"name": "light"},
            "retrieval": {"search": False},
            "lm": {
                "mode": mode,
                "base": str(base),
                "rank": 4,
                "precision": "float32",
                "window": 8,
                "candidates": 6,
                "listed": 6,
                "beam": 5,
                "judged": 30,
                **lm,
            },
            "training": {
                "minutes": None,
                "steps": 12,
                "validations": 2,
                "learning_rate": 5e-3,
                "tokens_per_step": 600,
                "warmup_steps": 3,
            },
        }
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"), seed=2)


@pytest.fixture(scope="module", params=MODES)
def tuned(request, base):
    """A fine-tuned recommender whose language model has a weight, whatever the held-out events say."""
    rec = Recommender.fit(ITEMS, EVENTS, config(base, request.param))
    report = rec.finetune()
    state = rec._state
    recipe = replace(
        state.recipe,
        history=state.recipe.history.with_lm(0.8),
        query=state.recipe.query.with_lm(0.8),
    )
    rec._state = replace(state, recipe=recipe)
    return rec, report, request.param


def test_training_lowers_the_loss_and_says_what_the_model_brings(tuned):
    _, report, _ = tuned
    curve = report.training.curve
    assert report.training.steps == 12 and len(curve) == 2
    assert all(np.isfinite(row["nats"]) and 0 <= row["ndcg@10"] <= 1 for row in curve)
    assert report.weight >= 0 and np.isfinite(report.gain.difference)
    assert "validation NDCG@10" in str(report)


def test_only_the_first_candidates_and_its_own_are_scored(tuned):
    rec, _, mode = tuned
    pipeline = rec._state.pipeline()
    query = rec._ask(Request(user="u3"), rec._state).query
    asked = []

    class Watched:
        def score(self, queries, candidates):
            asked.extend(candidates)
            return pipeline.scorer.score(queries, candidates)

    found = replace(pipeline, scorer=Watched()).recommend([query], 20)[0]
    plain = pipeline.retrieve([query], [pipeline.weights_for(query).with_lm(0.0)])[0]
    first = set(plain.items[:6].tolist())
    if mode == "generate":
        own = pipeline.retrievers[LM].retrieve([query], 6)[0].items
        assert set(asked[0].tolist()) == first | set(own.tolist())
    else:
        assert LM not in pipeline.retrievers
        assert set(asked[0].tolist()) == first
    lm = found.parts[:, found.names.index(LM)]
    assert lm.max() > 0
    assert not lm[~np.isin(found.items, asked[0])].any()


def test_saved_and_loaded_it_answers_the_same_and_grows_with_the_catalogue(tuned, tmp_path):
    rec, _, mode = tuned
    rec.save(tmp_path / "model")
    again = Recommender.load(tmp_path / "model")
    for user in ("u0", "u7"):
        for words in (None, "golden anchor"):
            mine, theirs = (r.recommend(user=user, query=words, k=8) for r in (rec, again))
            assert [(m.item.item_id, m.score) for m in mine] == [
                (t.item.item_id, pytest.approx(t.score, abs=1e-5)) for t in theirs
            ]
    # An item of the same words as a known one is scored as that one is.
    again.add_items([Item("new", ITEMS[4].title, attributes=ITEMS[4].attributes)])
    state = again._state
    query = again._ask(Request(user="u0"), state).query
    known, new = state.catalog.code("i4"), state.catalog.code("new")
    if mode in ("yes_no",):
        scores = state.lm.scorer.score([query], [np.array([known, new], np.int32)])[0]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert len(again.recommend(user="u0", k=5)) == 5
    assert len(again.rank(["new", "i4", "i5"], user="u0")) == 3


def test_an_item_that_is_not_in_the_catalogue_is_ranked_as_if_it_were(tuned, tmp_path):
    rec, _, mode = tuned
    rec.save(tmp_path / "model")
    added = Recommender.load(tmp_path / "model")
    new = Item("unlisted", "Golden Harbour Anchor", attributes=ITEMS[4].attributes)
    other = Item("i5", "Silent Piano")  # stands in for the one of the catalogue
    asked = dict(user="u0", query="golden anchor")
    lines = list(rec.catalog.lines())
    mine = rec.rank([new, "i4", other, "i7"], **asked)
    assert rec.catalog.lines() == lines and "unlisted" not in rec.catalog
    added.add_items([new, other])
    if mode in ("likelihood", "generate"):
        assert not any(source.name == LM for one in mine for source in one.sources)
        added._state = replace(added._state, lm=None)
        added._adapter = None
    else:
        assert any(source.name == LM for one in mine for source in one.sources)
    theirs = added.rank(["unlisted", "i4", "i5", "i7"], **asked)
    assert [(m.item, m.score) for m in mine] == [(t.item, pytest.approx(t.score, abs=1e-5)) for t in theirs]


def test_what_was_read_of_a_history_is_dropped_by_forget(tuned):
    rec, _, _ = tuned
    rec.recommend(user="u9", k=3)
    reader = rec._state.lm.scorer.reader
    assert reader._kept and reader._size > 0
    rec.forget("u9")
    assert not reader._kept and reader._size == 0


def test_features_of_the_search_are_what_is_served(tuned):
    rec, _, mode = tuned
    state = rec._state
    _, part = tail(rec._log())
    held_out = part.sample(20, 0).held_out(state.catalog.active, True)
    weights = state.recipe.history
    pipeline = replace(state.pipeline(), history=weights)
    used = [n for n in state.retrievers if weights.ever_uses(n)]
    hits = {n: state.retrievers[n].retrieve(held_out.queries, state.depth) for n in used}
    proposed = pipeline.retrievers[LM].retrieve(held_out.queries, state.depth) if mode == "generate" else None
    features = Features.with_lm(hits, proposed, state.lm.scorer, held_out, weights, state.lm.scored)
    served = ranks_in((c.items for c in pipeline.recommend(held_out.queries, 30)), held_out.targets)
    np.testing.assert_array_equal(features.of_targets(weights), served)


def test_mined_candidates_come_from_retrievers_that_have_not_seen_the_event(base):
    rec = Recommender.fit(ITEMS, EVENTS, config(base, "yes_no"))
    state, (log, _) = rec._state, tail(rec._log())
    first = first_parts(log)
    for whole, part in zip(log.histories, first.histories, strict=True):
        assert len(part) == cut(len(whole)) and whole[: len(part)].tolist() == part.tolist()
        assert 1 <= len(part) < len(whole) or len(whole) < 2
    choices = mined_choices(state, log, listed=6, limit=50, seed=0)
    assert len(choices) == 50
    pipeline = replace(state, retrievers=fit_retrievers(first, state.texts, state.recipe)).pipeline()
    for choice in choices:
        target = choice.candidates[choice.truth]
        assert len(set(choice.candidates.tolist())) == len(choice.candidates) == 6
        histories = [h for h in log.histories if _begins(h, [*choice.query.history, target])]
        assert any(len(choice.query.history) >= cut(len(h)) for h in histories)
        mask = state.catalog.active.copy()
        mask[choice.query.history] = False
        # As in serving: what was proposed, in that order, and nothing put in among it.
        found = pipeline.recommend([replace(choice.query, mask=mask)], 6)[0].items
        assert found.tolist() == choice.candidates.tolist()
    later = sum(len(h) - cut(len(h)) for h in log.histories)
    assert 50 < len(mined_choices(state, log, listed=6, limit=10**6, seed=0)) < later
    assert mined_choices(state, log, 6, 50, 0)[7].candidates.tolist() == choices[7].candidates.tolist()


def test_mined_choices_with_wishes_are_among_what_is_found_for_the_words(base):
    rec = Recommender.fit(ITEMS, EVENTS, config(base, "yes_no"))
    state, (log, _) = rec._state, tail(rec._log())
    choices = mined_choices(state, log, 6, 60, 0, wishes=0.5)
    typed = [choice for choice in choices if choice.query.text]
    assert 15 < len(typed) < len(choices) - 10
    pipeline = replace(
        state, retrievers=fit_retrievers(first_parts(log), state.texts, state.recipe)
    ).pipeline()
    for choice in typed[:10]:
        target = int(choice.candidates[choice.truth])
        assert set(choice.query.text.split()) <= set(re.findall(r"\w+", state.texts.lines[target]))
        mask = np.ones(len(state.catalog), np.bool_)
        mask[choice.query.history] = state.repeats
        found = pipeline.recommend([replace(choice.query, mask=mask)], 6)[0]
        assert found.items.tolist() == choice.candidates.tolist()
    assert not any(choice.query.text for choice in mined_choices(state, log, 6, 60, 0))


def _begins(history, start):
    return history[: len(start)].tolist() == [int(code) for code in start]


def test_a_label_model_learns_which_of_hard_candidates_came_next(base, tmp_path):
    """The planted rule, item i + 1 after item i, is learned from the words of the last item alone."""
    settings = config(base, "yes_no", window=1)
    rec = Recommender.fit(ITEMS, EVENTS, settings)
    log, _ = tail(rec._log())
    lm = WordLanguageModel.new(settings.lm, base, rec._state.texts.lines, log.counts(len(ITEMS)))
    with torch.no_grad():
        # A random model says about the same to everything; this brings its answers apart.
        lm.words.scale.fill_(20.0)
    training = TrainingConfig(
        minutes=None, steps=400, learning_rate=3e-3, tokens_per_step=1500, warmup_steps=3
    )
    task = ListwiseTask(lm.scorer, mined_choices(rec._state, log, 6, 2000, 0), training)
    losses = []
    LoRATrainer(task, training, tmp_path, "run").run(None, lambda p, done: losses.append(p.loss))
    assert losses[-1] < 0.95 * np.log(6)


@pytest.mark.parametrize("section", ["yes_no", None, ["yes_no"], {"mode": 3}])
def test_a_section_that_is_no_description_of_a_model_is_an_error_that_says_so(section):
    with pytest.raises(ConfigError, match="lm: mode must be one of"):
        Config.of({"lm": section})


def test_modes_and_their_settings_are_checked(base, tmp_path):
    with pytest.raises(ConfigError, match=r"lm: mode must be one of item_tokens, likelihood"):
        Config.of({"lm": {"mode": "poetry"}})
    with pytest.raises(ConfigError, match=r"  lm\.head_dim"):
        Config.of({"lm": {"mode": "letters", "head_dim": 3}})
    with pytest.raises(ConfigError, match=r"  lm\.listed"):
        Config.of({"lm": {"mode": "letters", "listed": 27}})
    assert Config.of({"lm": {"rank": 3}}).lm.mode == "item_tokens"


def test_a_damaged_card_is_a_clear_error(tuned, tmp_path):
    rec, _, _ = tuned
    rec.save(tmp_path / "model")
    card = next((tmp_path / "model").glob("*/adapter/card.json"))
    card.write_text(card.read_text().replace('"mode"', '"mood"'))
    with pytest.raises(ModelError, match="no complete adapter"):
        Recommender.load(tmp_path / "model").stages(user="u0")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "head.safetensors"])
def test_a_part_that_is_cut_or_gone_is_a_clear_error(tuned, tmp_path, name):
    rec, _, _ = tuned
    for number in (0, 1):
        rec.save(tmp_path / str(number))
        part = next((tmp_path / str(number)).glob(f"*/adapter/{name}"))
        whole = part.read_bytes()
        part.unlink()
        if number:
            part.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match="no complete adapter"):
            Recommender.load(tmp_path / str(number)).stages(user="u0")


def test_stages_and_evaluation_show_its_order_of_the_first_candidates(tuned):
    rec, _, mode = tuned
    stages = rec.stages(user="u2", k=6)
    query = rec._ask(Request(user="u2"), rec._state).query
    ids = [one.item_id for one in stages["language model"]]
    codes = rec._state.catalog.codes(ids)
    scores = rec._state.lm.scorer.score([query], [codes])[0]
    assert (np.diff(scores) <= 1e-5).all() or mode in ("letters", "generate")
    if mode != "generate":
        assert set(ids) == {one.item_id for one in stages["retrieval"]}

    seen = {(e.user_id, e.item_id) for e in EVENTS}
    later = [
        Event(f"u{n}", next(i.item_id for i in ITEMS if (f"u{n}", i.item_id) not in seen), 2_000_000_000)
        for n in range(30)
    ]
    found = rec.evaluate(later)
    assert {"merge", "default", "lm_top6"} <= set(found.ranks) and ("lm" in found.ranks) == (
        mode == "generate"
    )
    assert {("default", "merge"), ("lm_top6", "merge")} <= {(c.a, c.b) for c in found.comparisons}
    held = found.ranks["lm_top6"] > 0
    np.testing.assert_array_equal(held, (found.ranks["merge"] > 0) & (found.ranks["merge"] <= 6))
