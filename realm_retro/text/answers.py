"""Answers in texts: one rule for what is scored, what is searched and what is read.

A prediction is scored as in the published work: `exact_match` and `f1` on normalised
strings (SQuAD, with the NFD of DrQA and ORQA), `regex_match` for CuratedTREC.

In passages an answer is looked for by `answer_spans`, for the retriever's early update
(`has_answer`), for the reader's targets (`token_spans`) and for recall alike:

* plain answers: the same words, from word border to word border. Case, ASCII
  punctuation and how an accent is encoded do not count ("U.S." is "us", "7,056" is
  "7056"). Articles do, or *The Who* would be found in every "who". Every span found
  scores an exact match.
* regular expressions: searched anywhere, widened to whole words, and kept if that text
  scores, that is if the expression matches at its start. "wood" finds "Woodstock", as
  `regex_match` does, but not "Hollywood".

So an answer that a passage is said to have is one that its reader is taught, and one
that counts when it is given.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from realm_retro.text.wordpiece import byte_positions
from realm_retro.text.words import Piece, Word, normalise, words_of
from realm_retro.typing import HostArray

_REGEX_FLAGS = re.IGNORECASE | re.UNICODE | re.MULTILINE
# An expression that matches more words mostly does so by `.*`; no reader answers so.
_LONG_MATCH = 10


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether the prediction equals an answer once both are normalised."""
    return normalise(prediction) in {normalise(answer) for answer in answers}


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best F1 over the answers of words in common, counted with repetitions."""
    found = normalise(prediction).split()
    return max((_f1(found, normalise(a).split()) for a in answers), default=0.0)


def regex_match(prediction: str, patterns: Iterable[str]) -> bool:
    """Whether an expression matches at the start of the prediction, in any case.

    That is the rule of the published CuratedTREC figures (DrQA, ORQA, REALM), and what
    follows the match does not count. Others search the whole prediction.
    """
    return any(compile_regex(pattern).match(prediction) for pattern in patterns)


def is_correct(prediction: str, answers: Iterable[str], is_regex: bool) -> bool:
    """`regex_match` or `exact_match`, whichever the answers ask for."""
    return (regex_match if is_regex else exact_match)(prediction, answers)


def has_answer(text: str, answers: Sequence[str], is_regex: bool) -> bool:
    """Whether `answer_spans` finds any."""
    return any(True for _ in _char_spans(text, tuple(answers), is_regex))


def answer_spans(
    text: str, answers: Sequence[str], is_regex: bool
) -> list[tuple[int, int]]:
    """Where answers stand in a text; see the module docstring.

    Returns:
      [start, end) in bytes of the text's UTF-8, sorted, none twice.
    """
    spans = sorted(set(_char_spans(text, tuple(answers), is_regex)))
    place = byte_positions(text)
    return [(int(place[start]), int(place[end])) for start, end in spans]


def token_spans(token_bytes: HostArray, spans: Sequence[tuple[int, int]]) -> HostArray:
    """Spans of a text as spans of its tokens.

    Args:
      token_bytes: int [n, 2], [start, end) of each token in the text; ascending.
      spans: from `answer_spans`.

    Returns:
      int32 [s, 2], the tokens [start, end) that touch each span; sorted, none twice.
      A span that touches no token is left out.
    """
    wanted = np.asarray(spans, np.int64).reshape(-1, 2)
    first = np.searchsorted(token_bytes[:, 1], wanted[:, 0], side="right")
    after = np.searchsorted(token_bytes[:, 0], wanted[:, 1], side="left")
    found = np.stack([first, after], axis=1)[first < after]
    return np.unique(found, axis=0).astype(np.int32)


def token_text(text: str, token_bytes: HostArray, start: int, end: int) -> str:
    """The text of the tokens [start, end), as it was written."""
    first, last = int(token_bytes[start, 0]), int(token_bytes[end - 1, 1])
    return text.encode()[first:last].decode()


@functools.lru_cache(maxsize=1 << 14)
def compile_regex(pattern: str) -> re.Pattern[str]:
    """An answer's expression with the flags that all use.

    Raises:
      ValueError: it does not compile; the message says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what may change in a later Python
            return re.compile(pattern, _REGEX_FLAGS)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class AnswerIndex:
    """Plain answers of any number of questions, all looked for in one pass of a text.

    Attributes:
      unmatchable: per owner, how many answers normalise to nothing ("A", "?") and so
        would be everywhere; they are not looked for.
    """

    unmatchable: Mapping[int, int]
    # words of an answer, joined by spaces → (its normalised form, its owner)
    _owners: Mapping[str, Sequence[tuple[str, int]]]
    # first word, or first two → how many words the answers have that begin so: 1, 2 or
    # 3 (or more) after one word, exactly after two
    _lengths: Mapping[str, Sequence[int]]
    _longest_word: int

    @classmethod
    def build(cls, answers: Sequence[Sequence[str]]) -> AnswerIndex:
        """Indexes answers; their places number their owners."""
        unmatchable: collections.Counter[int] = collections.Counter()
        owners: dict[str, list[tuple[str, int]]] = {}
        lengths: dict[str, set[int]] = {}
        longest = 0
        for owner, mine in enumerate(answers):
            for answer in mine:
                forms = [word.form for word in words_of(answer)]
                entry = (normalise(answer), owner)
                if not entry[0] or not forms:
                    unmatchable[owner] += 1
                    continue
                longest = max(longest, *map(len, forms))
                known = owners.setdefault(" ".join(forms), [])
                if entry not in known:
                    known.append(entry)
                count = len(forms)
                lengths.setdefault(forms[0], set()).add(min(count, 3))
                if count > 2:
                    lengths.setdefault(" ".join(forms[:2]), set()).add(count)
        return cls(
            dict(unmatchable),
            owners,
            {word: sorted(counts) for word, counts in lengths.items()},
            longest,
        )

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields (owner, start, end) of each answer found, in characters."""
        words = words_of(text)
        for i, word in enumerate(words):
            if len(word.pieces) == 1:
                # Most words begin no answer: this line is what a text costs.
                if word.form in self._lengths:
                    yield from self._from(text, words, i, 0, word.form)
                continue
            left = len(word.form)
            for p, piece in enumerate(word.pieces):
                # A longer head begins nothing; a file name of a million letters is one.
                head = word.form[-left:] if left <= self._longest_word else ""
                yield from self._from(text, words, i, p, head)
                left -= len(piece.form)

    def _from(
        self, text: str, words: list[Word], i: int, p: int, head: str
    ) -> Iterator[tuple[int, int, int]]:
        """Answers that begin with piece p of word i; `head` is that word from there."""
        start = words[i].pieces[p].start
        for form, end in self._beginnings(words[i].pieces, p):
            yield from self._hits(text, form, start, end)
        for count in self._counts(head, words, i):
            before = [head, *(word.form for word in words[i + 1 : i + count - 1])]
            for form, end in self._beginnings(words[i + count - 1].pieces, 0):
                yield from self._hits(text, " ".join([*before, form]), start, end)

    def _counts(self, head: str, words: list[Word], i: int) -> Iterator[int]:
        counts = self._lengths.get(head, ())
        left = len(words) - i
        if 2 in counts and left > 1:
            yield 2
        if 3 in counts and left > 2:
            # "the" begins answers of any length, "the who" hardly one.
            both = f"{head} {words[i + 1].form}"
            yield from (n for n in self._lengths.get(both, ()) if n <= left)

    def _beginnings(self, pieces: Sequence[Piece], p: int) -> Iterator[tuple[str, int]]:
        form = ""
        for q in range(p, len(pieces)):
            form += pieces[q].form
            if len(form) > self._longest_word:
                return
            yield form, pieces[q].end

    def _hits(
        self, text: str, key: str, start: int, end: int
    ) -> Iterator[tuple[int, int, int]]:
        for normalised, owner in self._owners.get(key, ()):
            span = text[start:end]
            # Beyond ASCII equal words may be written together here and apart there.
            if span.isascii() or normalise(span) == normalised:
                yield owner, start, end


@functools.lru_cache(maxsize=1 << 12)
def _index_of(answers: tuple[str, ...]) -> AnswerIndex:
    return AnswerIndex.build([answers])


def _char_spans(
    text: str, answers: tuple[str, ...], is_regex: bool
) -> Iterator[tuple[int, int]]:
    if is_regex:
        for pattern in answers:
            yield from _regex_spans(text, pattern)
    else:
        for _, start, end in _index_of(answers).find(text):
            yield start, end


def _regex_spans(text: str, pattern: str) -> Iterator[tuple[int, int]]:
    compiled = compile_regex(pattern)
    place = 0
    while place <= len(text) and (match := compiled.search(text, place)):
        place = match.start() + 1  # what is refused may hide a later match
        if match.start() == match.end():
            continue
        pieces = _pieces(text)
        start, end = _whole_words(text, pieces, *match.span())
        if start < end and compiled.match(text[start:end]):
            place = match.end()
            yield _shortened(compiled, text, pieces, start, end)


# Many expressions are run on a text one after another.
@functools.lru_cache(maxsize=4)
def _pieces(text: str) -> list[Piece]:
    return [piece for word in words_of(text) for piece in word.pieces]


def _whole_words(
    text: str, pieces: list[Piece], start: int, end: int
) -> tuple[int, int]:
    span = text[start:end]
    start += len(span) - len(span.lstrip())
    end -= len(span) - len(span.rstrip())
    first = bisect.bisect_right(pieces, start, key=lambda piece: piece.end)
    if first < len(pieces) and pieces[first].start < start:
        start = pieces[first].start
    last = bisect.bisect_left(pieces, end, key=lambda piece: piece.start) - 1
    if last >= 0 and pieces[last].end > end:
        end = pieces[last].end
    return start, end


def _shortened(
    compiled: re.Pattern[str], text: str, pieces: list[Piece], start: int, end: int
) -> tuple[int, int]:
    """A long match without the words that it does not need at its two ends."""
    inside = [p for p in pieces if start <= p.start and p.end <= end]
    if len(inside) <= _LONG_MATCH:
        return start, end
    starts = (p.start for p in reversed(inside) if compiled.match(text[p.start : end]))
    start = next(starts, start)
    ends = (p.end for p in inside if compiled.match(text[start : p.end]))
    return start, next((e for e in ends if e > start), end)


def _f1(found: Sequence[str], expected: Sequence[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = (collections.Counter(found) & collections.Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))
