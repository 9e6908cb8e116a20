"""What counts as a word of a text, for lexical search, the light encoder, topics and reasons.

Letters keep the marks that belong to them, without which no word of Hindi or Thai is whole. Accents of Latin,
Greek and Cyrillic letters do not count, since people type without them.
Scripts that are written without spaces are read in pairs of neighbouring characters, and Chinese characters
one by one too, so that the words of a query are found inside longer runs.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUNS = regex.compile(rf"(?V1)([{_UNSPACED}]+)|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]+")
_PLAIN = re.compile(r"\w+", re.ASCII)
_HAN = regex.compile(r"\p{Han}")
_ACCENTS = regex.compile(r"[\u0300-\u036f]+")
# Of these the letters and digits that they stand for are part of no word: LEGO™, 3½, №.
_SIGNS = regex.compile(r"[\p{S}\p{No}]+")

_SIBILANT = ("sses", "ches", "shes", "xes")
"""Ends of plurals that have an e more than their singular."""

VERSION = 1
"""Raised when a text gets other words: encoders that count words are fitted again."""

# fmt: off
COMMON = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no",
    "not", "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this",
    "to", "was", "will", "with",
))
# fmt: on
"""Words of English that say nothing about an item."""


def folded(text: str) -> str:
    """In lower case, without accents and signs; letters and digits of full or half width are usual ones."""
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", _SIGNS.sub(" ", text)))
    return unicodedata.normalize("NFC", bare).lower()


def words_in(text: str) -> list[str]:
    """Split a text into words, folded, in their order; common ones too."""
    if text.isascii():
        return _PLAIN.findall(text.lower())
    words = []
    for run in _RUNS.finditer(folded(text)):
        if run[1] is None:
            words.append(run[0])
        else:
            words += _parts(run[0])
    return words


def telling_words(text: str) -> list[str]:
    """Those that are not common; single letters tell nothing, single digits and syllables do."""
    return [word for word in words_in(text) if (len(word) > 1 or _tells(word)) and word not in COMMON]


def sought_words(text: str) -> list[str]:
    """Those that are not common, as lexical search compares them: "Cookies" is "cookie" there."""
    return [stem(word) for word in telling_words(text)]


def stem(word: str) -> str:
    """A word such that an English singular and its plural are alike, after Harman (1991) and Porter (1980).

    What comes out need be no word: "battery" and "batteries" are "batteri". Words of other languages that end
    in s lose it on both sides of a comparison, which joins hardly any two that differ.
    """
    if len(word) < 4:
        # CDs and TVs, not gas.
        return word[:-1] if len(word) == 3 and word[2] == "s" and word[1] not in "aeious" else word
    if len(word) > 4 and word.endswith(_SIBILANT):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 4 and word.endswith("ie"):
        return word[:-1]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "i"
    return word


def _tells(character: str) -> bool:
    """Whether a word of one character is a digit, or of a script without capitals."""
    return character.isalnum() and character.upper() == character


def _parts(run: str) -> list[str]:
    """Pairs of neighbours, and each Chinese character; a run of one character is a word."""
    if len(run) == 1:
        return [run]
    singles = [c for c in run if _HAN.match(c)]
    return [run[i : i + 2] for i in range(len(run) - 1)] + singles
