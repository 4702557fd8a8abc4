"""The chunk store: a corpus as chunks of m tokens, memory-mapped.

Layout (kind ``chunks``), one set of files for every `shard_documents` documents:

* ``tokens-00000-of-00003.npy``     uint16 or uint32 [chunks, m]
* ``chunks-00000-of-00003.npy``     `CHUNK` records [chunks]
* ``documents-00000-of-00003.npy``  `DOCUMENT` records [documents]
* ``strings-00000-of-00003.npy``    uint8 [bytes]; id and title of each document
* ``tokenizer.model``               the SentencePiece model

`realm_retro.data.chunk_writer` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.text.tokenizer import Tokenizer
from realm_retro.typing import HostArray

KIND = "chunks"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.prepare"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)
TOKENIZER = "tokenizer.model"
PARTS = ("tokens", "chunks", "documents", "strings")

# Chunks of TRAIN and DATABASE documents are retrieved from; only TRAIN is trained on.
TRAIN, DATABASE, VALIDATION = 0, 1, 2
SPLITS = {"train": TRAIN, "database": DATABASE, "validation": VALIDATION}

CHUNK = np.dtype(
    [
        ("document", "<i4"),
        ("length", "<i4"),  # real tokens, BOS and EOS included
        ("bytes", "<i8", (2,)),  # [start, end) in the document's UTF-8 text
    ]
)
DOCUMENT = np.dtype(
    [
        ("num_chunks", "<i8"),
        ("num_bytes", "<i8"),  # of the UTF-8 text
        ("id_end", "<i8"),  # where the id ends and the title begins in `strings`
        ("title_end", "<i8"),
        ("split", "u1"),
    ]
)


def shard_name(part: str, shard: int, num_shards: int) -> str:
    """File name of one part of one shard."""
    return f"{part}-{shard:05d}-of-{num_shards:05d}.npy"


@dataclasses.dataclass(frozen=True)
class Documents:
    """What is known of each document; rows are in the corpus's order.

    Attributes:
      first_chunk: int64 [documents + 1]; document d has the chunks
        ``first_chunk[d]`` … ``first_chunk[d + 1] - 1``.
      split: uint8 [documents], `TRAIN`, `DATABASE` or `VALIDATION`.
      num_bytes: int64 [documents], of the UTF-8 text.
    """

    first_chunk: HostArray
    split: HostArray
    num_bytes: HostArray
    _records: ShardedArray
    _strings: Sequence[HostArray]

    def __len__(self) -> int:
        return len(self.split)

    def id(self, row: int) -> str:
        """The document's id."""
        return self._string(row, "id_end")

    def title(self, row: int) -> str:
        """The document's title, possibly empty."""
        return self._string(row, "title_end")

    def _string(self, row: int, end: str) -> str:
        record = self._records[row]
        shard = int(np.searchsorted(self._records.starts, row, side="right")) - 1
        if end == "title_end":
            start = record["id_end"]
        elif row == self._records.starts[shard]:
            start = 0
        else:
            start = self._records[row - 1]["title_end"]
        return self._strings[shard][start : record[end]].tobytes().decode()


@dataclasses.dataclass(frozen=True)
class ChunkStore:
    """A corpus as chunks. Chunk ids are rows 0 … N − 1; see the module docstring.

    Attributes:
      tokens: [N, m] uint16 or uint32, padded with the tokenizer's `pad_id`.
      lengths: int32 [N], real tokens, BOS and EOS included.
      document: int32 [N], row of the chunk's document; never decreases.
      byte_offsets: int64 [N, 2], [start, end) in the document's UTF-8 text.
      documents: the table of documents.
      tokenizer: it made the tokens.
      manifest: of the artefact.
    """

    tokens: ShardedArray
    lengths: ShardedArray
    document: ShardedArray
    byte_offsets: ShardedArray
    documents: Documents
    tokenizer: Tokenizer
    manifest: artifacts.Manifest

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> ChunkStore:
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
    def chunk_length(self) -> int:
        """Tokens of a chunk (m)."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        """The number of chunks (N)."""
        return len(self.tokens)

    def chunks_of(self, split: int) -> HostArray:
        """Ids of the chunks of one split, ascending, int64."""
        num_chunks = np.diff(self.documents.first_chunk)
        return np.flatnonzero(np.repeat(self.documents.split == split, num_chunks))

    def text(self, chunk: int) -> str:
        """A chunk's text; a character cut by its border appears as U+FFFD."""
        return self.texts([chunk])[0]

    def texts(self, chunks: Sequence[int] | HostArray) -> list[str]:
        """The texts of several chunks; see `text`."""
        rows = np.asarray(chunks, np.int64)
        return [
            self.tokenizer.decode(tokens[:length])
            for tokens, length in zip(
                self.tokens[rows], self.lengths[rows], strict=True
            )
        ]

    def with_continuation(self, ids: HostArray) -> tuple[HostArray, HostArray]:
        """Chunks followed by the next chunk of the same document.

        Args:
          ids: int [...], chunk ids; −1 gives a row of padding.

        Returns:
          tokens int32 [..., 2 m] and mask bool [..., 2 m], True on real tokens.
          Beyond the end of the document there is padding and the mask is False.
        """
        ids = np.asarray(ids, np.int64)
        first = np.maximum(ids, 0)
        second = np.minimum(first + 1, len(self) - 1)
        continues = (second > first) & (self.document[first] == self.document[second])
        pair = np.stack([first, second], axis=-1)
        present = np.stack([ids >= 0, continues & (ids >= 0)], axis=-1)
        lengths = np.where(present, self.lengths[pair], 0)
        mask = np.arange(self.chunk_length) < lengths[..., None]
        tokens = np.where(mask, self.tokens[pair], self.tokenizer.pad_id)
        shape = (*ids.shape, 2 * self.chunk_length)
        return tokens.astype(np.int32).reshape(shape), mask.reshape(shape)


def from_manifest(manifest: artifacts.Manifest) -> ChunkStore:
    """Memory-maps the files of a checked manifest."""
    num_shards = manifest.meta["num_shards"]
    opened = {
        part: ShardedArray.open(
            [manifest.path(shard_name(part, i, num_shards)) for i in range(num_shards)]
        )
        for part in PARTS
    }
    chunks, records = opened["chunks"], opened["documents"]
    field = functools.partial(_field, records)
    num_chunks = np.concatenate(field("num_chunks").shards)
    return ChunkStore(
        tokens=opened["tokens"],
        lengths=_field(chunks, "length"),
        document=_field(chunks, "document"),
        byte_offsets=_field(chunks, "bytes"),
        documents=Documents(
            first_chunk=np.concatenate([[0], np.cumsum(num_chunks)]),
            split=np.concatenate(field("split").shards),
            num_bytes=np.concatenate(field("num_bytes").shards),
            _records=records,
            _strings=opened["strings"].shards,
        ),
        tokenizer=Tokenizer.load(manifest.path(TOKENIZER)),
        manifest=manifest,
    )


def _field(array: ShardedArray, name: str) -> ShardedArray:
    # A field of a memory-mapped record array is a view: nothing is read yet.
    return ShardedArray([shard[name] for shard in array.shards])
