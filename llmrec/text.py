"""Text clean-up: what a user typed into a title must not reach a model as anything but words."""

from __future__ import annotations

import functools
import html
import operator
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import polars as pl

# Characters that have no width or steer the direction of text (Unicode Default_Ignorable_Code_Point,
# bidi and interlinear controls), the controls that are not white space, and lone surrogates. They can
# split a token so that a filter misses it, hide text from a reader, or crash an encoder.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# SentencePiece writes a space as U+2581, so the two must be one character here as well.
_SPACE = re.compile("[\\s\u2581]+")
_ASCII_DIRTY = re.compile(r"[\x00-\x1f\x7f<>\[|]|  |^ | $")

# Special tokens stand in brackets of one kind. The width and compatibility forms are here because many
# tokenizers normalise (NFKC, or NFD without accents) before they look for special tokens.
_ANGLE_OPEN, _ANGLE_CLOSE = "<＜﹤≮◁", ">＞﹥≯▷"
_SQUARE_OPEN, _SQUARE_CLOSE = "[［﹇", "]］﹈"
_OPEN = re.compile(f"[{re.escape(_ANGLE_OPEN + _SQUARE_OPEN)}]")
_ANGLE_PIPE = re.compile(f"[{_ANGLE_OPEN}](?=[|｜])")
_PIPES = re.compile(r"\|{3,}")
_ANGLES = str.maketrans(_ANGLE_OPEN + _ANGLE_CLOSE, "‹" * len(_ANGLE_OPEN) + "›" * len(_ANGLE_CLOSE))
_SQUARES = str.maketrans(_SQUARE_OPEN + _SQUARE_CLOSE, "(" * len(_SQUARE_OPEN) + ")" * len(_SQUARE_CLOSE))

_MARKS = 30
"""Combining marks in a row that are kept. Sorting them takes time that grows with the square."""

_NEAR = 40
"""How many characters before the limit a word border may lie to be preferred."""


def neutralise(text: str, limit: int) -> str:
    """Make untrusted text safe to put into a prompt: plain words on one line, no special tokens.

    Control, bidi, zero-width characters and lone surrogates go, white space becomes single spaces, the
    rest is NFC, with at most 30 combining marks in a row. A word that holds an opening and a closing bracket
    of a kind that special tokens use (``<s>``, ``<|im_start|>``, ``[INST]``) gets other brackets (``‹s›``,
    ``(INST)``); ``I <3 it``, ``A > B`` and ``[two words]`` stay.

    Parameters
    ----------
    text
        Anything.
    limit
        Longest result in characters. The cut is at a word border if one is near.

    Returns
    -------
    str
        Of at most `limit` characters. ``neutralise(neutralise(x, n), n) == neutralise(x, n)``.
    """
    if not text.isascii():
        # Some marks are two once they are taken apart.
        text = _many_marks().sub(r"\1", _INVISIBLE.sub("", text))
        text = _many_marks().sub(r"\1", unicodedata.normalize("NFC", text))
        text = _defuse(_SPACE.sub(" ", text).strip(" "))
    elif _ASCII_DIRTY.search(text):
        text = _defuse(_SPACE.sub(" ", _INVISIBLE.sub("", text)).strip(" "))
    return shorten(text, limit)


# The tags that descriptions are written with; a tag that a tokenizer may know, such as <s>, is none of them.
_INLINE = "a|abbr|b|big|code|em|font|i|mark|small|span|strong|sub|sup|u"
_BLOCK = (
    "article|blockquote|br|center|dd|div|dl|dt|figure|footer|h[1-6]|header|hr|img|li|ol|p|pre|section|"
    "table|tbody|td|tfoot|th|thead|tr|ul"
)
# With attributes or without: "a <b and c>" is none.
_TAG_END = r"(?:\s*/?|\s[^<>=]*=[^<>]*)>"
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE}){_TAG_END}", re.IGNORECASE)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK}){_TAG_END}", re.IGNORECASE)
# Shops encode twice, too.
_ENTITY = re.compile(r"&(?:amp;)*(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")

_MARKUP_READ = 20_000
"""Characters of a text with markup that are read; more are cut off anyway."""

