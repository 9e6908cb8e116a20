"""Fine-tuning the text encoder: which texts are pairs, and that it brings what belongs together closer."""

import numpy as np
import pytest

from llmrec.encode.sentence import SentenceEncoder
from llmrec.encoder_training import EncoderTrainingConfig, finetune_encoder, pairs_of
from llmrec.errors import DataError
from llmrec.testing import tiny_lm


def codes(*values):
    return np.array(values, dtype=np.int32)


LINES = [
    "red shoe",
    "green boat",
    "blue lamp",
    "old piano",
    "new tower",
    "tall river",
    "warm garden",
    "cold mirror",
]
# Even items belong together, and odd ones, whatever their words.
TOGETHER = [codes(*np.random.default_rng(u).permutation(4) * 2 + u % 2) for u in range(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("base")
    transformer = Transformer(str(tiny_lm(folder / "lm", layers=1, hidden=32)))
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")]).save(str(folder / "encoder"))
    return folder / "encoder"


def test_pairs_are_near_in_time_and_histories_are_read_latest_first():
    anchors, positives = pairs_of([codes(0, 1, 2), codes(3), codes(4, 4)], LINES, window=1, history=2)
    assert list(zip(anchors, positives, strict=True)) == [
        ("red shoe", "green boat"),
        ("green boat", "blue lamp"),
        ("green boat\nred shoe", "blue lamp"),
    ]
    wide, _ = pairs_of([codes(0, 1, 2)], LINES, window=5, history=0)
    assert wide == ["red shoe", "green boat", "red shoe"]


def closeness(folder):
    vectors = SentenceEncoder(folder).encode(LINES)
    cosine = vectors @ vectors.T
    same = (np.arange(8)[:, None] + np.arange(8)) % 2 == 0
    return cosine[same & ~np.eye(8, dtype=bool)].mean() - cosine[~same].mean()


@pytest.mark.parametrize("lora", [False, True])
def test_items_of_one_taste_come_closer_whatever_their_words(base, tmp_path, lora):
    config = EncoderTrainingConfig(minutes=None, steps=60, batch=16, learning_rate=5e-3, lora=lora, history=0)
    steps = []
    report = finetune_encoder(
        TOGETHER, LINES, base, tmp_path / "out", config, lambda step, done, loss: steps.append(done)
    )
    assert report.steps == 60 == len(steps) and steps[-1] == 1.0 and report.pairs > 100
    assert closeness(tmp_path / "out") > closeness(base) + 0.1
    assert not list(tmp_path.glob(".out*")), "no draft is left"
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_folder_that_holds_something_and_a_log_without_pairs_are_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DataError, match="there already"):
        finetune_encoder(TOGETHER, LINES, base, tmp_path / "out", EncoderTrainingConfig())
    with pytest.raises(DataError, match="no pairs"):
        finetune_encoder([codes(1)], LINES, base, tmp_path / "new", EncoderTrainingConfig())
