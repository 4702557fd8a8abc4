"""A document's ids, cut into chunks of equal length that know their bytes."""

from __future__ import annotations

import dataclasses

import numpy as np

from realm_retro.text.tokenizer import Tokenizer
from realm_retro.typing import HostArray


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of one document, in order.

    Attributes:
      tokens: int32 [chunks, length], padded behind the last real token.
      lengths: int32 [chunks], real tokens, BOS and EOS included.
      byte_offsets: int64 [chunks, 2], [start, end) in the document's UTF-8 text.
    """

    tokens: HostArray
    lengths: HostArray
    byte_offsets: HostArray


def chunk(ids: HostArray, tokenizer: Tokenizer, *, length: int) -> Chunks:
    """Cuts BOS + `ids` + EOS into chunks of `length` tokens; the last one is padded.

    Args:
      ids: int [n], a document's ids without BOS and EOS.
      tokenizer: it made them.
      length: tokens of a chunk (m in the RETRO paper).
    """
    ids = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
    num_chunks = -(-len(ids) // length)
    tokens = np.full(num_chunks * length, tokenizer.pad_id, np.int32)
    tokens[: len(ids)] = ids
    starts = np.arange(num_chunks, dtype=np.int64) * length
    ends = np.minimum(starts + length, len(ids))
    position = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(tokenizer.byte_lengths[ids], out=position[1:])
    return Chunks(
        tokens=tokens.reshape(num_chunks, length),
        lengths=(ends - starts).astype(np.int32),
        byte_offsets=np.stack([position[starts], position[ends]], axis=1),
    )