_PASSES = 10
"""How often tags may come out of entities, and entities out of tags."""


def without_markup(text: str) -> str:
    """The words of a text that may be HTML: known tags and comments go, entities become their characters.

    ``I <3 it``, ``<s>`` and what else is no tag of a description stays.
    """
    if "<" not in text and "&" not in text:
        return text
    text = text[:_MARKUP_READ]
    for _ in range(_PASSES):
        plain = _BLOCK_TAG.sub(" ", _INLINE_TAG.sub("", _without_comments(text)))
        plain = _ENTITY.sub(lambda found: html.unescape(f"&{found[1]};"), plain)
        if plain == text:
            break
        text = plain
    return text


def _without_comments(text: str) -> str:
    parts, at = [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin + 4)) >= 0:
        parts.append(text[at:begin])
        at = end + 3
    return " ".join([*parts, text[at:]])


def without_markup_series(texts: pl.Series) -> pl.Series:
    """Return `texts` (strings) with the markup of each gone; null stays null, shape (n,) as given."""
    if not bool(texts.str.contains("[<&]").any()):
        return texts
    values = [None if text is None else without_markup(text) for text in texts.to_list()]
    return pl.Series(texts.name, values, dtype=pl.String)


@functools.cache
def _many_marks() -> re.Pattern[str]:
    """More combining marks in a row than are kept."""
    # None lies beyond.
    known = map(chr, range(0x300, 0x1F000))
    marks = "".join(c for c in known if unicodedata.combining(unicodedata.normalize("NFD", c)[0]))
    return re.compile(f"([{marks}]{{{_MARKS}}})[{marks}]+")


def neutralise_series(texts: pl.Series, limit: int) -> pl.Series:
    """Return `texts` (strings) with each one neutralised; null stays null, shape (n,) as given."""
    values = [None if text is None else neutralise(text, limit) for text in texts.to_list()]
    return pl.Series(texts.name, values, dtype=pl.String)


def shorten(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text`, cut at a word border if one is near."""
    if len(text) <= limit:
        return text
    cut = text[: max(limit, 0)]
    border = text.rfind(" ", 0, limit + 1)
    if border > 0 and border >= limit - min(_NEAR, limit // 2):
        cut = text[:border]
    return cut.rstrip(" ")


QUERY_LIMIT = 1000
"""Longest typed query in characters."""


def query_text(query: str | None) -> str:
    """What a typed query says; empty if nothing, or only what cannot be seen."""
    return neutralise(query, QUERY_LIMIT) if query else ""


def _defuse(text: str) -> str:
    """Change the brackets of every word that could hold a special token. `text` has single spaces."""
    text = _PIPES.sub("|", text)
    if not _OPEN.search(text):
        return text
    # A special token has no space inside, so it lies within one word; changing every bracket of the
    # word leaves nothing that a nested form could turn into a token.
    return " ".join(_defuse_word(word) if _OPEN.search(word) else word for word in text.split(" "))


def _defuse_word(word: str) -> str:
    # Tokens that open with a pipe may have spaces inside (DeepSeek's U+2581), so that pair never stays.
    closed = any(c in word for c in _ANGLE_CLOSE) or _ANGLE_PIPE.search(word)
    if closed and any(c in word for c in _ANGLE_OPEN):
        word = word.translate(_ANGLES)
    if any(c in word for c in _SQUARE_OPEN) and any(c in word for c in _SQUARE_CLOSE):
        word = word.translate(_SQUARES)
    return word


def changed_lines(old: Sequence[str], new: Sequence[str]) -> list[int]:
    """Codes of the lines that are new or other than they were, in a catalogue that changed or grew."""
    changed = [code for code, same in enumerate(map(operator.eq, old, new)) if not same]
    return [*changed, *range(len(old), len(new))]


def typed_words(line: str, rng: np.random.Generator) -> str:
    """What somebody might type who looks for an item: two or three words drawn from its line.

    Words of one or two letters are not drawn; empty for a line without others.
    """
    words = sorted({word for word in re.findall(r"\w+", line) if len(word) > 2})
    if not words:
        return ""
    return " ".join(rng.choice(words, size=min(len(words), int(rng.integers(2, 4))), replace=False))
