"""BM25 is its formula; what shares no word is not found."""

import builtins
import math
import re

import numpy as np
import pytest

from realm_retro.errors import UserError
from realm_retro.retrieval.bm25 import Bm25

TEXTS = [
    "The cat sat on the mat, the cat slept.",
    "A dog sat on a log and a dog barked at the cat",
    "Nothing about animals",
    "cat",
    "",
    "cat",
]


def formula(query, texts, k1, b):
    """Scores as Lucene defines them, in float64."""
    words = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean = np.mean([len(w) for w in words])
    scores = np.zeros(len(texts))
    for term in re.findall(r"\w\w+", query.lower()):
        frequency = sum(term in w for w in words)
        if not frequency:
            continue
        idf = math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        for i, w in enumerate(words):
            tf = w.count(term)
            if tf:
                scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(w) / mean))
    return scores


@pytest.mark.parametrize("query", ["cat", "the cat sat", "dog dog barked", "log zebra"])
def test_scores_are_the_formula(query):
    index = Bm25.build(TEXTS, stopwords="")
    expected = formula(query, TEXTS, 0.9, 0.4)
    found = index.search([query], len(TEXTS))
    order = [i for i in np.lexsort((range(6), -expected)) if expected[i] > 0]
    assert found.ids[0].tolist() == order + [-1] * (6 - len(order))
    np.testing.assert_allclose(
        found.scores[0, : len(order)], expected[order], rtol=1e-5
    )
    assert (found.scores[0, len(order) :] == -np.inf).all()


def test_parameters_reach_the_formula():
    index = Bm25.build(TEXTS, k1=2.0, b=1.0, stopwords="")
    expected = formula("cat", TEXTS, 2.0, 1.0)
    found = index.search(["cat"], 2)
    np.testing.assert_allclose(found.scores[0], np.sort(expected)[::-1][:2], rtol=1e-5)


def test_ties_go_to_the_smaller_id():
    index = Bm25.build(["same words here"] * 40 + ["other"], stopwords="")
    assert index.search(["words"], 7).ids[0].tolist() == list(range(7))
    assert index.search(["words"], 50).ids[0].tolist() == [*range(40), *[-1] * 10]


def test_stop_words_and_unknown_words_find_nothing():
    index = Bm25.build(TEXTS)
    found = index.search(["the", "", "zebra", "the cat"], 3)
    assert (found.ids[:3] == -1).all()
    assert found.ids.dtype == np.int64
    assert found.scores.dtype == np.float32
    assert found.ids[3].tolist() == [0, 3, 5]
    assert index.size == 6
    assert index.search([], 3).ids.shape == (0, 3)


@pytest.mark.parametrize("texts", [[], ["", "?"], ["the"]])
def test_texts_without_words_are_refused(texts):
    with pytest.raises(UserError, match="holds a word"):
        Bm25.build(texts)


def test_a_missing_package_is_named(monkeypatch):
    def without(name, *args, real=builtins.__import__, **kwargs):
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'realm-retro\[bm25\]'"):
        Bm25.build(TEXTS)
