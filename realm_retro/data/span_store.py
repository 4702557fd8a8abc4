"""The span store: the salient spans of every passage, in its wordpieces.

Layout (kind ``spans``), one pair of files for every `shard_passages` passages:

* ``counts-00000-of-00003.npy``  int32 [passages]; spans of each passage
* ``spans-00000-of-00003.npy``   int32 [spans, 2]; [start, end) in the passage's body
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray, write_npy
from realm_retro.data.chunk_store import shard_name
from realm_retro.errors import UserError
from realm_retro.typing import HostArray, JsonDict

KIND = "spans"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.tag_spans"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)
PARTS = ("counts", "spans")
TAGGERS = ("default", "spacy", "rules", "annotations")


@dataclasses.dataclass(frozen=True)
class SpansConfig:
    """How salient spans are found (``config.spans``).

    Attributes:
      tagger: ``spacy``, ``rules``, ``default`` (spaCy where it is installed, else the
        rules), or ``annotations``, which reads `path`.
      path: of ``annotations``: a .jsonl file (also .gz, .xz) of documents, a line each
        ``{"id": …, "spans": [[start, end], …]}`` in bytes of the document's UTF-8 text.
      max_masks: wordpieces that pre-training masks at most; longer spans are kept, and
        counted, because they are never chosen.
      shard_passages: passages of one pair of files, the unit of resuming.
    """

    tagger: str = "default"
    path: str = ""
    max_masks: int = 10
    shard_passages: int = 4096

    def __post_init__(self):
        if self.tagger not in TAGGERS:
            raise UserError(
                f"config.spans.tagger is {self.tagger!r}; choose one of"
                f" {', '.join(TAGGERS)}"
            )
        if (self.tagger == "annotations") != bool(self.path):
            raise UserError(
                f"config.spans.path is {self.path!r}, config.spans.tagger"
                f" {self.tagger!r}: annotations are read from a path, and only they are"
            )
        for name in ("max_masks", "shard_passages"):
            if getattr(self, name) < 1:
                raise UserError(f"config.spans.{name} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class SpanStore:
    """Salient spans by passage.

    Attributes:
      offsets: int64 [N + 1]; passage i has the rows ``offsets[i]`` …
        ``offsets[i + 1] - 1`` of `spans`.
      spans: int32 [M, 2], [start, end) in wordpieces of the passage, whole words;
        ascending in each passage, none twice.
      manifest: of the artefact.
    """

    offsets: HostArray
    spans: ShardedArray
    manifest: artifacts.Manifest

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> SpanStore:
        """Opens a finished store.

        Args:
          directory: of the artefact.
          parents: role → fingerprint that it must have been made from; ``passages``.
          verify: recompute the checksums of all files.

        Raises:
          UserError: it is missing, unfinished or damaged, or of other passages.
        """
        manifest = load_manifest(directory, parents=parents, verify=verify)
        num_shards = manifest.meta["num_shards"]
        counts, spans = (
            ShardedArray.open(
                [
                    manifest.path(shard_name(part, i, num_shards))
                    for i in range(num_shards)
                ]
            )
            for part in PARTS
        )
        sizes = np.concatenate(counts.shards)
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return cls(offsets=offsets, spans=spans, manifest=manifest)

    @property
    def fingerprint(self) -> str:
        """The artefact's fingerprint."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """The number of passages (N)."""
        return len(self.offsets) - 1

    def of(self, row: int) -> HostArray:
        """The spans of one passage, int32 [s, 2]."""
        return self.spans[int(self.offsets[row]) : int(self.offsets[row + 1])]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Spans of one passage in its wordpieces.

    Attributes:
      spans: int32 [s, 2], ascending, none twice.
      widened: of the spans given, how many began or ended within a word.
      empty: how many hold no wordpiece and are left out.
    """

    spans: HostArray
    widened: int
    empty: int


def align(
    spans: Sequence[tuple[int, int]], pieces: HostArray, continues: HostArray
) -> Aligned:
    """From bytes to wordpieces: every span becomes the words that it touches.

    Args:
      spans: [start, end) in bytes of the passage's text.
      pieces: int [n, 2], the wordpieces in the same bytes, see
        `PassageStore.token_spans`.
      continues: bool [n], the pieces that go on with a word.
    """
    given = np.asarray(spans, np.int64).reshape(-1, 2)
    # The first piece that ends after the start, the last that starts before the end.
    first = np.searchsorted(pieces[:, 1], given[:, 0], side="right")
    last = np.searchsorted(pieces[:, 0], given[:, 1], side="left") - 1
    filled = (first <= last) & (given[:, 0] < given[:, 1])
    (start, end), first, last = given[filled].T, first[filled], last[filled]
    begins = ~continues
    begins[:1] = True
    word_starts = np.flatnonzero(begins)
    word_ends = np.append(word_starts[1:], len(pieces))
    whole_start = word_starts[np.searchsorted(word_starts, first, side="right") - 1]
    whole_end = word_ends[np.searchsorted(word_starts, last, side="right") - 1]
    widened = (
        (whole_start < first)
        | (whole_end > last + 1)
        | (pieces[first, 0] < start)
        | (pieces[last, 1] > end)
    )
    found = np.unique(np.stack([whole_start, whole_end], axis=1), axis=0)
    return Aligned(
        spans=found.astype(np.int32),
        widened=int(widened.sum()),
        empty=len(given) - int(filled.sum()),
    )


def open_stage(
    directory: epath.PathLike,
    *,
    config: JsonDict,
    passages_fingerprint: str,
) -> artifacts.Stage:
    """The stage that writes the spans; `Stage.finished` tells whether it ran."""
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config=config,
        parents={"passages": passages_fingerprint},
        made_by=MADE_BY,
    )


def write_shard(
    stage: artifacts.Stage, shard: int, num_shards: int, found: Sequence[HostArray]
) -> None:
    """Writes one pair of files.

    Args:
      stage: what `open_stage` opened.
      shard: its number.
      num_shards: of all.
      found: for each passage of the shard int [s, 2].
    """
    arrays = {
        "counts": np.asarray([len(spans) for spans in found], np.int32),
        "spans": np.concatenate([np.zeros((0, 2), np.int32), *found]).astype(np.int32),
    }
    for part, array in arrays.items():
        with stage.write(shard_name(part, shard, num_shards)) as path:
            write_npy(path, array)
