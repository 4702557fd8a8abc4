"""What is known of a question: the passages found, an answer, and its evidence."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence

import numpy as np

from realm_retro.typing import HostArray, JsonDict


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Where the time goes that questions take."""

    tokenise: float = 0.0
    embed: float = 0.0
    search: float = 0.0
    gather: float = 0.0
    read: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @classmethod
    def sum(cls, parts: Sequence[Seconds]) -> Seconds:
        """Of several together."""
        return functools.reduce(operator.add, parts, cls())

    def __add__(self, other: Seconds) -> Seconds:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Seconds(*(a + b for a, b in pairs))

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(*(seconds * factor for seconds in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """What was found for some questions; arrays [questions, …].

    Attributes:
      query: int32 [n, q], wordpieces.
      query_len: int32 [n].
      cut: bool [n], questions that are longer than the model reads.
      vectors: float32 [n, d], of the query tower.
      ids: int64 [n, k], passages, best first; −1 where there are fewer.
      scores: float32 [n, k], f(x, z); −inf where the id is −1.
      seconds: of all together.
    """

    query: HostArray
    query_len: HostArray
    cut: HostArray
    vectors: HostArray
    ids: HostArray
    scores: HostArray
    seconds: Seconds

    @classmethod
    def join(cls, parts: Sequence[Retrieved]) -> Retrieved:
        """One after the other; the same number of passages each."""
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in _ARRAYS
        }
        return cls(**joined, seconds=Seconds.sum([part.seconds for part in parts]))

    def __getitem__(self, rows: slice) -> Retrieved:
        """Some of the questions, with their share of the time."""
        parts = {name: getattr(self, name)[rows] for name in _ARRAYS}
        share = len(parts["ids"]) / max(len(self.ids), 1)
        return Retrieved(**parts, seconds=self.seconds * share)


_ARRAYS = tuple(f.name for f in dataclasses.fields(Retrieved) if f.name != "seconds")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A passage that was found, and read if there is a reader.

    Attributes:
      row: of the passage store.
      document: the document's id.
      title: the document's, possibly empty.
      text: the passage.
      score: f(x, z).
      probability: p(z | x).
      span: [start, end) of the answer in characters of `text`; None where none of its
        best spans has the answer's words.
    """

    row: int
    document: str
    title: str
    text: str
    score: float
    probability: float
    span: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and what it stands on.

    Attributes:
      question: as asked.
      text: of the most probable span; "" where no passage was found, None where there
        is no reader.
      probability: p(y | x); None without a reader.
      passages: the K that were found, best first.
      null_mass: p(∅ | x), the retriever's share for "no document is needed"; None
        without a document tower.
      seconds: spent on this question; of a batch, its share.
      cut: whether the question was longer than the model reads.
    """

    question: str
    text: str | None
    probability: float | None
    passages: tuple[Evidence, ...]
    null_mass: float | None
    seconds: Seconds
    cut: bool

    def as_json(self) -> JsonDict:
        """For files and other programs; spans are in characters."""
        return dataclasses.asdict(self)
