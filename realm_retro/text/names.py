"""Names by their capital letters, and amounts: salient spans without any model.

It knows English and languages that write as it does; a language without capital
letters, or German, gets little good from it.
"""

from __future__ import annotations

import dataclasses
import re

from realm_retro.text.sentences import sentence_starts

_WORD = re.compile(r"(?:[^\W\d_]\.)+(?!\w)|[^\W\d_][\w’'&-]*|\d+")
_POSSESSIVE = re.compile("(?:[’']s|[’'])$")
# What may stand between the capitalised words of one name.
_LINKS = frozenset(
    {"of", "the", "de", "la", "du", "des", "del", "della", "di", "da", "van", "von"}
    | {"der", "le", "el", "al", "bin", "ibn"}
)
_MAX_LINKS = 2
# Words of which a capital letter makes no name.
_COMMON_WORDS = """
a about after all also although among an and another any are as at be because been
before between both but by can could did do does during each early even every few first
for from had has have he her here him his how however i if in into is it its itself just
last late later less like many may me more most much must my near neither no nor not now
of off often on once one only or other our out over own per same second several she
should since so some such than that the their them then there these they this those
three through thus to today too two under until up upon us very was we were what when
where whether which while who whom whose why will with within without would yet you your
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_AMOUNT = re.compile(
    r"(?<![\w.,])(?:"
    r"(?:US)?[$£€¥] ?\d[\d,]*(?:\.\d+)?(?: (?:million|billion|trillion|thousand))?"
    r"|\d[\d,]*(?:\.\d+)?(?: ?%|[ -](?:per ?cent|million|billion|trillion|km²?|m|mi|cm"
    r"|mm|kg|lb|ft|feet|foot|inch(?:es)?|acres|hectares|(?:kilo)?met(?:re|er)s?|miles?"
    r"|tons?|tonnes|dollars|pounds|euros|people|inhabitants|species|degrees|°[CF]"
    r"|[kMG]?Hz|[kM]?W|hp|years|months|weeks|days|hours|minutes)(?!\w))"
    r")"
)


@dataclasses.dataclass(frozen=True)
class _Word:
    start: int
    end: int
    text: str
    opens: bool  # first of its sentence

    @property
    def is_capital(self) -> bool:
        return self.text[0].isupper()


def amount_chars(text: str) -> list[tuple[int, int]]:
    """Numbers with units, per cent and money, [start, end) in characters."""
    return [match.span() for match in _AMOUNT.finditer(text)]


def name_chars(text: str) -> list[tuple[int, int]]:
    """Runs of capitalised words, [start, end) in characters, ascending.

    The word that opens a sentence has its capital anyway. Alone it is a name only if
    it has another capital, or stands with one inside another sentence; before other
    capitalised words it is part of the name unless the text has it in small letters.
    """
    words = _words(text)
    inside = {word.text for word in words if word.is_capital and not word.opens}
    small = {word.text.lower() for word in words if not word.is_capital}
    found = []
    position = 0
    while position < len(words):
        end = _run_end(text, words, position)
        run = _trimmed(words[position:end], small)
        if run and _is_name(run, inside):
            found.append((run[0].start, run[-1].end))
        position = max(end, position + 1)
    return found


def _words(text: str) -> list[_Word]:
    starts = iter([*sentence_starts(text), len(text)])
    following = next(starts)
    words = []
    for match in _WORD.finditer(text):
        opens = match.start() >= following
        while match.start() >= following:
            following = next(starts)
        found = _POSSESSIVE.sub("", match[0])
        words.append(_Word(match.start(), match.start() + len(found), found, opens))
    return words


def _run_end(text: str, words: list[_Word], start: int) -> int:
    """The end of the run of words that begins at `start`; `start` if none does."""
    if not words[start].is_capital:
        return start
    end = start + 1
    while True:
        step = end
        # Links belong to the run only where a capitalised word follows them.
        while (
            step - end < _MAX_LINKS
            and _joined(text, words, step)
            and words[step].text in _LINKS
        ):
            step += 1
        goes_on = _joined(text, words, step) and (
            words[step].is_capital or (step == end and words[step].text.isdigit())
        )
        if not goes_on:
            return end
        end = step + 1


def _joined(text: str, words: list[_Word], position: int) -> bool:
    if position >= len(words) or words[position].opens:
        return False
    between = text[words[position - 1].end : words[position].start]
    # ". " follows an abbreviation here: a sentence would have been opened.
    return between in (" ", ". ")


def _trimmed(run: list[_Word], small: set[str]) -> list[_Word]:
    while run and (
        run[0].text.lower() in _COMMON
        or not run[0].is_capital
        or (run[0].opens and run[0].text.lower() in small)
    ):
        run = run[1:]
    return run


def _is_name(run: list[_Word], inside: set[str]) -> bool:
    first = run[0]
    if len(run) > 1:
        return True
    if len(first.text.rstrip(".")) == 1:
        return False
    other_capital = any(character.isupper() for character in first.text[1:])
    return not first.opens or other_capital or first.text in inside
