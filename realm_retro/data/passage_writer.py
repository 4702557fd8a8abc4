"""Writes the passage store, shard by shard of documents."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
import tokenizers
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.arrays import NpyWriter, open_npy
from realm_retro.data import passages
from realm_retro.data.chunk_store import SPLITS, shard_name
from realm_retro.data.chunk_writer import ChunksConfig, split_of
from realm_retro.data.corpus import Corpus, Document, batched_by_size
from realm_retro.data.passages import DOCUMENT, PARTS, PASSAGE, PassageConfig
from realm_retro.errors import UserError
from realm_retro.text import passage_cuts, wordpiece
from realm_retro.text.wordpiece import Pieces
from realm_retro.typing import HostArray, JsonDict

# The library keeps about 130 bytes for each wordpiece of a group.
_GROUP_CHARS = 1 << 20
# Longer texts are tokenised in pieces, cut at a space: WordPiece sees no further.
_SEGMENT = 1 << 16
_SPACE = re.compile("[ \n]")
_COUNTED: tuple[str, ...] = ("titles_truncated", "unknown")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A document and its passages, [start, end) in wordpieces and in bytes."""

    document: Document
    text: bytes
    pieces: Pieces
    ranges: HostArray
    byte_offsets: HostArray


def open_stage(
    directory: epath.PathLike,
    *,
    config: PassageConfig,
    tokenizer: epath.PathLike,
    corpus_fingerprint: str,
) -> artifacts.Stage:
    """The stage that `build` writes to; `Stage.finished` tells whether it ran.

    Args:
      directory: of the artefact.
      config: how documents become passages.
      tokenizer: a ``tokenizer.json``.
      corpus_fingerprint: of the corpus.

    Raises:
      UserError: the tokenizer cannot be read, or the directory holds passages of
        other settings.
    """
    wordpiece.load_tokenizer(tokenizer)
    return artifacts.Stage.open(
        directory,
        kind=passages.KIND,
        format_version=passages.FORMAT_VERSION,
        # What matters is which tokenizer it is, not where it lies.
        config={
            "passages": dataclasses.asdict(config),
            "tokenizer": artifacts.sha256(tokenizer),
        },
        parents={"corpus": corpus_fingerprint},
        made_by=passages.MADE_BY,
    )


