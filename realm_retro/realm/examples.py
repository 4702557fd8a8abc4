"""Masked queries of pre-training: which passage, which sentence, which wordpieces.

A batch is a pure function of (seed, step). Each example is one sentence of a training
passage; what is masked in it is one salient span, or for the paper's ablation a random
span or random tokens (section 4.3 and table 2 of Guu et al. 2020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from realm_retro.data import chunk_store, loader
from realm_retro.data.passages import PassageStore
from realm_retro.data.span_store import SpanStore
from realm_retro.errors import UserError
from realm_retro.realm.config import MASK_ID, RealmConfig
from realm_retro.text import masking
from realm_retro.typing import Array, Batch, HostArray

MASKINGS = ("salient", "span", "tokens")
# What a batch counts for `lost_share`, one number an example.
COUNTS = ("wanted_targets", "lost_targets")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Where the masked queries of a run come from.

    Attributes:
      store: the passages.
      spans: their salient spans; None unless `masking` is ``salient``.
      config: the model's; lengths are read.
      masking: one of `MASKINGS`.
      seed: of the order and of the masks.
      rows: int64, the passages that are trained on.
      batches: their order.
    """

    store: PassageStore
    spans: SpanStore | None
    config: RealmConfig
    masking: str
    seed: int
    rows: HostArray
    batches: loader.Batches

    def __call__(self, step: int) -> dict[str, HostArray]:
        """The examples of a step.

        Returns:
          ``query`` int32 [b, q] with [MASK] in place, ``query_len`` int32 [b],
          ``mask_positions`` and ``targets`` int32 [b, J], ``target_mask`` bool [b, J],
          all as `objective.pretrain_loss` wants them; ``original`` int32 [b, q], the
          query before masking; ``row`` int64 [b], its passage; ``cut`` int32 [b],
          salient spans that could not be chosen because the query's borders cut them
          or because they are longer than `RealmConfig.max_masks`; ``wanted_targets``
          and ``lost_targets`` int32 [b], wordpieces that were to be masked and those
          of them that these two limits take away. With the masking ``salient`` they
          are those of all spans of the passage, of which one is drawn.
        """
        rows = self.batches[step]["row"]
        made = [
            self._example(int(row), np.random.default_rng((self.seed, step, i)))
            for i, row in enumerate(rows)
        ]
        batch = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return {**batch, "row": rows}

    def _example(
        self, row: int, rng: np.random.Generator
    ) -> Mapping[str, HostArray | np.int32]:
        start, stop, spans, counts = self._sentence(row, rng)
        ids = self.store.body[row][start:stop].astype(np.int32)
        positions, lost = self._positions(ids, spans, rng)
        if self.spans is None:
            counts = _Counts(cut=0, wanted=len(positions) + lost, lost=lost)
        q, j = self.config.query_length, self.config.max_masks
        original = np.zeros(q, np.int32)
        original[: len(ids)] = ids
        query = original.copy()
        query[positions] = MASK_ID
        padded, targets = np.zeros(j, np.int32), np.zeros(j, np.int32)
        padded[: len(positions)] = positions
        targets[: len(positions)] = ids[positions]
        return {
            "query": query,
            "original": original,
            "query_len": np.int32(len(ids)),
            "mask_positions": padded,
            "targets": targets,
            "target_mask": np.arange(j) < len(positions),
            "cut": np.int32(counts.cut),
            "wanted_targets": np.int32(counts.wanted),
            "lost_targets": np.int32(counts.lost),
        }

    def _sentence(
        self, row: int, rng: np.random.Generator
    ) -> tuple[int, int, HostArray, _Counts]:
        """[start, stop) of a sentence, its salient spans, and the passage's counts."""
        limit = self.config.query_length
        borders = [
            (start, min(stop, start + limit))
            for start, stop in self.store.sentences(row)
        ]
        if self.spans is None:
            start, stop = borders[rng.integers(len(borders))]
            return start, stop, np.zeros((0, 2), np.int32), _Counts(0, 0, 0)
        of_passage = self.spans.of(row)
        found = []
        for start, stop in borders:
            inside, _ = masking.spans_within(of_passage, start, stop)
            usable = masking.usable_spans(stop - start, inside, self.config.max_masks)
            if len(usable):
                found.append((start, stop, usable))
        kept = [usable for _, _, usable in found]
        wanted = _pieces(of_passage)
        counts = _Counts(
            cut=len(of_passage) - sum(map(len, kept)),
            wanted=wanted,
            lost=wanted - sum(map(_pieces, kept)),
        )
        if not found:
            start, stop = borders[rng.integers(len(borders))]
            return start, stop, np.zeros((0, 2), np.int32), counts
        return *found[rng.integers(len(found))], counts

    def _positions(
        self, ids: HostArray, spans: HostArray, rng: np.random.Generator
    ) -> tuple[HostArray, int]:
        """Positions, int32 [j], and how many more a random mask would have had."""
        most = self.config.max_masks
        if self.masking == "tokens":
            return masking.mask_random_tokens(len(ids), rng, most)
        if self.masking == "salient":
            # None where every span of the passage was cut: the example weighs nothing,
            # and `cut` says so.
            return masking.mask_salient(len(ids), spans, rng, most), 0
        words = masking.word_spans(ids, self.store.continuations)
        return masking.mask_random_span(words, rng, most)


class _Counts(NamedTuple):
    """What the limits cost.

    Attributes:
      cut: salient spans that cannot be masked whole.
      wanted: wordpieces to be masked.
      lost: those of them that are not.
    """

    cut: int
    wanted: int
    lost: int


def _pieces(spans: HostArray) -> int:
    """Wordpieces of spans, int [s, 2], together."""
    return int((spans[:, 1].astype(np.int64) - spans[:, 0]).sum())


def lost_share(batch: Batch) -> tuple[Array, Array]:
    """The share of targets that are lost, as a metric: sum and weight."""
    return batch["lost_targets"].sum(), batch["wanted_targets"].sum()


def make(
    store: PassageStore,
    spans: SpanStore | None,
    config: RealmConfig,
    *,
    masking: str,
    seed: int,
    batch_size: int,
) -> Examples:
    """The examples of a run.

    Args:
      store: the passages.
      spans: their salient spans, for the masking ``salient``.
      config: the model's.
      masking: one of `MASKINGS`.
      seed: of the order and of the masks.
      batch_size: examples of a step.

    Raises:
      UserError: there is nothing to train on.
    """
    rows = store.passages_of(chunk_store.TRAIN)
    if masking == "salient":
        if spans is None:
            raise ValueError("the masking 'salient' needs spans")
        rows = rows[_has_usable_span(spans, config.max_masks)[rows]]
    else:
        spans = None
    if not len(rows):
        raise UserError(
            f"{store.manifest.directory}: no training passage has anything to mask"
            f" (config.pretrain.masking={masking}); add text, or use masking=span"
        )
    order = loader.batches(loader.Rows(rows), seed=seed, batch_size=batch_size)
    return Examples(store, spans, config, masking, seed, rows, order)


def _has_usable_span(spans: SpanStore, most: int) -> HostArray:
    """Bool [passages]: whether a span is short enough to be masked whole."""
    all_spans = np.concatenate(spans.spans.shards)
    fits = np.flatnonzero(all_spans[:, 1] - all_spans[:, 0] <= most)
    owner = np.searchsorted(spans.offsets, fits, side="right") - 1
    return np.bincount(owner, minlength=len(spans)) > 0
