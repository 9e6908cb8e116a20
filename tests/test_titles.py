"""Titles as they are typed, against a plain definition in Python."""

import unicodedata

import numpy as np
import pytest

from llmrec import Item, Recommender
from llmrec.catalog import Catalog
from llmrec.errors import RequestError
from llmrec.testing import toy_data
from llmrec.titles import TitleIndex

TITLES = [
    "Amélie",
    "The Amelia Affair",
    "Alien",
    "Aliens",
    "Alien³: Assembly Cut",
    "WALL·E",
    "Se7en",
    "千と千尋",
    "1984",
]


@pytest.fixture(scope="module")
def index():
    catalog = Catalog.load([Item(f"f{n}", title) for n, title in enumerate(TITLES)])
    return TitleIndex(catalog, np.linspace(0.1, 0.9, len(TITLES)).astype(np.float32))


def found(index, text, k=20):
    return [TITLES[code] for code in index.find(text, k)]


def plain(text):
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()
    return "".join(c if c.isalnum() else " " for c in letters).split()


@pytest.mark.parametrize(
    "text", ["a", "al", "ALIEN", "alien c", "cut ali", "amel", "améli", "e", "the", "wall e", "198"]
)
def test_every_word_typed_begins_a_word_of_the_title(index, text):
    words = plain(text)
    expected = {t for t in TITLES if all(any(w.startswith(word) for w in plain(t)) for word in words)}
    inside = {t for t in TITLES if " ".join(words) in " ".join(plain(t))}
    shown = found(index, text)
    assert set(shown) == expected | inside and len(set(shown)) == len(shown)
    # Those in which the words begin come before those that hold them inside a word.
    assert set(shown[: len(expected)]) == expected


def test_titles_that_begin_with_it_come_first_then_the_popular(index):
    assert found(index, "alien") == ["Alien³: Assembly Cut", "Aliens", "Alien"]
    assert found(index, "amel") == ["Amélie", "The Amelia Affair"]
    assert found(index, "") == TITLES[::-1] and found(index, "?! ") == TITLES[::-1]
    assert found(index, "", 2) == TITLES[:-3:-1]
    assert found(index, "千尋") == ["千と千尋"]
    assert found(index, "zebra") == [] and found(index, "x" * 10_000) == []
    for hostile in ("(", "[a", "\\", ".*", "<img src=x onerror=alert(1)>", "\x00", "%", "$^", "\ud800"):
        index.find(hostile, 3)


def test_an_id_finds_its_item_and_a_catalogue_that_changes_is_followed():
    rec = Recommender.fit(*toy_data(), {"encoder": {"name": "light", "dim": 16}})
    assert [item.item_id for item in rec.complete("i7", 3)][:1] == ["i7"]
    assert rec.complete("zeppelin") == []
    with pytest.raises(RequestError, match="at least 1"):
        rec.complete("a", 0)
    rec.add_items([Item("z", "Zeppelin Waltz", attributes={"year": 1999})])
    (item,) = rec.complete("wal zep")
    assert item.item_id == "z" and item.attributes == {"year": 1999}
    rec.remove_items(["z"])
    assert rec.complete("zeppelin") == []
