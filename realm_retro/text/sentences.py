"""Where sentences begin: punctuation, a space and no small letter after it; or a line.

English abbreviations and initials end no sentence. A few borders are missed and a few
are made up; whoever needs sentences here can live with both.
"""

from __future__ import annotations

import itertools
import re

import numpy as np

from realm_retro.text.wordpiece import byte_positions
from realm_retro.typing import HostArray

_BORDER = re.compile(
    r"""
    \n\s*+
    | (?<![.!?…]) (?P<end>[.!?…]++) ["'”’»)\]]*+ \s++ (?=["'“‘«(\[¿¡]*+ (?P<next>\w))
    | [。！？]++ [」』”’）]*+
    """,
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"[\w.’'-]*$")
_LONGEST_WORD = 40
_ABBREVIATED = """
adm al approx apr aug bros c ca capt cf ch cm co col corp ct dec dept dr ed eds eg est
etc feb fig fl fr ft gen gov hon hr hrs ie inc jan jr jul jun km lit lt ltd maj mar max
mi min mm mr mrs ms mt no nos nov oct op ph pl pp pres prof pt pvt rep rev sec sen sept
sgt sir sq sr st ste trans univ v vol vols vs
"""
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())


def sentence_starts(text: str) -> list[int]:
    """Characters at which a sentence begins, ascending, 0 first; [] for no text."""
    starts = [0] if text else []
    for match in _BORDER.finditer(text):
        if _ends_a_sentence(text, match) and starts[-1] < match.end() < len(text):
            starts.append(match.end())
    return starts


def sentence_spans(text: str) -> HostArray:
    """The sentences, [start, end) in bytes of UTF-8, without outer space.

    Returns:
      int64 [sentences, 2]; a sentence of nothing but space is left out.
    """
    spans = []
    for start, end in itertools.pairwise([*sentence_starts(text), len(text)]):
        sentence = text[start:end]
        if stripped := sentence.strip():
            left = start + len(sentence) - len(sentence.lstrip())
            spans.append((left, left + len(stripped)))
    return byte_positions(text)[np.asarray(spans, np.int64).reshape(-1, 2)]


def _ends_a_sentence(text: str, match: re.Match[str]) -> bool:
    if match["end"] is None:
        return True
    if match["next"].islower():
        return False
    if match["end"] != ".":
        return True
    end = match.start("end")
    found = _LAST_WORD.search(text[max(0, end - _LONGEST_WORD) : end])
    word = found[0] if found else ""
    is_initial = len(word) == 1 and word.isupper()
    return not (is_initial or "." in word or word.lower() in _ABBREVIATIONS)
