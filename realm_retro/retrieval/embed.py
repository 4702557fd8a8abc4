"""Texts to vectors: WordPiece, batches of equal cost, mean pooling.

Texts of a window are sorted by length and cut into batches of about the same number
of tokens, longest first. A batch is padded to one of a few lengths (`bucket_lengths`)
and a fixed number of rows for that length, so that few shapes are ever compiled and
little is computed on padding. Vectors come back in the order of the texts.

What computes is handed in as a function: nothing here knows the model.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from realm_retro.errors import UserError
from realm_retro.parallel.mesh import local_mesh
from realm_retro.typing import Array, Bool, Float, HostArray, JsonDict

# Batches on their way to or through the devices before the oldest is waited for: enough
# to keep them busy while the next window is tokenised, and small beside the window.
_IN_FLIGHT = 8


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """How chunks are embedded (section ``embed``).

    Attributes:
      dtype: of the stored vectors, ``float32`` or ``float16``.
      shard_size: rows of a shard file; what is lost when a run is cut off.
      batch_tokens: tokens of a batch on one device, padding included; 0 takes 1,024
        on CPU (its working set then stays in the cache) and 65,536 elsewhere.
      fsdp: pieces that each weight of the encoder is stored in, on as many of this
        process's devices: for encoders that do not fit on one.
      tensor: pieces that each layer's work is cut into, likewise.
    """

    dtype: str = "float32"
    shard_size: int = 4096
    batch_tokens: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'float16'")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} must be at least 1")
        if self.batch_tokens < 0:
            raise ValueError(f"batch_tokens={self.batch_tokens} must not be negative")
        if self.fsdp < 1 or self.tensor < 1:
            raise ValueError(
                f"fsdp={self.fsdp} and tensor={self.tensor} must be at least 1"
            )

    def mesh(self) -> Mesh:
        """The devices of this process, as the encoder lies on them.

        Raises:
          UserError: `fsdp` and `tensor` do not divide their number.
        """
        return local_mesh(self.fsdp, self.tensor)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen encoder as its users see it.

    Attributes:
      dim: size of a vector (d).
      fingerprint: of the weights, the tokenizer and the settings that decide what a
        vector is. Vectors of two encoders can be compared only if theirs are equal.
      encode: texts → float32 [texts, d]; not normalised.
    """

    dim: int
    fingerprint: str
    encode: Callable[[Sequence[str]], HostArray]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """What `embed_texts` needs of an encoder.

    Attributes:
      apply: starts a batch, without waiting: ids int32 [rows, length] and lengths
        int32 [rows] (0 for a row of padding) → float32 [rows, d].
      tokenizer: see `wordpiece.load_tokenizer`.
      dim: size of a vector (d).
      max_tokens: longer texts are cut to this, special tokens included.
      batch_tokens: tokens of a batch, padding included.
      row_multiple: rows of a batch are a multiple of this (devices that share it).
      fingerprint: see `TextEncoder`.
    """

    apply: Callable[[HostArray, HostArray], Array]
    tokenizer: tokenizers.Tokenizer
    dim: int
    max_tokens: int
    batch_tokens: int
    row_multiple: int
    fingerprint: str

    def text_encoder(self) -> TextEncoder:
        """The same encoder for callers that only want vectors."""
        return TextEncoder(
            dim=self.dim,
            fingerprint=self.fingerprint,
            encode=lambda texts: embed_texts(texts, self)[0],
        )


@dataclasses.dataclass(frozen=True)
class Counts:
    """What happened to a number of texts.

    Attributes:
      texts: how many.
      tokens: that went into the encoder, special ones included.
      empty: texts without any token of their own; they get the vector of "".
      truncated: texts that lost tokens beyond `Embedder.max_tokens`.
    """

    texts: int = 0
    tokens: int = 0
    empty: int = 0
    truncated: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(
                getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            )
        )

    def as_meta(self) -> JsonDict:
        """For a manifest."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """Token ids of each text, int32, cut to the limit; and what was counted."""

    ids: list[HostArray]
    counts: Counts


def mean_pool(
    hidden: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Mean over real tokens, in float32; [CLS] and [SEP] count. Zeros for no token."""
    weight = mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weight)
    return total / jnp.maximum(weight.sum(axis=1), 1.0)[:, None]


