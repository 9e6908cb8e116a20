"""Items that are added after training: what is taken out, what is asked, and how it is counted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from programs import program, write_data

from llmrec.config import Config
from llmrec.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def added():
    return program("eval/added_items")


@pytest.fixture(scope="module")
def prepared(added, folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(added, "HERE", tmp_path_factory.mktemp("at") / "eval")
        return added.prepare(folder, Config.of(folder / "c.toml"), 0.4, 40, 0)


def test_the_first_model_learns_nothing_of_the_items_that_are_added(prepared, folder):
    before, after, known = prepared.before, prepared.after, prepared.known
    first, grown = before.state.catalog, after.state.catalog
    assert len(first) == known == len(grown) - round(0.4 * len(grown))
    assert grown.ids[:known] == first.ids and before.state.texts.lines == grown.lines()[:known]
    # Its text encoder, which is fitted to a catalogue, knows the added items only once they are there.
    assert prepared.texts.encoder is before.state.texts.encoder
    np.testing.assert_array_equal(prepared.texts.vectors[:known], before.state.texts.vectors)
    assert len(prepared.texts.lines) == len(grown) > known
    assert before.state.texts.encoder.fingerprint != after.state.texts.encoder.fingerprint
    assert max(max(h, default=0) for h in before.log.histories) < known <= max(map(max, after.log.histories))
    assert before.judging.targets.max() < known
    assert all(query.history.max(initial=0) < known for query in before.judging.queries)
    # What is left of a history is in its order.
    for short, whole in zip(before.log.histories, after.log.histories, strict=True):
        assert short.tolist() == [item for item in whole.tolist() if item < known]


def test_lists_hold_the_target_and_unseen_items_of_either_kind(prepared, added):
    for query, target, items in zip(
        prepared.asked.queries, prepared.asked.targets, prepared.lists, strict=True
    ):
        assert target in items and len(set(items.tolist())) == len(items)
        assert not set(items.tolist()) & set(query.history.tolist())
        assert (items >= prepared.known).sum() == added.LISTED == (items < prepared.known).sum()


def test_a_model_that_prefers_added_items_is_told_from_one_that_does_not(prepared, added):
    def model(score):
        scorer = SimpleNamespace(score=lambda queries, lists: [score(items) for items in lists])
        return added.measured(prepared, SimpleNamespace(scorer=scorer))

    known = prepared.known
    ahead = model(lambda items: (items >= known).astype(np.float32))
    behind = model(lambda items: (items < known).astype(np.float32))
    same = model(lambda items: np.zeros(len(items), np.float32))
    assert (ahead.ahead == 1).all() and (behind.ahead == 0).all() and (same.ahead == 0.5).all()
    found, (difference, *_) = added.compared(prepared, "some", behind, ahead)
    assert difference.metric == "ahead" and difference.difference == -1 and difference.shown
    assert found["grown"]["ndcg@10 of another"] > found["retrained"]["ndcg@10 of another"]


def test_the_program_writes_both_models_of_each_mode(folder, added, tmp_path, monkeypatch):
    monkeypatch.setattr(added, "HERE", tmp_path / "eval")
    given = ["--data", str(folder), "--config", str(folder / "c.toml"), "--out", str(tmp_path)]
    sizes = ["--share", "0.4", "--users", "20", "--events", "600", "--words", "3600"]
    added.main([*given, *sizes, "--modes", "likelihood"])
    added.main([*given, *sizes, "--modes", "item_tokens"])
    (path,) = tmp_path.glob("*-added-items.json")
    result = json.loads(path.read_text())
    for mode in ("item_tokens", "likelihood"):
        own = result["modes"][mode]
        for side in ("grown", "retrained"):
            assert 0 <= own[side]["ahead"] <= 1 and 0 <= own[side]["first ten"] <= 1
    # The mode that was there is kept, and all differences are corrected together.
    assert len(result["comparisons"]) == 6 and all(c["p_holm"] >= c["p"] for c in result["comparisons"])
    rows = program("eval/tables_trials").added_items("toy", result).splitlines()
    own = result["modes"]["likelihood"]["grown"]
    assert any(row.startswith(f"| likelihood | {own['ahead']:.3f} |") for row in rows)
    with pytest.raises(DataError, match="nothing to compare"):
        added.prepare(folder, Config.of(folder / "c.toml"), 0.001, 2, 0)
