from __future__ import annotations

import re
import time
import unicodedata

import bm25s
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.text import neutralise, neutralise_series, without_markup
from llmrec.words import COMMON, sought_words, stem, telling_words, words_in

TOKENS = [
    *("<|im_start|>", "<|endoftext|>", "<|anything|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<mask>", "<extra_id_0>"),
    *("[CLS]", "[SEP]", "[MASK]", "[TOOL_CALLS]", "[gMASK]", "<｜end▁of▁sentence｜>", ">>TITLE<<"),
    *("＜|im_end|＞", "◁think▷", "|||EMAIL_ADDRESS|||"),
]

alphabet = st.sampled_from("<>[]|/‹›＜＞｜▁≮\u0338\u200b\u202e\ud800\x00\n\t \u00a0e\u0301ésINT_ab3-")
texts = st.one_of(
    st.text(alphabet, max_size=40),
    st.text(max_size=40),
    st.lists(st.sampled_from([*TOKENS, " ", "x", "\u200b", "<", ">", "|"]), max_size=6).map("".join),
)


def holds_a_token(text: str) -> bool:
    """Look as the most eager tokenizer would: after NFKC, without accents, any case."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower().replace("▁", " ")
    tokens = [unicodedata.normalize("NFKC", token).lower().replace("▁", " ") for token in TOKENS]
    return any(token in plain for token in tokens)


@settings(max_examples=400, deadline=None)
@given(texts, st.integers(0, 60))
def test_result_is_short_clean_free_of_tokens_and_a_fixed_point(text, limit):
    clean = neutralise(text, limit)
    assert len(clean) <= limit
    assert neutralise(clean, limit) == clean
    assert clean == " ".join(clean.split()) and unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in clean)
    assert not holds_a_token(clean)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("around", ["{}", "a{}b", "Heat {} (1995)", "<{}>", "[{}]", "<|{}|>"])
def test_special_tokens_are_defused_even_nested_or_split(token, around):
    assert not holds_a_token(neutralise(around.format(token), 200))
    assert not holds_a_token(neutralise("\u200b".join(around.format(token)), 200))
    assert not holds_a_token(neutralise(token[:1] + token + token[1:], 200))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("I <3 NY, 5 < 6 & A > B -> C", "I <3 NY, 5 < 6 & A > B -> C"),
        ("Batman [Limited Edition]", "Batman [Limited Edition]"),
        ("  two\n\nlines\u2028three\t ", "two lines three"),
        ("<s>Heat</s>", "‹s›Heat‹/s›"),
        ("[INST] hi [/INST]", "(INST) hi (/INST)"),
        ("Ame\u0301lie \u202eabc\u202c", "Amélie abc"),
        ("\ud83d lone", "lone"),
        ("名探偵コナン 👍", "名探偵コナン 👍"),
        ("\x00\x1b", ""),
    ],
)
def test_examples(text, clean):
    assert neutralise(text, 100) == clean


def test_cut_prefers_a_word_border_that_is_near():
    assert neutralise("one two three", 9) == "one two"
    assert neutralise("x" * 5000, 300) == "x" * 300
    assert neutralise("ab " + "x" * 500, 300) == "ab " + "x" * 297


def test_series_keeps_nulls_and_is_fast():
    series = pl.Series("t", ["Toy Story (1995)", "Amélie <s>", "Some Like It Hot, Vol. 2", None] * 25_000)
    start = time.perf_counter()
    clean = neutralise_series(series, 300)
    assert time.perf_counter() - start < 5  # a fifth of a second on an idle core
    assert clean[:4].to_list() == ["Toy Story (1995)", "Amélie <s>".replace("<s>", "‹s›"), series[2], None]


def test_long_hostile_text_takes_linear_time():
    start = time.perf_counter()
    for text in (
        "<" * 200_000,
        "[a" * 100_000,
        "|" * 200_000,
        "<|" * 100_000 + "|>" * 100_000,
        "\u200b" * 200_000,
    ):
        neutralise(text, 1000)
    for text in (
        "<b " + "=" * 200_000,
        "<br" + " " * 200_000,
        "<p =" * 50_000,
        "&amp;" * 40_000,
        "<!--" * 50_000,
    ):
        without_markup(text)
    assert time.perf_counter() - start < 5


def test_many_combining_marks_are_few_and_take_no_time():
    heap = "a" + "\u0301" * 200_000 + "\u0316" * 200_000
    begun = time.monotonic()
    cleaned = neutralise(heap, 1000)
    # Sorting all of them takes minutes.
    assert time.monotonic() - begun < 5 and len(cleaned) <= 30
    for mark in ("\u0344", "\u0f73", "\u0f81"):
        cleaned = neutralise("a" + mark * 100_000, 1000)
        assert len(cleaned) <= 31 and neutralise(cleaned, 1000) == cleaned
    assert time.monotonic() - begun < 10
    assert neutralise("e\u0301 \u0e19\u0e49\u0e33", 10) == "\u00e9 \u0e19\u0e49\u0e33"


# Words


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_words_of_plain_text_are_those_of_python(text):
    assert words_in(text) == re.findall(r"\w+", text.lower())


def test_words_that_tell_nothing_are_those_that_the_search_library_knows():
    assert set(bm25s.stopwords.STOPWORDS_EN) == COMMON
    assert telling_words(" ".join(sorted(COMMON)) + " the river") == ["river"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Crème brûlée, ÉCLAIR", ["creme", "brulee", "eclair"]),
        ("Cre\u0300me", ["creme"]),
        ("Ёлка и ёж", ["елка", "еж"]),
        ("हिन्दी किताब", ["हिन्दी", "किताब"]),
        ("ｉＰｈｏｎｅ １２", ["iphone", "12"]),
        ("iPhone 5 & women's C", ["iphone", "5", "women"]),
        ("책 한국어", ["책", "한국어"]),
        ("日本語ABC", ["日本", "本語", "日", "本", "語", "abc"]),
        ("ｶﾒﾗ", ["カメ", "メラ"]),
        ("猫", ["猫"]),
        ("LEGO™ Star№ 3½", ["lego", "star", "3"]),
        ("_ ... !?", []),
    ],
)
def test_words_of_many_scripts(text, words):
    assert telling_words(text) == words


@pytest.mark.parametrize(
    "pairs",
    [
        "movie movies, cookie cookies, battery batteries, toy toys, pie pies, house houses, size sizes",
        "box boxes, dress dresses, watch watches, brush brushes, glass glasses, shoe shoes, axe axes",
        "cd cds, tv tvs, dvd dvds, game games, puzzle puzzles, knife knifes, virus virus",
    ],
)
def test_a_singular_and_its_plural_are_one_word_of_a_search(pairs):
    for pair in pairs.split(", "):
        one, many = pair.split()
        assert sought_words(one.title()) == sought_words(many.upper()) == [stem(one)]


def test_other_words_stay_apart_in_a_search():
    apart = "gas ga bus bu glass glas tennis tenni lotus lotu sky ski pie pi tie toy car care bos box news"
    stems = [stem(word) for word in apart.split()]
    assert len(set(stems)) == len(stems)
    assert stem("kitapları") == "kitapları" and stem("猫") == "猫" and stem("") == ""


@given(st.text(max_size=40))
def test_what_is_a_word_is_typed_in_one_way(text):
    for word in words_in(text):
        assert word == word.lower() or not word.lower().islower()
        assert word in words_in(word)
    assert set(telling_words(text)) <= set(words_in(text))
