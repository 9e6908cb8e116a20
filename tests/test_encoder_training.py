"""Fine-tuning the text encoder: which texts are pairs, and that it brings what belongs together closer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llmrec.encode.config import EncoderTrainingConfig
from llmrec.encode.sentence import SentenceEncoder
from llmrec.encoder_training import CARD, encoder_checked, finetune_encoder, pairs_of
from llmrec.errors import DataError
from llmrec.testing import tiny_lm


def codes(*values):
    return np.array(values, dtype=np.int32)


COLOURS, THINGS = (
    ("red", "green", "blue"),
    ("shoe", "boat", "lamp", "piano", "tower", "river", "garden", "pan"),
)
LINES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
# Even items belong together, and odd ones, whatever their words.
TOGETHER = [codes(*np.random.default_rng(u).permutation(12)[:5] * 2 + u % 2) for u in range(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("base")
    transformer = Transformer(str(tiny_lm(folder / "lm", layers=1, hidden=32)))
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")]).save(str(folder / "encoder"))
    return folder / "encoder"


def test_pairs_are_near_in_time_and_histories_are_read_latest_first():
    pairs = pairs_of([codes(0, 1, 2), codes(3), codes(4, 4)], LINES, 1, 2, most=99, seed=0)
    assert sorted(pairs) == [
        ("red boat", "red lamp"),
        ("red boat\nred shoe", "red lamp"),
        ("red shoe", "red boat"),
    ]
    wide = pairs_of([codes(0, 1, 2)], LINES, 5, 0, most=99, seed=0)
    assert sorted(a for a, _ in wide) == ["red boat", "red shoe", "red shoe"]
    assert len(pairs_of(TOGETHER, LINES, 3, 0, most=7, seed=0)) == 7


def closeness(folder):
    vectors = SentenceEncoder(folder).encode(LINES)
    cosine = vectors @ vectors.T
    n = len(LINES)
    same = (np.arange(n)[:, None] + np.arange(n)) % 2 == 0
    return cosine[same & ~np.eye(n, dtype=bool)].mean() - cosine[~same].mean()


def test_another_way_to_pool_or_to_cut_up_texts_is_another_encoder(base, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / ".cache").mkdir()
    (copy / ".cache" / "when.json").write_text("{}")
    assert SentenceEncoder(copy).fingerprint == SentenceEncoder(base).fingerprint
    (pooling,) = copy.glob("1_Pooling/config.json")
    told = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**told, "pooling_mode": "cls"}))
    assert SentenceEncoder(copy).fingerprint != SentenceEncoder(base).fingerprint


@pytest.mark.parametrize("lora", [False, True])
def test_items_of_one_taste_come_closer_whatever_their_words(base, tmp_path, lora):
    config = EncoderTrainingConfig(minutes=None, steps=60, batch=16, learning_rate=5e-3, lora=lora, history=0)
    steps = []
    report = finetune_encoder(
        TOGETHER, LINES, base, tmp_path / "out", config, lambda step, done, loss: steps.append(done)
    )
    assert report.steps == 60 == len(steps) and steps[-1] == 1.0 and report.pairs > 100
    assert closeness(tmp_path / "out") > closeness(base) + 0.1
    one, two = (SentenceTransformer(str(f)).max_seq_length for f in (base, tmp_path / "out"))
    assert one == two
    assert not list(tmp_path.glob(".out*")), "no draft is left"
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_tuned_encoder_says_what_it_was_tuned_on(base, tmp_path):
    config = EncoderTrainingConfig(steps=1, batch=4)
    assert config.minutes is None and EncoderTrainingConfig().minutes == 10
    finetune_encoder(TOGETHER, LINES, base, tmp_path / "out", config)
    known = str(tmp_path / "out")
    assert encoder_checked(known, TOGETHER, LINES) is True
    assert encoder_checked(known, TOGETHER[:-1], LINES) is False
    assert encoder_checked(known, [TOGETHER[0][:-1], *TOGETHER[1:]], LINES) is False
    assert encoder_checked(known, TOGETHER, LINES[::-1]) is False
    assert encoder_checked(str(base), TOGETHER, LINES) is False
    assert encoder_checked("light", TOGETHER, LINES) is None
    (tmp_path / "out" / CARD).write_text("{")
    assert encoder_checked(known, TOGETHER, LINES) is False


def test_a_folder_that_holds_something_and_a_log_without_pairs_are_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DataError, match="there already"):
        finetune_encoder(TOGETHER, LINES, base, tmp_path / "out", EncoderTrainingConfig())
    with pytest.raises(DataError, match="no pairs"):
        finetune_encoder([codes(1)], LINES, base, tmp_path / "new", EncoderTrainingConfig())
