"""Which passages have an answer: computed once for a set of questions, then looked up.

Layout (kind ``answers``), one pair of files for every `shard_passages` passages:

* ``offsets-00000-of-00003.npy``  int64 [questions + 1]
* ``rows-00000-of-00003.npy``     int32 [pairs]; the passages of question q are
  ``rows[offsets[q] : offsets[q + 1]]``, ascending

"Has an answer" is the rule of `realm_retro.text.answers` on a passage's text without
its title, the rule that the reader's targets follow. All plain answers are looked for
in one pass of a passage; of the regular expressions, those are run that can match.
"""

from __future__ import annotations

import array
import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.arrays import open_npy, write_npy
from realm_retro.data import questions as questions_lib
from realm_retro.data.chunk_store import shard_name
from realm_retro.data.questions import Question
from realm_retro.errors import UserError
from realm_retro.text.answers import AnswerIndex, compile_regex, has_answer
from realm_retro.text.literals import PatternFilter
from realm_retro.typing import HostArray, JsonDict

KIND = "answers"
FORMAT_VERSION = 1  # also of the matching rule: an old artefact must not outlive it
MADE_BY = "realm_retro.cli.find_answers"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)
PARTS = ("offsets", "rows")

_BATCH = 1024  # passages whose texts are in memory


class Passages(Protocol):
    """What is needed of a `realm_retro.data.passages.PassageStore`."""

    @property
    def fingerprint(self) -> str:
        """Of the artefact."""
        ...

    def __len__(self) -> int: ...

    def texts(self, rows: Sequence[int] | HostArray) -> list[str]:
        """The texts of several passages."""
        ...