def build(
    corpus: Corpus,
    tokenizer: epath.PathLike,
    config: PassageConfig,
    stage: artifacts.Stage,
) -> JsonDict:
    """Writes all shards that are not there yet; does not commit.

    Returns:
      The counts for the manifest.

    Raises:
      UserError: no document holds a word, a word is longer than a passage, or the
        tokenizer is of no use here.
    """
    loaded = wordpiece.load_tokenizer(tokenizer)
    wordpiece.continuations(loaded)  # refuses what is not WordPiece
    num_shards = -(-len(corpus) // config.shard_documents)
    with progress.bar(total=len(corpus), unit="documents", label="passages") as bar:
        for shard in range(num_shards):
            names = {part: shard_name(part, shard, num_shards) for part in PARTS}
            row = shard * config.shard_documents
            rows = range(row, min(row + config.shard_documents, len(corpus)))
            if all(stage.has(name) for name in names.values()):
                bar.update(len(rows))
                continue
            counts = collections.Counter(dict.fromkeys(_COUNTED, 0))
            groups = batched_by_size((corpus[r] for r in rows), max_chars=_GROUP_CHARS)
            with _shard_files(stage, names, loaded, config) as files:
                for group in groups:
                    counts.update(_append(files, group, row, loaded, config))
                    bar.update(len(group))
                    row += len(group)
                # Before the files: what was counted is there wherever they are.
                stage.note(f"shard-{shard:05d}", counts)
    # Last, so that a setting can be mended as long as no shard is written.
    if not stage.has(passages.TOKENIZER):
        with stage.write(passages.TOKENIZER) as path:
            path.write_bytes(epath.Path(tokenizer).read_bytes())
    return _counts(stage, num_shards)


@contextlib.contextmanager
def _shard_files(
    stage: artifacts.Stage,
    names: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: PassageConfig,
) -> Iterator[dict[str, NpyWriter]]:
    token = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    kinds = {
        "body": (token, (config.length,)),
        "passages": (PASSAGE, ()),
        "titles": (token, (config.title_length,)),
        "documents": (DOCUMENT, ()),
        "strings": ("u1", ()),
        "texts": ("u1", ()),
    }
    with contextlib.ExitStack() as stack:
        yield {
            part: stack.enter_context(
                NpyWriter(stack.enter_context(stage.write(name)), *kinds[part])
            )
            for part, name in names.items()
        }


def _append(
    files: dict[str, NpyWriter],
    group: list[Document],
    first_row: int,
    tokenizer: tokenizers.Tokenizer,
    config: PassageConfig,
) -> dict[str, int]:
    counts = dict.fromkeys(_COUNTED, 0)
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", "[UNK]"))
    titles = wordpiece.ids_of(tokenizer, [document.title for document in group])
    cuts = _cut_group(group, tokenizer, config)
    for row, (done, title) in enumerate(zip(cuts, titles, strict=True), first_row):
        counts["titles_truncated"] += len(title) > config.title_length
        counts["unknown"] += int((done.pieces.ids == unknown).sum())
        records = np.empty(len(done.ranges), PASSAGE)
        records["document"] = row
        records["length"] = done.ranges[:, 1] - done.ranges[:, 0]
        records["bytes"] = done.byte_offsets
        body = np.zeros((len(records), config.length), np.int32)
        for target, (start, end) in zip(body, done.ranges, strict=True):
            target[: end - start] = done.pieces.ids[start:end]
        files["body"].append(body)
        files["passages"].append(records)
        _append_document(files, done, title[: config.title_length], config)
    return counts


def _append_document(
    files: dict[str, NpyWriter], done: _Cut, title: list[int], config: PassageConfig
) -> None:
    document = done.document
    identity, name = document.id.encode(), document.title.encode()
    padded = np.zeros((1, config.title_length), np.int32)
    padded[0, : len(title)] = title
    record = np.zeros(1, DOCUMENT)
    record["num_passages"] = len(done.ranges)
    record["id_end"] = files["strings"].rows + len(identity)
    record["title_end"] = record["id_end"] + len(name)
    record["text_end"] = files["texts"].rows + len(done.text)
    record["title_length"] = len(title)
    record["split"] = split_of(
        document.id,
        ChunksConfig(
            validation_fraction=config.validation_fraction,
            train_fraction=config.train_fraction,
            seed=config.seed,
        ),
    )
    files["titles"].append(padded)
    files["documents"].append(record)
    files["strings"].append(np.frombuffer(identity + name, np.uint8))
    files["texts"].append(np.frombuffer(done.text, np.uint8))


def _cut_group(
    group: list[Document], tokenizer: tokenizers.Tokenizer, config: PassageConfig
) -> list[_Cut]:
    encoded = _encode([document.text for document in group], tokenizer)
    cuts = [
        _cut(document, pieces, config, None)
        for document, pieces in zip(group, encoded, strict=True)
    ]
    # What a passage's text alone tokenises to must be what is stored of it. With BERT's
    # tokenizers that is so at every border; others may look across one.
    texts = [
        done.text[start:end].decode()
        for done in cuts
        for start, end in done.byte_offsets
    ]
    alone = iter(wordpiece.ids_of(tokenizer, texts))
    for i, done in enumerate(cuts):
        expected = (done.pieces.ids[start:end] for start, end in done.ranges)
        # A list, so that every passage takes its ids from `alone`.
        if not all([next(alone) == ids.tolist() for ids in expected]):
            cuts[i] = _cut(done.document, done.pieces, config, tokenizer)
    return cuts


def _cut(
    document: Document,
    pieces: Pieces,
    config: PassageConfig,
    tokenizer: tokenizers.Tokenizer | None,
) -> _Cut:
    """Cuts one document; with a tokenizer, only where both sides tokenise the same."""
    text = document.text

    def text_range(start: int, end: int) -> tuple[int, int]:
        # Up to the next passage, so that marks without a wordpiece are kept.
        left = pieces.chars[start, 0] if start else 0
        right = pieces.chars[end, 0] if end < len(pieces.ids) else len(text)
        part = text[left:right]
        left += len(part) - len(part.lstrip())
        return int(left), int(left) + len(part.strip())

    def agrees(start: int, end: int) -> bool:
        assert tokenizer is not None
        left, right = text_range(start, end)
        [ids] = wordpiece.ids_of(tokenizer, [text[left:right]])
        return ids == pieces.ids[start:end].tolist()

    ranges: list[tuple[int, int]] = []
    if len(pieces.ids):
        try:
            borders = passage_cuts.Borders.of(text, pieces)
            ranges += passage_cuts.cut(
                borders,
                length=config.length,
                stride=config.stride,
                agrees=agrees if tokenizer else None,
            )
        except passage_cuts.WordTooLongError as error:
            raise UserError(
                f"document {document.id!r}: a word has {error.args[0]} wordpieces, more"
                f" than config.passages.length={config.length}; raise it"
            ) from None
        except LookupError as error:
            place = text[pieces.chars[error.args[0], 0] :][:20]
            raise UserError(
                f"document {document.id!r}: the text from {place!r} on tokenises"
                " otherwise when it stands alone, wherever it is cut; take the"
                " tokenizer.json of a BERT (config.encoder.path)"
            ) from None
    chars = np.asarray([text_range(*pair) for pair in ranges], np.int64)
    return _Cut(
        document=document,
        text=text.encode(),
        pieces=pieces,
        ranges=np.asarray(ranges, np.int64).reshape(-1, 2),
        byte_offsets=wordpiece.byte_positions(text)[chars.reshape(-1, 2)],
    )


def _encode(texts: list[str], tokenizer: tokenizers.Tokenizer) -> list[Pieces]:
    """As `wordpiece.encode`, but long texts are tokenised in segments."""
    borders = [_segments(text) for text in texts]
    segments = [
        text[start:end]
        for text, starts in zip(texts, borders, strict=True)
        for start, end in itertools.pairwise(starts)
    ]
    encoded = iter(wordpiece.encode(tokenizer, segments))
    return [
        _joined([(start, next(encoded)) for start in starts[:-1]]) for starts in borders
    ]


def _segments(text: str) -> list[int]:
    borders = [0]
    while space := _SPACE.search(text, borders[-1] + _SEGMENT):
        borders.append(space.start())
    return [*borders, len(text)]


def _joined(parts: list[tuple[int, Pieces]]) -> Pieces:
    words, first = [], 0
    for _, pieces in parts:
        words.append(pieces.words + first)
        first += int(pieces.words[-1]) + 1 if len(pieces.words) else 0
    return Pieces(
        ids=np.concatenate([pieces.ids for _, pieces in parts]),
        chars=np.concatenate([pieces.chars + start for start, pieces in parts]),
        words=np.concatenate(words),
    )


def _counts(stage: artifacts.Stage, num_shards: int) -> JsonDict:
    names = ("documents", "passages", "tokens", "bytes")
    splits = {split: dict.fromkeys(names, 0) for split in SPLITS}
    counted = {"empty_documents": 0, "untitled_documents": 0}
    counted |= dict.fromkeys(_COUNTED, 0)
    row = 0
    for shard in range(num_shards):
        documents, records = (
            open_npy(stage.directory / shard_name(part, shard, num_shards))
            for part in ("documents", "passages")
        )
        for name, count in (stage.noted(f"shard-{shard:05d}") or {}).items():
            counted[name] += count
        tokens = np.bincount(
            records["document"] - row,
            weights=records["length"],
            minlength=len(documents),
        )
        sizes = np.diff(documents["text_end"], prepend=0)
        counted["empty_documents"] += int((documents["num_passages"] == 0).sum())
        counted["untitled_documents"] += int((documents["title_length"] == 0).sum())
        row += len(documents)
        for split, number in SPLITS.items():
            mine = documents["split"] == number
            columns = (mine, documents["num_passages"], tokens, sizes)
            for name, column in zip(names, columns, strict=True):
                splits[split][name] += int(column[mine].sum())
    totals = {name: sum(splits[split][name] for split in splits) for name in names}
    if not totals["passages"]:
        raise UserError(
            f"none of the {totals['documents']} documents holds a word; add text"
            " (config.corpus)"
        )
    return {"num_shards": num_shards, **totals, **counted, "splits": splits}
