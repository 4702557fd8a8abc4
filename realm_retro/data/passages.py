"""The passage store: a corpus as passages of wordpieces, memory-mapped.

Layout (kind ``passages``), one set of files for every `shard_documents` documents:

* ``body-00000-of-00003.npy``       uint16 or uint32 [passages, length], padded with 0
* ``passages-00000-of-00003.npy``   `PASSAGE` records [passages]
* ``titles-00000-of-00003.npy``     uint16 or uint32 [documents, title_length]
* ``documents-00000-of-00003.npy``  `DOCUMENT` records [documents]
* ``strings-00000-of-00003.npy``    uint8 [bytes]; id and title of each document
* ``texts-00000-of-00003.npy``      uint8 [bytes]; the text of each document
* ``tokenizer.json``                the WordPiece tokenizer

WordPiece gives no text back, so the text itself is kept. A passage's text tokenises to
exactly its ids: `realm_retro.data.passage_writer` sees to it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.data.chunk_store import SPLITS, shard_name
from realm_retro.errors import UserError
from realm_retro.text import wordpiece
from realm_retro.text.sentences import sentence_starts
from realm_retro.typing import HostArray

KIND = "passages"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.prepare"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)
TOKENIZER = "tokenizer.json"
PARTS = ("body", "passages", "titles", "documents", "strings", "texts")

PASSAGE = np.dtype(
    [
        ("document", "<i4"),
        ("length", "<i4"),  # wordpieces
        ("bytes", "<i8", (2,)),  # [start, end) in the document's UTF-8 text
    ]
)
DOCUMENT = np.dtype(
    [
        ("num_passages", "<i8"),
        ("id_end", "<i8"),  # where the id ends and the title begins in `strings`
        ("title_end", "<i8"),
        ("text_end", "<i8"),  # in `texts`
        ("title_length", "<i4"),  # wordpieces
        ("split", "u1"),
    ]
)


@dataclasses.dataclass(frozen=True)
class PassageConfig:
    """How documents become passages (``config.passages``).

    Attributes:
      length: wordpieces of a passage at most, special tokens not counted.
      title_length: wordpieces of a title that are kept.
      stride: wordpieces from the start of one passage to the start of the next, moved
        back to the nearest word; 0 begins each where the last one ended.
      validation_fraction: probability that a document is held out. These three draw as
        ``config.chunks`` does: the same values give a document the same split.
      train_fraction: of the others, the probability that a document is trained on.
      seed: of that draw.
      shard_documents: documents of one set of files, the unit of resuming.
    """

    length: int = 288
    title_length: int = 32
    stride: int = 0
    validation_fraction: float = 0.02
    train_fraction: float = 1.0
    seed: int = 0
    shard_documents: int = 4096

    def __post_init__(self):
        for name in ("length", "title_length", "shard_documents"):
            if getattr(self, name) < 1:
                raise UserError(f"config.passages.{name} must be 1 or more")
        if not 0 <= self.stride <= self.length:
            raise UserError(
                f"config.passages.stride={self.stride} would leave text out; it goes"
                f" from 0 (no overlap) to config.passages.length={self.length}"
            )
        for name in ("validation_fraction", "train_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"config.passages.{name} is {getattr(self, name)}; it is a"
                    " probability from 0 to 1"
                )


@dataclasses.dataclass(frozen=True)
class PassageStore:
    """A corpus as passages. Passage ids are rows 0 … N − 1; see the module docstring.

    Attributes:
      body: uint16 (uint32 for large vocabularies) [N, length], padded with 0.
      lengths: int32 [N], wordpieces of each passage; never 0.
      document: int32 [N], row of the passage's document; never decreases.
      byte_offsets: int64 [N, 2], [start, end) in the document's UTF-8 text.
      first_passage: int64 [documents + 1]; document d has the passages
        ``first_passage[d]`` … ``first_passage[d + 1] - 1``, possibly none.
      split: uint8 [documents], `TRAIN`, `DATABASE` or `VALIDATION` of
        `realm_retro.data.chunk_store`.
      tokenizer: it made the wordpieces.
      manifest: of the artefact.
    """

    body: ShardedArray
    lengths: ShardedArray
    document: ShardedArray
    byte_offsets: ShardedArray
    first_passage: HostArray
    split: HostArray
    tokenizer: tokenizers.Tokenizer
    manifest: artifacts.Manifest
    _titles: ShardedArray
    _records: ShardedArray
    _strings: Sequence[HostArray]
    _texts: Sequence[HostArray]

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> PassageStore:
        """Opens a finished store.

        Args:
          directory: of the artefact.
          parents: role → fingerprint that it must have been made from, or None.
          verify: recompute the checksums of all files.

        Raises:
          UserError: it is missing, unfinished or damaged.
        """
        return from_manifest(load_manifest(directory, parents=parents, verify=verify))

    @property
    def fingerprint(self) -> str:
        """The artefact's fingerprint."""
        return self.manifest.fingerprint

    @property
    def length(self) -> int:
        """Wordpieces of a passage at most."""
        return self.body.shape[1]

    @property
    def title_length(self) -> int:
        """Wordpieces of a title at most."""
        return self._titles.shape[1]

    @property
    def num_documents(self) -> int:
        """Documents, those without a passage included."""
        return len(self.split)

    @functools.cached_property
    def continuations(self) -> HostArray:
        """Which ids go on with a word; bool [vocabulary]."""
        return wordpiece.continuations(self.tokenizer)

    def __len__(self) -> int:
        """The number of passages (N)."""
        return len(self.body)

    def passages_of(self, split: int) -> HostArray:
        """Rows of the passages of one split, ascending, int64."""
        if split not in SPLITS.values():
            raise ValueError(f"split {split} is none of {SPLITS}")
        return np.flatnonzero(np.repeat(self.split == split, self._num_passages))

    def title_tokens(self, rows: Sequence[int] | HostArray) -> tuple[HostArray, ...]:
        """Wordpieces of the titles of passages' documents.

        Args:
          rows: int [...], passages.

        Returns:
          Ids uint16 (as `body`) [..., title_length], padded with 0, and lengths int32
          [...]. A document without a title has length 0.
        """
        documents = self.document[np.asarray(rows, np.int64)]
        return self._titles[documents], self._records[documents]["title_length"]

    def title(self, row: int) -> str:
        """The title of a passage's document, possibly empty."""
        return self.document_title(int(self.document[row]))

    def text(self, row: int) -> str:
        """A passage's text, as it stands in its document."""
        return self._text_bytes(row).decode()

    def texts(self, rows: Sequence[int] | HostArray) -> list[str]:
        """The texts of several passages."""
        return [self.text(int(row)) for row in np.asarray(rows).reshape(-1)]

    def document_id(self, document: int) -> str:
        """A document's id; `document` is a row of the corpus."""
        return self._string(document, "id_end")

    def document_title(self, document: int) -> str:
        """A document's title, possibly empty."""
        return self._string(document, "title_end")

    def document_text(self, document: int) -> str:
        """A document's whole text."""
        texts, start, end = self._text_range(document)
        return texts[start:end].tobytes().decode()

    def token_spans(self, row: int) -> HostArray:
        """Where a passage's wordpieces stand in `text`; see `token_spans_of`."""
        return self.token_spans_of([row])[0]

    def token_spans_of(self, rows: Sequence[int] | HostArray) -> list[HostArray]:
        """Where the wordpieces of passages stand in their texts.

        Returns:
          For each passage int32 [n, 2], [start, end) in bytes of its text's UTF-8.
        """
        texts = self.texts(rows)
        return [
            wordpiece.byte_positions(text)[pieces.chars].astype(np.int32)
            for text, pieces in zip(texts, self._pieces(rows, texts), strict=True)
        ]

    def sentences(self, row: int) -> HostArray:
        """A passage's sentences as wordpieces, in order; they leave out none.

        Returns:
          int32 [sentences, 2], [start, end) in `body`.
        """
        text = self.text(row)
        [pieces] = self._pieces([row], [text])
        starts = np.searchsorted(pieces.chars[:, 0], sentence_starts(text))
        borders = np.unique([0, *starts, len(pieces.ids)])
        return np.stack([borders[:-1], borders[1:]], axis=1).astype(np.int32)

    @functools.cached_property
    def _num_passages(self) -> HostArray:
        return np.diff(self.first_passage)

    def _pieces(
        self, rows: Sequence[int] | HostArray, texts: Sequence[str]
    ) -> list[wordpiece.Pieces]:
        found = wordpiece.encode(self.tokenizer, texts)
        for row, pieces in zip(rows, found, strict=True):
            # The writer saw to it; a newer library might tokenise otherwise.
            if not np.array_equal(pieces.ids, self.body[row][: self.lengths[row]]):
                raise UserError(
                    f"{self.manifest.directory}: passage {row} is tokenised otherwise"
                    f" than when it was written; delete that folder and run: python -m"
                    f" {MADE_BY}"
                )
        return found

    def _text_bytes(self, row: int) -> bytes:
        texts, first, _ = self._text_range(int(self.document[row]))
        start, end = self.byte_offsets[row] + first
        return texts[start:end].tobytes()

    def _text_range(self, document: int) -> tuple[HostArray, int, int]:
        shard, before = self._before(document)
        start = int(self._records[before]["text_end"]) if before >= 0 else 0
        return self._texts[shard], start, int(self._records[document]["text_end"])

    def _string(self, document: int, end: str) -> str:
        shard, before = self._before(document)
        record = self._records[document]
        start = int(self._records[before]["title_end"]) if before >= 0 else 0
        if end == "title_end":
            start = record["id_end"]
        return self._strings[shard][start : record[end]].tobytes().decode()

    def _before(self, document: int) -> tuple[int, int]:
        # The shard of a document, and the document before it there; −1 for none.
        starts = self._records.starts
        shard = int(np.searchsorted(starts, document, side="right")) - 1
        return shard, document - 1 if document > starts[shard] else -1


def from_manifest(manifest: artifacts.Manifest) -> PassageStore:
    """Memory-maps the files of a checked manifest."""
    num_shards = manifest.meta["num_shards"]
    opened = {
        part: ShardedArray.open(
            [manifest.path(shard_name(part, i, num_shards)) for i in range(num_shards)]
        )
        for part in PARTS
    }
    passages, records = opened["passages"], opened["documents"]
    num_passages = np.concatenate(_field(records, "num_passages").shards)
    return PassageStore(
        body=opened["body"],
        lengths=_field(passages, "length"),
        document=_field(passages, "document"),
        byte_offsets=_field(passages, "bytes"),
        first_passage=np.concatenate([[0], np.cumsum(num_passages)]),
        split=np.concatenate(_field(records, "split").shards),
        tokenizer=wordpiece.load_tokenizer(manifest.path(TOKENIZER)),
        manifest=manifest,
        _titles=opened["titles"],
        _records=records,
        _strings=opened["strings"].shards,
        _texts=opened["texts"].shards,
    )


def _field(array: ShardedArray, name: str) -> ShardedArray:
    # A field of a memory-mapped record array is a view: nothing is read yet.
    return ShardedArray([shard[name] for shard in array.shards])
