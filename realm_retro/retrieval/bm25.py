"""BM25 (Robertson et al. 1994), the lexical baseline beside every dense retriever.

A thin layer over the package ``bm25s``, which computes the score of each word in each
text once. Words are runs of two or more letters or digits in lower case, without the
stop words of a language; there is no stemming.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from realm_retro.errors import UserError
from realm_retro.retrieval.index.base import SearchResult
from realm_retro.typing import HostArray

# As in Anserini and in the published comparisons with dense retrievers.
K1 = 0.9
B = 0.4


@dataclasses.dataclass(frozen=True)
class Bm25:
    """Texts that can be searched for words; ids are their places, from 0.

    Attributes:
      size: how many texts there are.
    """

    size: int
    _index: Any
    _stopwords: str

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        *,
        k1: float = K1,
        b: float = B,
        stopwords: str = "en",
    ) -> Bm25:
        """Indexes texts, about 5,000 of 100 words a second.

        Args:
          texts: with whatever shall be found by, e.g. title and body.
          k1: how slowly a repeated word adds less.
          b: how much longer texts are held against them.
          stopwords: code of a language that ``bm25s`` has a list for; "" for none.

        Raises:
          UserError: the package is not installed, or no text holds a word.
        """
        bm25s = _library()
        tokens = _tokens(bm25s, list(texts), stopwords)
        if not any(word for words in tokens for word in words):
            raise UserError(
                f"BM25: none of the {len(tokens)} texts holds a word; it needs words"
                " between spaces"
            )
        index = bm25s.BM25(method="lucene", k1=k1, b=b)
        index.index(tokens, show_progress=False)
        return cls(len(tokens), index, stopwords)

    def search(self, questions: Sequence[str], k: int) -> SearchResult:
        """The k best texts of each question.

        Equal scores go to the smaller id. A text that shares no word with the question
        is not found: −1 and −inf stand in its place.
        """
        result = SearchResult.missing(len(questions), k)
        asked = _tokens(_library(), list(questions), self._stopwords)
        for row, words in enumerate(asked):
            known = [word for word in words if word in self._index.vocab_dict]
            if not known:
                continue
            scores = self._index.get_scores(known)
            best = _best(scores, k)
            result.ids[row, : len(best)] = best
            result.scores[row, : len(best)] = scores[best]
        return result


def _best(scores: HostArray, k: int) -> HostArray:
    """Places of the k highest positive scores, ties by place."""
    found = np.flatnonzero(scores > 0)
    if len(found) > k:
        least = np.partition(scores[found], -k)[-k]
        found = found[scores[found] >= least]
    return found[np.lexsort((found, -scores[found]))][:k]


def _tokens(bm25s: Any, texts: list[str], stopwords: str) -> list[list[str]]:
    if not texts:
        return []
    return bm25s.tokenize(
        texts, stopwords=stopwords or None, return_ids=False, show_progress=False
    )


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise UserError(
            "BM25 needs the package bm25s; run: pip install 'realm-retro[bm25]'"
        ) from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
