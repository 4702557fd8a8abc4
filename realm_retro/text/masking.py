"""Which wordpieces of a query are masked: one salient span, a random span, or tokens.

REALM masks one salient span per example (section 3.4 of the paper); the other two are
its ablation. Every function gives positions in the query, int32 [j], ascending. The two
of the ablation also say how many wordpieces they wanted beyond `max_masks`.
"""

from __future__ import annotations

import numpy as np

from realm_retro.typing import HostArray

# SpanBERT's distribution of span lengths, which the paper's ablation takes over.
_SPAN_P = 0.2
_MEAN_RATE = 0.15  # BERT's share of masked tokens


def mask_salient(
    length: int, spans: HostArray, rng: np.random.Generator, max_masks: int
) -> HostArray:
    """Masks one of the salient spans, each with the same probability.

    Args:
      length: wordpieces of the query.
      spans: int [s, 2], [start, end) in wordpieces of the query. Those that do not lie
        in it whole, and those longer than `max_masks`, are never chosen: a target that
        was cut would no longer be a name.
      rng: decides which.
      max_masks: wordpieces masked at most.

    Returns:
      Positions, int32 [j]; none where no span can be chosen.
    """
    usable = usable_spans(length, spans, max_masks)
    if not len(usable):
        return np.zeros(0, np.int32)
    start, end = usable[rng.integers(len(usable))]
    return np.arange(start, end, dtype=np.int32)


def usable_spans(length: int, spans: HostArray, max_masks: int) -> HostArray:
    """The spans that `mask_salient` chooses from, int [s, 2]."""
    spans = np.asarray(spans).reshape(-1, 2)
    start, end = spans.T
    width = end - start
    inside = (start >= 0) & (end <= length)
    return spans[inside & (width > 0) & (width <= max_masks)]


def mask_random_span(
    words: HostArray, rng: np.random.Generator, max_masks: int
) -> tuple[HostArray, int]:
    """Masks a run of whole words; its number of words is geometric, as in SpanBERT.

    Args:
      words: int [w, 2], the query's words in wordpieces; see `word_spans`.
      rng: decides where and how many.
      max_masks: wordpieces masked at most. No run begins with a word longer than that
        if there are others, and a run ends before the word that would go beyond.

    Returns:
      Positions, int32 [j]; none where there is no word that can be masked. And the
      number of wordpieces that the run had behind its end.
    """
    words = np.asarray(words).reshape(-1, 2)
    if not len(words):
        return np.zeros(0, np.int32), 0
    possible = np.flatnonzero(words[:, 1] - words[:, 0] <= max_masks)
    if not len(possible):
        possible = np.arange(len(words))
    wanted = int(rng.geometric(_SPAN_P))
    first = possible[rng.integers(len(possible))]
    start = words[first, 0]
    ends = words[first : first + wanted, 1]
    end = ends[ends - start <= max_masks].max(initial=start)
    return np.arange(start, end, dtype=np.int32), int(ends[-1] - end)


def mask_random_tokens(
    length: int,
    rng: np.random.Generator,
    max_masks: int,
    *,
    rate: float = _MEAN_RATE,
) -> tuple[HostArray, int]:
    """Masks single wordpieces drawn without replacement.

    Args:
      length: wordpieces of the query.
      rng: decides which.
      max_masks: wordpieces masked at most.
      rate: share of the wordpieces that is masked; at least one is.

    Returns:
      Positions, int32 [j]; none for an empty query. And how many more the rate asks for
      than `max_masks` allows.
    """
    wanted = min(max(1, round(rate * length)), length)
    number = min(wanted, max_masks)
    chosen = rng.choice(length, number, replace=False) if number else []
    return np.sort(np.asarray(chosen, np.int32)), wanted - number


def word_spans(ids: HostArray, continuations: HostArray) -> HostArray:
    """The words of a query, int32 [w, 2], [start, end) in wordpieces.

    Args:
      ids: int [length], wordpieces without padding.
      continuations: bool [vocabulary], see `wordpiece.continuations`. The first piece
        begins a word whatever it is.
    """
    begins = ~continuations[np.asarray(ids)]
    begins[:1] = True
    borders = np.append(np.flatnonzero(begins), len(ids))
    return np.stack([borders[:-1], borders[1:]], axis=1).astype(np.int32)


def spans_within(spans: HostArray, start: int, stop: int) -> tuple[HostArray, int]:
    """The spans of a passage that lie in a query cut out of it.

    Args:
      spans: int [s, 2], [start, end) in wordpieces of the passage.
      start: where the query begins in the passage.
      stop: where it ends.

    Returns:
      Those that lie in it whole, int [s', 2], counted from its start; and the number
      that its borders cut.
    """
    spans = np.asarray(spans).reshape(-1, 2)
    touches = (spans[:, 0] < stop) & (spans[:, 1] > start)
    inside = (spans[:, 0] >= start) & (spans[:, 1] <= stop)
    return spans[inside] - start, int((touches & ~inside).sum())
