from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from llmrec.encode.light import LightEncoder
from llmrec.errors import DataError

TEXTS = [
    "Red shoes for running",
    "Blue shoes for running on wet roads",
    "A novel about running a kitchen",
    "Kitchen knife of blue steel",
    "Steel pan for the kitchen",
    "Café table, round, of steel",
    "",
]


def test_vectors_have_unit_length_and_none_where_there_is_no_known_word():
    encoder = LightEncoder.fit(TEXTS, dim=4)
    vectors = encoder.encode([*TEXTS, "cafe", "zzz qqq", "...", " "])
    assert vectors.dtype == np.float32 and vectors.shape == (11, encoder.dim) and encoder.dim == 4
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths[[0, 1, 2, 3, 4, 5, 7]], 1, atol=1e-6)
    assert not vectors[[6, 8, 9, 10]].any()
    assert encoder.encode([]).shape == (0, 4)


def test_with_enough_dimensions_the_cosine_is_that_of_plain_tf_idf():
    encoder = LightEncoder.fit(TEXTS, dim=128)
    assert encoder.dim <= len(TEXTS)
    plain = TfidfVectorizer(
        token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True, strip_accents="unicode"
    )
    expected = plain.fit_transform(TEXTS).toarray()
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_a_text_that_the_components_leave_out_has_no_direction():
    texts = ["apple tart", "apple tart", "banana", "banana", "cherry"]
    encoder = LightEncoder.fit(texts, dim=2)
    vectors = encoder.encode(texts)
    assert not vectors[4].any(), "rounding errors must not become a unit vector"
    assert vectors[0] @ vectors[2] == pytest.approx(0, abs=1e-5) and vectors[0] @ vectors[1] == pytest.approx(
        1
    )


def test_the_arrays_make_the_same_encoder_bit_for_bit():
    encoder = LightEncoder.fit(TEXTS, dim=4)
    arrays = encoder.arrays()
    assert all(array.dtype != object for array in arrays.values())
    again = LightEncoder.from_arrays({name: array.copy() for name, array in arrays.items()})
    texts = [*TEXTS, "blue running knife", "unheard"]
    np.testing.assert_array_equal(encoder.encode(texts), again.encode(texts))
    assert again.fingerprint == encoder.fingerprint and again.dim == encoder.dim


def test_fitting_again_gives_the_same_vectors_and_other_texts_another_fingerprint():
    one, two = LightEncoder.fit(TEXTS, dim=4), LightEncoder.fit(list(TEXTS), dim=4)
    np.testing.assert_array_equal(one.encode(TEXTS), two.encode(TEXTS))
    assert one.fingerprint == two.fingerprint
    assert LightEncoder.fit(TEXTS[:5], dim=4).fingerprint != one.fingerprint
    assert LightEncoder.fit(TEXTS, dim=3).fingerprint != one.fingerprint


def test_a_text_is_encoded_the_same_alone_as_among_others():
    encoder = LightEncoder.fit(TEXTS, dim=4)
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode([text])[0], together[row], atol=1e-6)


@pytest.mark.parametrize("texts", [["word"], ["a red shoe"], ["word", "word"], ["one", "two"], ["", "x1"]])
def test_the_smallest_catalogues_can_be_encoded(texts):
    encoder = LightEncoder.fit(texts, dim=128)
    vectors = encoder.encode(texts)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1 if text else 0, abs=1e-6)
    assert vectors[0] @ vectors[-1] == pytest.approx(float(texts[0] == texts[-1]), abs=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["", "  "], ["...", "!?"]])
def test_texts_without_words_are_an_error_that_says_how_many_there_were(texts):
    with pytest.raises(DataError, match=rf"hold no words to encode \({len(texts)} texts\)"):
        LightEncoder.fit(texts)
