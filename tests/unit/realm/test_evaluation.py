"""Measures count each question once, and only where they apply."""

import numpy as np
import pytest

from realm_retro.data.questions import Question
from realm_retro.realm import evaluation

QUESTIONS = [
    Question("1", "who", ("Jane Austen", "Austen")),
    Question("2", "when", ("(August )?1977",), is_regex=True),
    Question("3", "where", ("The Hague",)),
]


def test_recall_counts_questions():
    has = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], bool)
    assert evaluation.recall(has, 1).tolist() == [0, 0, 1, 0]
    assert evaluation.recall(has, 2).tolist() == [1, 0, 1, 0]
    assert evaluation.recall(has, 100).tolist() == [1, 0, 1, 1]


def test_gold_documents_are_found_by_their_ids():
    asked = [Question(str(i), "q", ("a",), document=d) for i, d in enumerate("cx-a")]
    asked[2] = Question("2", "q", ("a",))
    gold = evaluation.gold_rows(asked, iter(["a", "b", "c", ""]))
    assert gold.tolist() == [2, evaluation.GOLD_ELSEWHERE, evaluation.NO_GOLD, 0]
    # Documents of what was found; −1 is a passage that is missing, not a document.
    found = np.array([[0, 2, 2], [0, 1, -1], [2, 0, 1], [-1, -1, -1]])
    nan = np.nan
    for k, expected in [(1, [0, 0, nan, 0]), (2, [1, 0, nan, 0]), (9, [1, 0, nan, 0])]:
        np.testing.assert_array_equal(
            evaluation.gold_recall(found, gold, k), np.array(expected, float)
        )


def test_scores_go_where_they_apply():
    found = evaluation.scores(["austen", "August 1977 or so", "Hague city"], QUESTIONS)
    assert set(found) == set(evaluation.MEASURES)
    np.testing.assert_array_equal(found["exact_match"], [1, np.nan, 0])
    np.testing.assert_allclose(found["f1"], [1, np.nan, 2 / 3])
    np.testing.assert_array_equal(found["regex_match"], [np.nan, 1, np.nan])


def test_an_interval_is_of_a_mean():
    values = np.array([1.0] * 30 + [0.0] * 70)
    found = evaluation.interval(values)
    assert found["value"] == pytest.approx(0.3)
    # 1.96 · sqrt(0.3 · 0.7 / 100) = 0.09
    assert found["low"] == pytest.approx(0.21, abs=0.02)
    assert found["high"] == pytest.approx(0.39, abs=0.02)
    assert found["questions"] == 100
    assert evaluation.interval(values) == found
    with_gaps = evaluation.interval(np.concatenate([values, [np.nan] * 50]))
    assert with_gaps == found
    assert evaluation.interval(np.array([np.nan])) is None
    same = evaluation.interval(np.ones(5))
    assert (same["low"], same["high"]) == (1, 1)


def test_many_questions_take_little_memory(monkeypatch):
    values = np.random.default_rng(0).random(50)
    expected = evaluation.interval(values)
    monkeypatch.setattr(evaluation, "_ROWS_AT_ONCE", 170)
    found = evaluation.interval(values)
    assert found["low"] == pytest.approx(expected["low"], abs=0.02)
