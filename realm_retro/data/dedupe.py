"""Dropping documents that are there already, or in an evaluation set.

`config.dedupe` decides; `dedupe_local` does it in one process, `corpus_beam` in as many
as there are, both by the rules that stand here, and both write the same files
(`dedupe_writer`). Documents are numbered in the corpus's order, those of evaluation
sets below 0. A document is dropped if one of a lower number

* has the same words; then it goes for the sake of the first of these: `EVALUATION` if
  that is of an evaluation set, `EXACT` if it has the same text, `NEAR` otherwise;
* or is as similar as `DedupeConfig.threshold`: `EVALUATION` or `NEAR`;

whether that one is kept or not: so no two that were compared and found similar are both
kept, and a chain of similar documents needs no second pass. The artefact lists each
dropped document, why, and for the sake of which, in ``dropped-00000.jsonl`` and so on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeAlias

import numpy as np

from realm_retro import artifacts
from realm_retro.data import text_files
from realm_retro.data.corpus import CorpusConfig, Document, Report
from realm_retro.errors import UserError
from realm_retro.text import near_duplicates
from realm_retro.text.near_duplicates import MinHash
from realm_retro.typing import HostArray, JsonDict

EVALUATION, EXACT, NEAR = range(3)
REASONS = ("evaluation", "exact", "near")
# Why, for which number's sake, and how similar; the least of several counts.
Mark: TypeAlias = tuple[int, int, float]
# The same with the other's id.
Dropped: TypeAlias = tuple[int, str, float]


@dataclasses.dataclass(frozen=True)
class DedupeConfig:
    """Which documents to drop (``config.dedupe``).

    Attributes:
      enabled: whether to drop any.
      against: evaluation sets: files, folders or glob patterns as in
        ``config.corpus.path``; a record or text file is one document.
      field: of their .jsonl files: the field with the text.
      words: length of the runs of words that documents are compared by.
      threshold: Jaccard similarity from which on two documents are near duplicates.
      miss: probability, at most, that two documents of that similarity are not
        compared; it falls fast above it.
      seed: of the random functions that choose what is compared.
    """

    enabled: bool = False
    against: str | tuple[str, ...] = ""
    field: str = "text"
    words: int = 13
    threshold: float = 0.8
    miss: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        if self.words < 1:
            raise UserError(f"config.dedupe.words={self.words} must be 1 or more")
        if not 0 < self.threshold <= 1:
            raise UserError(
                f"config.dedupe.threshold={self.threshold} must be above 0, at most 1"
            )
        if not 0 < self.miss < 1:
            raise UserError(f"config.dedupe.miss={self.miss} must be between 0 and 1")
        if self.paths and not self.enabled:
            raise UserError(
                "config.dedupe.against names evaluation sets, but nothing is dropped;"
                " set config.dedupe.enabled=True"
            )
        try:
            _ = self.minhash
        except ValueError as error:
            raise UserError(
                f"config.dedupe: {error}; raise config.dedupe.threshold or"
                " config.dedupe.miss"
            ) from None

    @property
    def paths(self) -> tuple[str, ...]:
        """`against`, always as a tuple."""
        paths = (self.against,) if isinstance(self.against, str) else self.against
        return tuple(path for path in paths if path)

    @functools.cached_property
    def minhash(self) -> MinHash:
        """Chooses the pairs to compare."""
        return near_duplicates.minhash_for(self.threshold, self.miss, self.seed)

    @property
    def evaluation(self) -> CorpusConfig:
        """Where the documents of the evaluation sets are read."""
        return CorpusConfig(
            source="text_files", path=self.paths, text_field=self.field, title_field=""
        )


def settings(config: DedupeConfig) -> JsonDict:
    """What the artefact's request says of it; empty where nothing is dropped.

    Of evaluation sets it has the content's checksums, not where they lie.

    Raises:
      UserError: there is no such evaluation set.
    """
    if not config.enabled:
        return {}
    values = dataclasses.asdict(config)
    del values["enabled"]
    with naming_evaluation():
        files = text_files.find(config.paths, Report()) if config.paths else {}
        values["against"] = [artifacts.sha256(path) for path in files.values()]
    return values


def evaluation_documents(config: DedupeConfig) -> Iterator[Document]:
    """The documents of all evaluation sets that hold text.

    Raises:
      UserError: a file is not as the config says.
    """
    with naming_evaluation():
        if config.paths:
            source = config.evaluation
            yield from Report().keep(text_files.text_files(source, Report()))


def no_evaluation_text(config: DedupeConfig) -> UserError:
    """The error of evaluation sets without text."""
    return UserError(f"config.dedupe.against ({' '.join(config.paths)}) holds no text")


@contextlib.contextmanager
def naming_evaluation() -> Iterator[None]:
    """In errors of reading evaluation sets, names the settings of these."""
    try:
        yield
    except UserError as error:
        message = str(error).replace("config.corpus.path", "config.dedupe.against")
        message = message.replace("config.corpus.text_field", "config.dedupe.field")
        raise UserError(message) from None


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What is compared of a document.

    Attributes:
      words: 16 bytes, the same for documents of the same words.
      text: 8 bytes, the same for documents of the same text.
      shingles: uint64 [s], see `near_duplicates.shingles`.
      keys: int64 [bands], see `MinHash.keys`; empty if there are no words.
    """

    words: bytes
    text: bytes
    shingles: HostArray
    keys: HostArray


def shingles(text: str, config: DedupeConfig) -> HostArray:
    """The shingles of a document, see `near_duplicates.shingles`."""
    return near_duplicates.shingles(near_duplicates.words_of(text), config.words)


def sketch(text: str, config: DedupeConfig) -> Sketch:
    """Sketches a document."""
    words = near_duplicates.words_of(text)
    found = near_duplicates.shingles(words, config.words)
    # Without a word, only the same text is the same.
    content = " ".join(words) or f"\0{text}"
    return Sketch(
        words=hashlib.blake2b(content.encode(), digest_size=16).digest(),
        text=hashlib.blake2b(text.encode(), digest_size=8).digest(),
        shingles=found,
        keys=config.minhash.keys(found) if words else np.zeros(0, np.int64),
    )


def marks_of_same_words(
    members: Iterable[tuple[int, Hashable]],
) -> Iterator[tuple[int, Mark]]:
    """Marks documents of the same words, all but the first.

    Args:
      members: number and text (or a hash of it) of each, in any order.

    Yields:
      Number and mark.
    """
    (first, text), *others = sorted(members, key=lambda member: member[0])
    for number, other in others:
        if number >= 0:
            same = EXACT if other == text else NEAR
            yield number, (EVALUATION if first < 0 else same, first, 1.0)


def mark_of_pair(
    first: int, one: HostArray, other: HostArray, config: DedupeConfig
) -> Mark | None:
    """Marks the second document of a pair if it is a near duplicate of the first.

    Args:
      first: number of the first.
      one: its shingles.
      other: those of the second.
      config: has the threshold.
    """
    similarity = near_duplicates.jaccard(one, other)
    if similarity < config.threshold:
        return None
    return (EVALUATION if first < 0 else NEAR, first, similarity)
