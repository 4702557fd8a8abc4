"""Words of a text as answers are compared: what counts of them, and where they stand.

Two strings have equal words if they differ in case, in ASCII punctuation or in how an
accent is encoded only. Punctuation joins: "U.S." is one word of two pieces, "us".
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_TOKEN = re.compile(r"\S+")
# Scripts that put no spaces between words: there each character is a word.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_HAS_UNSPACED = re.compile(f"[{UNSPACED}]")


def normalise(text: str) -> str:
    """NFD, lower case, without ASCII punctuation, articles and surplus white space."""
    text = unicodedata.normalize("NFD", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


class Piece(NamedTuple):
    """A run of letters and digits, or a symbol: [start, end) in characters.

    `form` is what counts of it: NFD, lower case, without ASCII punctuation.
    """

    form: str
    start: int
    end: int


class Word(NamedTuple):
    """What white space encloses; an answer may begin and end at any of its pieces.

    `form` is that of its pieces, joined.
    """

    form: str
    pieces: Sequence[Piece]


def words_of(text: str) -> list[Word]:
    """The words of a text, in order; articles are words, punctuation alone is none."""
    words = []
    for match in _TOKEN.finditer(text):
        token, start = match.group(), match.start()
        core = token.strip(string.punctuation)
        if core.isalnum() and (core.isascii() or not _HAS_UNSPACED.search(core)):
            start += token.find(core)
            form = _form(core)
            words.append(Word(form, (Piece(form, start, start + len(core)),)))
        elif core:
            words += _split(token, start)
    return words


def _split(token: str, offset: int) -> Iterator[Word]:
    pieces: list[Piece] = []
    for match in _piece_pattern().finditer(token):
        form = _form(match.group())
        if not form:
            continue
        piece = Piece(form, offset + match.start(), offset + match.end())
        if match.lastgroup == "unspaced":
            if pieces:
                yield Word("".join(p.form for p in pieces), pieces)
                pieces = []
            yield Word(form, (piece,))
        else:
            pieces.append(piece)
    if pieces:
        yield Word("".join(p.form for p in pieces), pieces)


def _form(piece: str) -> str:
    if not piece.isascii():
        piece = unicodedata.normalize("NFD", piece)
    lower = piece.lower()
    return lower if lower.isalnum() else lower.translate(_NO_PUNCTUATION)


@functools.cache
def _piece_pattern() -> re.Pattern[str]:
    # The re module knows no class of combining marks; these planes hold all of them.
    planes = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    marks = "".join(chr(c) for c in planes if unicodedata.category(chr(c))[0] == "M")
    letter = f"(?:(?![{UNSPACED}])[^\\W_]|[{marks}])"
    punctuation = re.escape(string.punctuation)
    return re.compile(
        f"(?P<unspaced>[{UNSPACED}][{marks}]*)"
        # 7,056 and 3.5 are one number: "3" is not found in it.
        f"|{letter}+(?:(?<=\\d)[.,](?=\\d){letter}+)*"
        f"|[^\\s{punctuation}]"
    )
