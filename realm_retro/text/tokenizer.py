"""SentencePiece, set up so that every text comes back byte for byte.

Identity normalisation, no dummy prefix, every space kept, unknown characters spelt
in bytes: ``decode(encode(text)) == text`` for any text, and the UTF-8 bytes of each
id are known (`Tokenizer.byte_lengths`), so that bits per byte can be counted from
ids alone. SentencePiece writes a space as "▁" and would read a literal "▁" back as a
space; here a literal one is spelt in bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from etils import epath

from realm_retro.errors import UserError
from realm_retro.typing import HostArray

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3

_SPACE = "▁"
# Longer texts are encoded in pieces: SentencePiece adds up scores in float32, whose
# precision runs out over millions of characters.
_SEGMENT = 1 << 15
# No piece may hold these: SentencePiece drops training lines with its own mark U+2585,
# "▁" would pass for a space, and control characters are left to the byte pieces.
_LINE_BREAKS = re.compile(r"[\n\r\t\0\u2581\u2585]+")
_TRAINING_LINE = 4096
_PROBE = " \t Åfﬁ  e\u0301\u212b\n\n😀\u200fא\0▁ ½ "


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Settings of the tokenizer (``config.tokenizer``).

    Attributes:
      vocab_size: pieces, of which 4 are special and 256 single bytes.
      model: a SentencePiece model file to take instead of training one;
        `vocab_size` must then be its size.
      model_type: ``bpe`` (trains in seconds) or ``unigram`` (trains in minutes,
        encodes faster).
      sample_bytes: at most so many bytes of text are trained on, in whole documents
        drawn at random.
      seed: of that draw.
    """

    vocab_size: int = 4096
    model: str = ""
    model_type: str = "bpe"
    sample_bytes: int = 64 << 20
    seed: int = 0

    def __post_init__(self):
        if self.model_type not in ("bpe", "unigram"):
            raise UserError(
                "config.tokenizer.model_type is"
                f" {self.model_type!r}; choose 'bpe' or 'unigram'"
            )
        if self.vocab_size < 1 or self.sample_bytes < 1:
            raise UserError(
                f"config.tokenizer.vocab_size ({self.vocab_size}) and sample_bytes"
                f" ({self.sample_bytes}) must be positive"
            )


class Tokenizer:
    """A SentencePiece model that loses nothing.

    Attributes:
      vocab_size: number of ids.
      pad_id, unk_id, bos_id, eos_id: the special ids.
      byte_lengths: int32 [vocab]; UTF-8 bytes that an id stands for, 0 for specials.
      fingerprint: SHA-256 of the model.
      model: the serialised model itself.
    """

    def __init__(self, model: bytes, *, name: str = "tokenizer model"):
        """Builds the tokenizer; see `load`.

        Args:
          model: a serialised SentencePiece model.
          name: what to call it in errors, usually its path.

        Raises:
          UserError: it is not a model, or one that does not round-trip.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name}: is not a SentencePiece model ({error})") from None
        self._processor = processor
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = processor.vocab_size()
        self.unk_id: int = processor.unk_id()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        # Byte fallback leaves `unk` unused, so it can pad where a model has no pad.
        self.pad_id: int = max(processor.pad_id(), processor.unk_id())
        if processor.pad_id() >= 0:
            self.pad_id = processor.pad_id()
        self._bytes = [_bytes_of(processor, i) for i in range(self.vocab_size)]
        self.byte_lengths: HostArray = np.array([*map(len, self._bytes)], np.int32)
        self._spelt_space = [
            processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()
        ]
        if min(self.bos_id, self.eos_id) < 0 or self.decode(self.encode(_PROBE)) != (
            _PROBE
        ):
            raise UserError(
                f"{name}: does not give every text back; it needs identity"
                " normalisation, byte fallback, bos, eos, no dummy prefix and no"
                " removal of spaces. Leave config.tokenizer.model empty to train one"
            )

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """Reads a model file.

        Raises:
          UserError: there is none, or it cannot be used.
        """
        path = epath.Path(path)
        if not path.is_file():
            raise UserError(f"{path}: there is no such tokenizer model")
        return cls(path.read_bytes(), name=str(path))

    def encode(self, text: str) -> HostArray:
        """Ids of a text, int32 [n], without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[HostArray]:
        """Ids of several texts, each int32 [n], without BOS and EOS.

        Args:
          texts: any strings that have a UTF-8 form.
          num_threads: threads to use; all processors by default.

        Raises:
          UserError: a text holds half of a surrogate pair, which has no UTF-8 form.
        """
        owners, segments = [], []
        for row, text in enumerate(texts):
            for segment in _segments(text):
                owners.append(row)
                segments.append(_utf8(segment))
        encoded = self._processor.encode(
            segments,
            out_type=int,
            num_threads=min(num_threads or os.cpu_count() or 1, len(segments) or 1),
        )
        ids: list[list[int]] = [[] for _ in texts]
        space, spelt = _SPACE.encode(), self._spelt_space
        for row, segment, piece_ids in zip(owners, segments, encoded, strict=True):
            literal = segment.startswith(space)
            ids[row] += spelt * segment.count(space) if literal else piece_ids
        return [np.array(row, np.int32) for row in ids]

    def decode(self, ids: Iterable[int] | HostArray) -> str:
        """The text of ids; specials are skipped, broken UTF-8 becomes U+FFFD."""
        data = b"".join([self._bytes[i] for i in np.asarray(ids).tolist()])
        return data.decode("utf-8", errors="replace")


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    path: epath.PathLike,
    model_type: str = "bpe",
    num_threads: int = 2,
) -> None:
    """Trains a model on texts and writes it to `path`.

    The same texts in the same order give the same file.

    Args:
      texts: the training sample; a text may be of any length.
      vocab_size: pieces of the model.
      path: where to write it.
      model_type: ``bpe`` or ``unigram``.
      num_threads: threads to use; part of what determines a unigram model.

    Raises:
      UserError: the texts do not suffice for so many pieces, or need more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            max_sentence_length=4 * _TRAINING_LINE,
            # Only errors, and these arrive as exceptions as well.
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(_training_error(str(error), vocab_size)) from None
    epath.Path(path).write_bytes(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _LINE_BREAKS.split(text):
            for start in range(0, len(line), _TRAINING_LINE):
                yield line[start : start + _TRAINING_LINE]


def _training_error(message: str, vocab_size: int) -> str:
    prefix = f"config.tokenizer.vocab_size={vocab_size}"
    if high := re.search(r"Vocabulary size.* <= (\d+)", message):
        return (
            f"{prefix} is more than this text can fill; set it to {high[1]} or less"
            " (and config.model.vocab_size with it), or add text"
        )
    if low := re.search(r"Vocabulary size is smaller .*?(\d+) vs (\d+)", message):
        return f"{prefix} is too small for this text; set it above {low[2]}"
    return f"the tokenizer could not be trained with {prefix}: {message}"


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
        return b""
    piece: str = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace(_SPACE, " ").encode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a text cannot be written as UTF-8 ({error})") from None


def _segments(text: str) -> Iterator[str]:
    for part in re.split(f"({_SPACE}+)", text):
        start = 0
        while len(part) - start > _SEGMENT:
            # Cut where a word begins: pieces (almost) never run across.
            limit = start + _SEGMENT
            space = max(part.rfind(mark, start + 1, limit) for mark in " \n")
            end = space if space > 0 else limit
            yield part[start:end]
            start = end
        if start < len(part):
            yield part[start:]
