"""Which questions are trained on and which are held out (section ``qa``)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
from collections.abc import Sequence

from realm_retro.data.questions import Question, load_questions
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

# Comes with the package: questions over the quickstart's corpus.
VITAL = "vital_questions"
INDEXES = ("auto", "exact", "scann")
# Of section ``qa``: what evaluation alone reads, and where data lies, not which.
_FREE = ("test", "data_dir", "eval_batch_size", "recall_at", "bm25")


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """How passages are searched (section ``retrieval``).

    Attributes:
      depth: 1 searches for the next batch while the device takes a step, with weights
        one step older; 0 waits for the search.
      index: ``exact``, ``scann`` or ``auto``; see `search.build_index`.
    """

    depth: int = 1
    index: str = "auto"

    def __post_init__(self) -> None:
        if self.depth not in (0, 1):
            raise ValueError(f"depth={self.depth} must be 0 or 1")
        if self.index not in INDEXES:
            known = ", ".join(INDEXES)
            raise ValueError(f"index={self.index!r} must be one of {known}")


@dataclasses.dataclass(frozen=True)
class QaConfig:
    """Questions, and what is retrieved and read for each (section ``qa``).

    Attributes:
      questions: questions to train on: a .jsonl file (also .gz, .xz), a TFDS dataset
        (``tfds:natural_questions_open:train``), or ``vital_questions``, which come
        with the package and belong to the corpus ``vital_articles``.
      test: questions to evaluate on, likewise; empty holds out a part of
        `questions`.
      holdout: that part; the hash of a question's id decides, so the same questions
        are held out by every command.
      data_dir: of TFDS datasets; TFDS's own default if empty.
      beam: passages that the early update ranks, all if there are fewer (ORQA: 5,000).
      read: passages that the reader reads (ORQA: 5).
      drop_unanswerable: leave out of training the questions that no passage answers:
        they have no loss and take a place in the batch.
      train_documents: train the document tower too, on the passages that are read;
        False trains the query tower alone, against a frozen index.
      eval_batch_size: questions that are read at a time when they are answered.
      recall_at: passages of which one has to have an answer, for recall@k.
      bm25: whether evaluation measures BM25 on the same passages too.
    """

    questions: str = VITAL
    test: str = ""
    holdout: float = 0.33
    data_dir: str = ""
    beam: int = 5000
    read: int = 5
    drop_unanswerable: bool = True
    train_documents: bool = False
    eval_batch_size: int = 8
    recall_at: tuple[int, ...] = (1, 5, 20, 100)
    bm25: bool = True

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("questions names none; a .jsonl file, for example")
        for name in ("beam", "read", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.beam < self.read:
            raise ValueError(
                f"beam={self.beam} is less than read={self.read}; what is read comes"
                " out of the beam"
            )
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must be at least 0 and below 1")
        if not self.recall_at or min(self.recall_at) < 1:
            raise ValueError(f"recall_at={self.recall_at}: name numbers from 1 on")

    @property
    def decisive(self) -> JsonDict:
        """The settings that determine the weights: fixed for the life of a run."""
        values = dataclasses.asdict(self)
        # With questions of its own for the test, all the others are trained on.
        values["holdout"] = 0.0 if self.test else self.holdout
        return {name: value for name, value in values.items() if name not in _FREE}


def training_questions(settings: QaConfig) -> list[Question]:
    """The questions to train on.

    Raises:
      UserError: they cannot be read, or all are held out.
    """
    questions = load(settings.questions, settings)
    if settings.test:
        return questions
    kept, _ = split(questions, settings.holdout)
    if not kept:
        raise UserError(
            f"config.qa.holdout={settings.holdout} holds out all {len(questions)}"
            f" questions of {settings.questions}; lower it or add questions"
        )
    return kept


def test_questions(settings: QaConfig) -> list[Question]:
    """The questions to evaluate on.

    Raises:
      UserError: they cannot be read, or there are none.
    """
    if settings.test:
        return load(settings.test, settings)
    _, held_out = split(load(settings.questions, settings), settings.holdout)
    if not held_out:
        raise UserError(
            f"config.qa.holdout={settings.holdout} holds out no question of"
            f" {settings.questions}; raise it, or name config.qa.test or --questions"
        )
    return held_out


# pytest collects whatever a test module imports under such a name.
test_questions.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def load(source: str, settings: QaConfig) -> list[Question]:
    """All questions of a source; see `QaConfig.questions`."""
    if source != VITAL:
        return load_questions(source, data_dir=settings.data_dir)
    files = importlib.resources.files("realm_retro.data")
    with importlib.resources.as_file(files / f"{VITAL}.jsonl") as path:
        return load_questions(path)


def split(
    questions: Sequence[Question], holdout: float
) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and about the share `holdout` of them to evaluate on.

    A question goes by the hash of its id alone: adding others moves none.
    """
    kept: list[Question] = []
    held_out: list[Question] = []
    for question in questions:
        digest = hashlib.sha256(question.id.encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (held_out if share < holdout else kept).append(question)
    return kept, held_out
