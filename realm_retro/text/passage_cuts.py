"""Where a document is cut into passages: after a sentence, else a word, never within.

Borders are counted in wordpieces: border i lies before piece i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from realm_retro.text.sentences import sentence_starts
from realm_retro.text.wordpiece import Pieces
from realm_retro.typing import HostArray

# Whether [start, end) of a document tokenises the same on its own.
Agrees = Callable[[int, int], bool]


class WordTooLongError(ValueError):
    """A word has more wordpieces than a passage; the first argument is how many."""


@dataclasses.dataclass(frozen=True)
class Borders:
    """Where a document may be cut; ascending, the last one is its end.

    Attributes:
      sentences: borders before a sentence.
      spaces: borders before a word that follows a space.
      words: borders before any word or punctuation mark.
    """

    sentences: HostArray
    spaces: HostArray
    words: HostArray

    @classmethod
    def of(cls, text: str, pieces: Pieces) -> Borders:
        """The borders of a document of at least one wordpiece."""
        number = len(pieces.ids)
        words = np.flatnonzero(np.diff(pieces.words, prepend=-1))
        gaps = pieces.chars[words, 0] > pieces.chars[words - 1, 1]
        starts = np.searchsorted(pieces.chars[:, 0], sentence_starts(text))
        return cls(
            sentences=np.append(np.intersect1d(starts, words), number),
            spaces=np.append(words[gaps], number),
            words=np.append(words, number),
        )


def cut(
    borders: Borders,
    *,
    length: int,
    stride: int = 0,
    agrees: Agrees | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields the passages of a document, [start, end) in wordpieces.

    Args:
      borders: of the document.
      length: wordpieces of a passage at most.
      stride: see `realm_retro.data.passages.PassageConfig`.
      agrees: cuts only where both sides of the border agree.

    Raises:
      WordTooLongError: there is no border to cut at.
      LookupError: there are borders, but `agrees` accepts none.
    """
    number = int(borders.words[-1])
    start = 0
    while True:
        end = _end(borders, start, length, agrees)
        yield start, end
        if end == number:
            return
        start = _next_start(borders, start, end, stride, agrees)


def _end(borders: Borders, start: int, length: int, agrees: Agrees | None) -> int:
    number = int(borders.words[-1])
    if number - start <= length and (agrees is None or agrees(start, number)):
        return number
    last_third = start + -(-2 * length // 3)
    limit = min(start + length, number)
    tried = 0
    for kind, first in (
        (borders.sentences, last_third),
        (borders.spaces, last_third),
        (borders.words, start + 1),
    ):
        low, high = np.searchsorted(kind, [first, limit + 1])
        for end in kind[low:high][::-1].tolist():
            tried += 1
            if agrees is None or (
                agrees(start, end) and agrees(end, _probe_end(borders, end, length))
            ):
                return end
    if tried:
        raise LookupError(start)
    following = borders.words[np.searchsorted(borders.words, start, side="right")]
    raise WordTooLongError(int(following) - start)


def _next_start(
    borders: Borders, start: int, end: int, stride: int, agrees: Agrees | None
) -> int:
    if not stride or start + stride >= end:
        return end
    low, middle, high = np.searchsorted(
        borders.words, [start + 1, start + stride + 1, end]
    )
    # At most `stride` on, or where the next word begins.
    candidates = [*borders.words[low:middle][::-1], *borders.words[middle:high], end]
    for begin in map(int, candidates):
        if agrees is None or begin == end or agrees(begin, end):
            return begin
    return end


def _probe_end(borders: Borders, start: int, length: int) -> int:
    # Enough of what follows to see whether it begins as it should.
    upto = np.searchsorted(borders.words, start + min(length, 16), side="right") - 1
    following = np.searchsorted(borders.words, start, side="right")
    return int(borders.words[min(max(upto, following), len(borders.words) - 1)])