def bucket_lengths(max_tokens: int) -> list[int]:
    """The lengths that batches are padded to, ascending; the last is `max_tokens`.

    Steps are 16 tokens up to 128, then an eighth of the last power of two: padding
    stays near 10 % and the number of lengths (of compilations) grows slowly.
    """
    lengths = [16]
    while lengths[-1] < max_tokens:
        power = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(lengths[-1] + max(16, power // 8))
    return [*lengths[:-1], max_tokens]


def tokenise(texts: Sequence[str], embedder: Embedder) -> Tokenised:
    """Tokenises in parallel, on all cores, without holding Python's lock."""
    limit = embedder.max_tokens
    special = embedder.tokenizer.num_special_tokens_to_add(False)
    ids, empty, truncated = [], 0, 0
    for encoding in embedder.tokenizer.encode_batch_fast(list(texts)):
        row = encoding.ids
        empty += len(row) == special
        if len(row) > limit:
            truncated += 1
            row = row[: limit - 1] + row[-1:]  # the last one is [SEP]
        ids.append(np.asarray(row, np.int32))
    tokens = sum(len(row) for row in ids)
    return Tokenised(ids, Counts(len(ids), tokens, empty, truncated))


def embed_texts(
    texts: Sequence[str], embedder: Embedder
) -> tuple[Float[HostArray, "texts d"], Counts]:
    """Embeds texts as one window.

    Returns:
      Vectors, float32 [texts, d] in the order of `texts`, and what was counted.
    """
    tokenised = tokenise(texts, embedder)
    return embed_tokenised(tokenised, embedder), tokenised.counts


def embed_windows(
    windows: Iterable[Callable[[], Sequence[str]]],
    embedder: Embedder,
    *,
    on_progress: Callable[[int], Any] = lambda rows: None,
) -> Iterator[tuple[Float[HostArray, "texts d"], Counts]]:
    """Embeds window after window; the next is read and tokenised meanwhile.

    Args:
      windows: functions that read the texts of a window.
      embedder: what computes.
      on_progress: told the number of rows after each batch.

    Yields:
      For each window what `embed_texts` returns.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "tokenise") as thread:
        jobs = (
            thread.submit(lambda read=read: tokenise(read(), embedder))
            for read in windows
        )
        upcoming = next(jobs, None)
        while upcoming is not None:
            tokenised, upcoming = upcoming.result(), next(jobs, None)
            yield embed_tokenised(tokenised, embedder, on_progress), tokenised.counts


def embed_tokenised(
    tokenised: Tokenised,
    embedder: Embedder,
    on_progress: Callable[[int], Any] = lambda rows: None,
) -> Float[HostArray, "texts d"]:
    """Embeds tokenised texts; float32 [texts, d].

    Raises:
      UserError: a vector is not finite.
    """
    vectors = np.empty((len(tokenised.ids), embedder.dim), np.float32)
    running: collections.deque[tuple[HostArray, Array]] = collections.deque()

    def finish_oldest() -> None:
        rows, result = running.popleft()
        vectors[rows] = np.asarray(result)[: len(rows)]
        on_progress(len(rows))

    for rows, length, num_rows in plan_batches(tokenised.ids, embedder):
        batch = _pad([tokenised.ids[row] for row in rows], length, num_rows)
        running.append((rows, embedder.apply(*batch)))
        if len(running) > _IN_FLIGHT:
            finish_oldest()
    while running:
        finish_oldest()
    if not np.isfinite(vectors).all():
        raise UserError(
            "the encoder gave vectors that are not finite; its weights are damaged or"
            " config.encoder.compute_dtype is too narrow for them"
        )
    return vectors


def plan_batches(
    ids: Sequence[HostArray], embedder: Embedder
) -> Iterator[tuple[HostArray, int, int]]:
    """Yields (rows of `ids`, padded length, padded number of rows), longest first.

    The shape follows from the longest text that is left, so that only the last batch
    can be partly filled.
    """
    buckets = np.asarray(bucket_lengths(embedder.max_tokens))
    sizes = np.asarray([len(row) for row in ids])
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        longest = sizes[order[start]]
        length = int(buckets[np.searchsorted(buckets, longest)])
        groups = max(1, embedder.batch_tokens // (length * embedder.row_multiple))
        num_rows = groups * embedder.row_multiple
        yield order[start : start + num_rows], length, num_rows
        start += num_rows


def _pad(
    ids: Sequence[HostArray], length: int, num_rows: int
) -> tuple[HostArray, HostArray]:
    batch = np.zeros((num_rows, length), np.int32)
    lengths = np.zeros(num_rows, np.int32)
    for i, row in enumerate(ids):
        batch[i, : len(row)] = row
        lengths[i] = len(row)
    return batch, lengths