@dataclasses.dataclass(frozen=True)
class AnswerStore:
    """For each question, the passages with an answer; questions go by their place.

    Attributes:
      counts: int64 [questions], how many passages have an answer.
      manifest: of the artefact.
    """

    counts: HostArray
    manifest: artifacts.Manifest
    _offsets: Sequence[HostArray]
    _rows: Sequence[HostArray]

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        questions: Sequence[Question],
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> AnswerStore:
        """Opens a finished store.

        Args:
          directory: of the artefact.
          questions: the very questions, in order, that it must have been made for.
          parents: role → fingerprint that it must have been made from, or None.
          verify: recompute the checksums of all files.

        Raises:
          UserError: it is missing, unfinished, damaged, or of other questions.
        """
        manifest = load_manifest(directory, parents=parents, verify=verify)
        if manifest.config["questions"] != questions_lib.fingerprint(questions):
            raise UserError(
                f"{directory}: was made for {manifest.config['num_questions']} other"
                f" questions; delete it and run: python -m {MADE_BY}"
            )
        opened = {
            part: [
                open_npy(manifest.path(name)) for name in _names(part, manifest.meta)
            ]
            for part in PARTS
        }
        counts = np.sum([np.diff(o) for o in opened["offsets"]], axis=0)
        return cls(counts, manifest, opened["offsets"], opened["rows"])

    @property
    def fingerprint(self) -> str:
        """The artefact's fingerprint."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """The number of questions."""
        return len(self.counts)

    def of(self, question: int) -> HostArray:
        """Rows of the passages with an answer to a question: int32, ascending."""
        if not 0 <= question < len(self):
            raise IndexError(f"question {question} of {len(self)}")
        return np.concatenate(
            [
                rows[offsets[question] : offsets[question + 1]]
                for offsets, rows in zip(self._offsets, self._rows, strict=True)
            ]
        )

    def has(self, questions: Sequence[int] | HostArray, rows: HostArray) -> HostArray:
        """Whether passages have an answer.

        Args:
          questions: int [b].
          rows: int [b, ...], passages; −1 where there is none.

        Returns:
          bool, shaped like `rows`; False at −1.
        """
        rows = np.asarray(rows)
        found = np.zeros(rows.shape, bool)
        for i, question in enumerate(np.asarray(questions).tolist()):
            found[i] = _in_sorted(rows[i], self.of(question))
        return found


def open_stage(
    directory: epath.PathLike,
    questions: Sequence[Question],
    passages: Passages,
    *,
    shard_passages: int = 1 << 16,
) -> artifacts.Stage:
    """The stage that `build` writes to; `Stage.finished` tells whether it ran.

    Args:
      directory: of the artefact.
      questions: in the order that their places will mean.
      passages: the store that is searched.
      shard_passages: passages of one pair of files, the unit of resuming.

    Raises:
      UserError: the directory holds the same stage with other settings.
    """
    if shard_passages < 1:
        raise ValueError(f"shard_passages={shard_passages} must be at least 1")
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config={
            "questions": questions_lib.fingerprint(questions),
            "num_questions": len(questions),
            "shard_passages": shard_passages,
        },
        parents={"passages": passages.fingerprint},
        made_by=MADE_BY,
    )


def build(
    questions: Sequence[Question],
    passages: Passages,
    stage: artifacts.Stage,
    *,
    shard_passages: int = 1 << 16,
) -> JsonDict:
    """Writes all shards that are not there yet; does not commit.

    Memory holds the answers, and the pairs of one shard.

    Args:
      questions: as in `open_stage`.
      passages: as in `open_stage`.
      stage: from `open_stage`.
      shard_passages: as in `open_stage`.

    Returns:
      The counts for the manifest: ``pairs``; ``questions_with_answer``, those that at
      least one passage answers; ``unmatchable_answers``, which normalise to nothing and
      are not looked for; ``unfiltered_patterns``, which had to be run on every text.
    """
    finder = _Finder.build(questions)
    num_shards = max(1, -(-len(passages) // shard_passages))
    meta = {"num_shards": num_shards}
    with progress.bar(total=len(passages), unit="passages", label="answers") as bar:
        for shard in range(num_shards):
            start = shard * shard_passages
            stop = min(start + shard_passages, len(passages))
            names = [_names(part, meta)[shard] for part in PARTS]
            if all(stage.has(name) for name in names):
                bar.update(stop - start)
                continue
            found, owners = array.array("i"), array.array("i")
            for first in range(start, stop, _BATCH):
                rows = range(first, min(first + _BATCH, stop))
                for row, text in zip(rows, passages.texts(rows), strict=True):
                    mine = finder.owners(text)
                    owners.extend(mine)
                    found.extend([row] * len(mine))
                bar.update(len(rows))
            arrays = _by_question(owners, found, len(questions))
            for name, values in zip(names, arrays, strict=True):
                with stage.write(name) as path:
                    write_npy(path, values)
    offsets = [open_npy(stage.directory / name) for name in _names("offsets", meta)]
    counts = np.sum([np.diff(o) for o in offsets], axis=0)
    return {
        **meta,
        "passages": len(passages),
        "pairs": int(counts.sum()),
        "questions_with_answer": int((counts > 0).sum()),
        "unmatchable_answers": sum(finder.plain.unmatchable.values()),
        "unfiltered_patterns": len(finder.filter.unfiltered),
    }


@dataclasses.dataclass(frozen=True)
class _Finder:
    """Everything that is looked for in a text."""

    plain: AnswerIndex
    filter: PatternFilter
    # each expression once, with the questions that have it
    patterns: Sequence[tuple[str, Sequence[int]]]

    @classmethod
    def build(cls, questions: Sequence[Question]) -> _Finder:
        patterns: dict[str, list[int]] = collections.defaultdict(list)
        for number, question in enumerate(questions):
            for pattern in question.answers if question.is_regex else ():
                patterns[pattern].append(number)
        return cls(
            AnswerIndex.build([() if q.is_regex else q.answers for q in questions]),
            PatternFilter.build(compile_regex(pattern) for pattern in patterns),
            list(patterns.items()),
        )

    def owners(self, text: str) -> set[int]:
        """Questions to which a text has an answer."""
        found = {owner for owner, _, _ in self.plain.find(text)}
        if self.patterns:
            for number in self.filter.candidates(text):
                pattern, owners = self.patterns[number]
                if has_answer(text, (pattern,), is_regex=True):
                    found.update(owners)
        return found


def _by_question(
    owners: Sequence[int], rows: Sequence[int], num_questions: int
) -> Iterator[HostArray]:
    """Offsets and rows of pairs whose rows are ascending; see the module docstring."""
    owner = np.asarray(owners, np.int32)
    counts = np.bincount(owner, minlength=num_questions)
    yield np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    yield np.asarray(rows, np.int32)[np.argsort(owner, kind="stable")]


def _in_sorted(values: HostArray, sorted_rows: HostArray) -> HostArray:
    place = np.searchsorted(sorted_rows, values)
    inside = place < len(sorted_rows)
    if not len(sorted_rows):
        return inside
    return inside & (sorted_rows[np.where(inside, place, 0)] == values)


def _names(part: str, meta: Mapping[str, int]) -> list[str]:
    shards = range(meta["num_shards"])
    return [shard_name(part, shard, meta["num_shards"]) for shard in shards]
