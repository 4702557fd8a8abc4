"""WordPiece as passages need it: ids, where each stands in the text, which begin words.

The ``tokenizers`` library counts positions in characters; files and annotations count
bytes of UTF-8. `byte_positions` leads from one to the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models

from realm_retro.errors import UserError
from realm_retro.typing import HostArray


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The wordpieces of one text, special tokens left out.

    Attributes:
      ids: int32 [n].
      chars: int64 [n, 2], [start, end) in characters of the text.
      words: int32 [n], the word that a piece belongs to, counted from 0; a punctuation
        mark is a word of its own.
    """

    ids: HostArray
    chars: HostArray
    words: HostArray


def load_tokenizer(
    path: epath.PathLike, *, specials: bool = False
) -> tokenizers.Tokenizer:
    """Reads a ``tokenizer.json``; its padding and truncation are switched off.

    Args:
      path: of the file.
      specials: whether the letters "[SEP]" in a text are a special token, as published
        encoders read them. Without it what stands in a document never turns into one.

    Raises:
      UserError: it is missing or damaged.
    """
    path = epath.Path(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing; config.encoder.path must name a folder with it"
        ) from None
    except Exception as error:  # The library raises no narrower class.
        raise UserError(f"{path}: is damaged ({error}); download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not specials
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The wordpieces of several texts, in parallel on all cores."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [
        Pieces(
            ids=np.asarray(encoding.ids, np.int32),
            chars=np.asarray(encoding.offsets, np.int64).reshape(-1, 2),
            words=np.asarray(encoding.word_ids, np.int32),
        )
        for encoding in encodings
    ]


def ids_of(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of several texts, without special tokens; faster than `encode`."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def continuations(tokenizer: tokenizers.Tokenizer) -> HostArray:
    """Which ids go on with a word that an earlier piece began; bool [vocabulary].

    Raises:
      UserError: the tokenizer is not WordPiece.
    """
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if not isinstance(tokenizer.model, models.WordPiece) or not prefix:
        raise UserError(
            f"the tokenizer is {type(tokenizer.model).__name__}, not WordPiece; take"
            " the tokenizer.json of a BERT (config.encoder.path)"
        )
    vocabulary = tokenizer.get_vocab()
    found = np.zeros(max(vocabulary.values()) + 1, bool)
    found[[i for piece, i in vocabulary.items() if piece.startswith(prefix)]] = True
    return found


def byte_positions(text: str) -> HostArray:
    """Where each character begins in the text's UTF-8; int64 [characters + 1].

    The last entry is the number of bytes.
    """
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    positions = np.zeros(len(text) + 1, np.int64)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(int) + (codes > 0xFFFF)
    np.cumsum(sizes, out=positions[1:])
    return positions
