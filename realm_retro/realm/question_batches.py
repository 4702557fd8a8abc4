"""Batches of questions: what was found, what of it answers, and where in it.

Host arrays, and pure functions of what a search found; see `realm_retro.realm.qa` for
what each array means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from realm_retro.arrays import ShardedArray
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.passages import PassageStore
from realm_retro.data.questions import Question
from realm_retro.errors import UserError
from realm_retro.realm import evaluation, qa, search
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.question_sets import QaConfig
from realm_retro.retrieval.index.base import MISSING_ID
from realm_retro.text import answers
from realm_retro.typing import HostArray

# Pairs of a question and a passage whose answer spans are remembered.
_REMEMBERED = 1 << 16


class Examples:
    """Batches of questions from what a search found; host arrays, pure functions."""

    def __init__(
        self,
        config: RealmConfig,
        settings: QaConfig,
        store: PassageStore,
        questions: Sequence[Question],
        answer_store: AnswerStore,
        vectors: ShardedArray | HostArray,
    ):
        """Tokenises the questions and picks those to train on.

        Args:
          config: the model's.
          settings: the beam, what is read, and what is left out.
          store: the passages.
          questions: to train on.
          answer_store: of these questions, in this order, over these passages.
          vectors: float [N, d] of the passages.

        Raises:
          UserError: no passage answers any question.
        """
        if len(questions) != len(answer_store):
            raise ValueError(
                f"{len(questions)} questions, {len(answer_store)} answered"
            )
        self.config, self.settings, self.store = config, settings, store
        self.questions, self._answers, self._vectors = questions, answer_store, vectors
        self.query, self.query_len, self.cut = search.tokenise_questions(
            config, store.tokenizer, [question.question for question in questions]
        )
        self.unanswerable = int((answer_store.counts == 0).sum())
        keep = answer_store.counts > 0
        if not settings.drop_unanswerable:
            keep = np.ones_like(keep)
        self.rows = np.flatnonzero(keep)
        if not self.unanswerable < len(questions):
            raise UserError(
                f"{store.manifest.directory}: no passage answers any of the"
                f" {len(questions)} questions; train on questions of this corpus"
            )
        documents = (store.document_id(row) for row in range(store.num_documents))
        self.gold = evaluation.gold_rows(questions, documents)
        self._spans = functools.lru_cache(_REMEMBERED)(self._find_spans)

    @property
    def names_gold(self) -> bool:
        """Whether any question names a gold document."""
        return bool((self.gold != evaluation.NO_GOLD).any())

    @property
    def beam(self) -> int:
        """Passages that are searched for."""
        return min(self.settings.beam, len(self.store))

    def __len__(self) -> int:
        """Questions that are trained on."""
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, HostArray]:
        """The number of one of them, among all."""
        return {"question": self.rows[place]}

    def batch(self, questions: HostArray, ids: HostArray) -> dict[str, HostArray]:
        """The arrays of `batch_spec`.

        Args:
          questions: int [b], numbers of questions.
          ids: int [b, beam], passages, best first; −1 where fewer were found.
        """
        k = self.settings.read
        # A corpus may have fewer passages than are read: places without one.
        short = max(k - ids.shape[1], 0)
        ids = np.pad(ids, [(0, 0), (0, short)], constant_values=MISSING_ID)
        valid = ids != MISSING_ID
        has = self._answers.has(questions, ids)
        correct, unreachable = self._correct(questions, ids[:, :k], has[:, :k])
        batch = {
            "query": self.query[questions],
            "query_len": self.query_len[questions],
            "beam_vectors": np.asarray(self._vectors[np.maximum(ids, 0)], np.float32),
            "beam_valid": valid,
            "beam_has": has,
            "slots": np.broadcast_to(np.arange(k, dtype=np.int32), (len(ids), k)),
            **bodies(self.store, ids[:, :k], self.config.body_length),
            "correct": correct,
            "unreachable": unreachable,
            **self._gold_found(questions, ids[:, :k]),
        }
        if self.settings.train_documents:
            batch |= _titles(self.store, ids[:, :k], self.config.title_length)
        return batch

    def _gold_found(self, questions: HostArray, ids: HostArray) -> dict[str, HostArray]:
        """Whether a question names its gold document, and whether that is read."""
        gold = self.gold[questions]
        there = ids != MISSING_ID
        documents = self.store.document[np.maximum(ids, 0)]
        found = np.where(there, documents, MISSING_ID)
        return {
            "gold_named": (gold != evaluation.NO_GOLD).astype(np.float32),
            "gold_read": np.nan_to_num(
                evaluation.gold_recall(found, gold, ids.shape[1])
            ).astype(np.float32),
        }

    def _correct(
        self, questions: HostArray, ids: HostArray, has: HostArray
    ) -> tuple[HostArray, HostArray]:
        length, width = self.config.body_length, self.config.span_width
        correct = np.zeros((*ids.shape, length, width), bool)
        unreachable = np.zeros(len(ids), np.float32)
        # Only what the answer store names: the two follow one rule.
        for row, slot in np.argwhere(has):
            spans = self._spans(int(questions[row]), int(ids[row, slot]))
            correct[row, slot], lost = qa.correct_spans(spans, length, width)
            unreachable[row] += lost
        return correct, unreachable

    def _find_spans(self, question: int, passage: int) -> HostArray:
        asked = self.questions[question]
        text = self.store.text(passage)
        found = answers.answer_spans(text, asked.answers, asked.is_regex)
        return answers.token_spans(self.store.token_spans(passage), found)


def bodies(store: PassageStore, ids: HostArray, length: int) -> dict[str, HostArray]:
    """``body`` int32 [..., length] and ``body_len`` int32 [...]; 0 where ids are −1."""
    there = ids != MISSING_ID
    rows = np.maximum(ids, 0)
    body = np.zeros((*ids.shape, length), np.int32)
    # A caller may ask for less than a store's width where its passages are shorter.
    width = min(length, store.length)
    body[..., :width] = store.body[rows][..., :width] * there[..., None]
    return {"body": body, "body_len": (store.lengths[rows] * there).astype(np.int32)}


def check_fits(
    config: RealmConfig, store: PassageStore, vectors: Sequence[int]
) -> None:
    """Checks that passages fit a model, and an index fits both.

    Args:
      config: the model's.
      store: the passages.
      vectors: shape of the index's vectors.

    Raises:
      UserError: they do not.
    """
    if tuple(vectors) != (len(store), config.vector_dim):
        raise UserError(
            f"the index has vectors of shape {tuple(vectors)}, but"
            f" {store.manifest.directory} and config.model ask for"
            f" {(len(store), config.vector_dim)}: it is of another corpus or encoder"
        )
    for name in ("length", "title_length"):
        allowed = "body_length" if name == "length" else name
        if getattr(store, name) > getattr(config, allowed):
            raise UserError(
                f"{store.manifest.directory}: config.passages.{name} was"
                f" {getattr(store, name)}, above config.model.{allowed}="
                f"{getattr(config, allowed)}; raise config.model.{allowed}"
            )


def _titles(store: PassageStore, ids: HostArray, length: int) -> dict[str, HostArray]:
    there = ids != MISSING_ID
    tokens, lengths = store.title_tokens(np.maximum(ids, 0))
    title = np.zeros((*ids.shape, length), np.int32)
    title[..., : store.title_length] = tokens * there[..., None]
    return {"title": title, "title_len": (lengths * there).astype(np.int32)}
