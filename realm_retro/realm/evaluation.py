"""Measures of question answering, with intervals over questions; NumPy alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from realm_retro.data.questions import Question
from realm_retro.text import answers
from realm_retro.typing import HostArray, JsonDict

MEASURES = ("exact_match", "f1", "regex_match")

# Rows of gold documents where there is none: unknown, or not in the corpus.
NO_GOLD, GOLD_ELSEWHERE = -1, -2

_RESAMPLES = 2000
_ROWS_AT_ONCE = 1 << 22


def recall(has: HostArray, k: int) -> HostArray:
    """Whether one of the first k passages has an answer.

    Args:
      has: bool [questions, found], whether a passage has an answer; best first.
      k: how many count; where fewer were found, these.

    Returns:
      float64 [questions], 0 or 1.
    """
    return np.asarray(has[:, :k].any(axis=1), np.float64)


def gold_rows(questions: Sequence[Question], documents: Iterable[str]) -> HostArray:
    """The gold document of each question.

    Args:
      questions: see `Question.document`.
      documents: ids of the corpus, in its order.

    Returns:
      int64 [questions], places in `documents`; `NO_GOLD` where a question names none,
      `GOLD_ELSEWHERE` where it is not among them.
    """
    named = {question.document for question in questions} - {""}
    if not named:
        return np.full(len(questions), NO_GOLD, np.int64)
    rows = {
        identity: row for row, identity in enumerate(documents) if identity in named
    }
    rows[""] = NO_GOLD
    found = [rows.get(question.document, GOLD_ELSEWHERE) for question in questions]
    return np.asarray(found, np.int64)


def gold_recall(found: HostArray, gold: HostArray, k: int) -> HostArray:
    """Whether one of the first k passages is of the question's gold document.

    Args:
      found: int64 [questions, found], the document of each passage, best first; −1
        where fewer were found.
      gold: int64 [questions], of `gold_rows`; a document that is elsewhere is a miss.
      k: how many count; where fewer were found, these.

    Returns:
      float64 [questions], 0 or 1; NaN where a question has no gold document.
    """
    hit = (found[:, :k] == gold[:, None]) & (gold[:, None] >= 0)
    return np.where(gold == NO_GOLD, np.nan, hit.any(axis=1))


def scores(
    predictions: Sequence[str], questions: Sequence[Question]
) -> dict[str, HostArray]:
    """Scores of each prediction.

    Returns:
      Name of `MEASURES` → float64 [questions]. Exact match and F1 are NaN where the
      answers are regular expressions, and `regex_match` where they are not.
    """
    found = {name: np.full(len(questions), np.nan) for name in MEASURES}
    for i, (text, question) in enumerate(zip(predictions, questions, strict=True)):
        if question.is_regex:
            found["regex_match"][i] = answers.regex_match(text, question.answers)
        else:
            found["exact_match"][i] = answers.exact_match(text, question.answers)
            found["f1"][i] = answers.f1(text, question.answers)
    return found


def interval(values: HostArray, *, seed: int = 0) -> JsonDict | None:
    """A mean with its 95 % bootstrap interval over questions.

    Args:
      values: float64 [questions]; NaN where a question has none.
      seed: of the resampling.

    Returns:
      ``value``, ``low``, ``high`` and ``questions``; None where no question has one.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, _ROWS_AT_ONCE // len(values))
    means = [
        values[rng.integers(len(values), size=(min(at_once, left), len(values)))].mean(
            1
        )
        for left in range(_RESAMPLES, 0, -at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {
        "value": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "questions": len(values),
    }
