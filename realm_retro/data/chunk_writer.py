"""Writes the chunk store: tokenizer first, then shard by shard of documents."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.arrays import NpyWriter, open_npy
from realm_retro.data import chunk_store
from realm_retro.data.chunk_store import CHUNK, DOCUMENT, PARTS, SPLITS, shard_name
from realm_retro.data.corpus import Corpus, Document, batched_by_size, sample
from realm_retro.errors import UserError
from realm_retro.text import tokenizer as tokenizer_lib
from realm_retro.text.chunking import chunk
from realm_retro.text.tokenizer import Tokenizer, TokenizerConfig
from realm_retro.typing import JsonDict


@dataclasses.dataclass(frozen=True)
class ChunksConfig:
    """How documents become chunks (``config.chunks``).

    Attributes:
      length: tokens of a chunk (m in the RETRO paper).
      validation_fraction: probability that a document is held out: neither trained on
        nor retrieved from.
      train_fraction: of the others, the probability that a document is trained on;
        the rest is retrieved from only.
      seed: of that draw. It goes by the document's id, so a document keeps its split
        when the corpus grows.
      shard_documents: documents of one set of files, the unit of resuming.
    """

    length: int = 64
    validation_fraction: float = 0.02
    train_fraction: float = 1.0
    seed: int = 0
    shard_documents: int = 4096

    def __post_init__(self):
        for name in ("length", "shard_documents"):
            if getattr(self, name) < 1:
                raise UserError(f"config.chunks.{name} must be 1 or more")
        for name in ("validation_fraction", "train_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"config.chunks.{name} is {getattr(self, name)}; it is a"
                    " probability from 0 to 1"
                )


def split_of(document_id: str, config: ChunksConfig) -> int:
    """The split of a document, a function of its id and the seed alone."""
    key = f"{config.seed}:{document_id}".encode()
    draws = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), "<u8") / 2**64
    if draws[0] < config.validation_fraction:
        return chunk_store.VALIDATION
    if draws[1] < config.train_fraction:
        return chunk_store.TRAIN
    return chunk_store.DATABASE


def open_stage(
    directory: epath.PathLike,
    *,
    chunks: ChunksConfig,
    tokenizer: TokenizerConfig,
    corpus_fingerprint: str,
) -> artifacts.Stage:
    """The stage that `build` writes to; `Stage.finished` tells whether it ran."""
    settings = dataclasses.asdict(tokenizer)
    if tokenizer.model:
        # What matters is which model it is, not where it lies.
        settings = {"model": Tokenizer.load(tokenizer.model).fingerprint}
    return artifacts.Stage.open(
        directory,
        kind=chunk_store.KIND,
        format_version=chunk_store.FORMAT_VERSION,
        config={"chunks": dataclasses.asdict(chunks), "tokenizer": settings},
        parents={"corpus": corpus_fingerprint},
        made_by=chunk_store.MADE_BY,
    )


def prepare_tokenizer(
    corpus: Corpus, config: TokenizerConfig, stage: artifacts.Stage
) -> Tokenizer:
    """Trains the tokenizer on a sample of the corpus, or takes the one given.

    Raises:
      UserError: the model cannot be used, or the corpus is too small to train it.
    """
    given = Tokenizer.load(config.model) if config.model else None
    if given and given.vocab_size != config.vocab_size:
        raise UserError(
            f"{config.model}: has {given.vocab_size} pieces; set"
            f" config.tokenizer.vocab_size={given.vocab_size} (and"
            " config.model.vocab_size with it)"
        )
    if not stage.has(chunk_store.TOKENIZER):
        with stage.write(chunk_store.TOKENIZER) as path:
            if given:
                path.write_bytes(given.model)
            else:
                texts = sample(corpus, seed=config.seed, max_bytes=config.sample_bytes)
                tokenizer_lib.train(
                    texts,
                    vocab_size=config.vocab_size,
                    model_type=config.model_type,
                    path=path,
                )
    return Tokenizer.load(stage.directory / chunk_store.TOKENIZER)


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: ChunksConfig,
    stage: artifacts.Stage,
) -> JsonDict:
    """Writes all shards that are not there yet; does not commit.

    Returns:
      The counts for the manifest.

    Raises:
      UserError: no document fell into the training split.
    """
    num_shards = -(-len(corpus) // config.shard_documents)
    with progress.bar(total=len(corpus), unit="documents", label="chunks") as bar:
        for shard in range(num_shards):
            names = {part: shard_name(part, shard, num_shards) for part in PARTS}
            start = shard * config.shard_documents
            rows = range(start, min(start + config.shard_documents, len(corpus)))
            if all(stage.has(name) for name in names.values()):
                bar.update(len(rows))
                continue
            groups = batched_by_size(corpus[row] for row in rows)
            with _shard_files(stage, names, tokenizer, config) as files:
                for group in groups:
                    _append(files, group, start, tokenizer, config)
                    bar.update(len(group))
                    start += len(group)
    return _counts(stage, num_shards, config)


@contextlib.contextmanager
def _shard_files(
    stage: artifacts.Stage,
    names: dict[str, str],
    tokenizer: Tokenizer,
    config: ChunksConfig,
) -> Iterator[dict[str, NpyWriter]]:
    token = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    dtypes = {"tokens": token, "chunks": CHUNK, "documents": DOCUMENT, "strings": "u1"}
    with contextlib.ExitStack() as stack:
        yield {
            part: stack.enter_context(
                NpyWriter(
                    stack.enter_context(stage.write(name)),
                    dtypes[part],
                    (config.length,) if part == "tokens" else (),
                )
            )
            for part, name in names.items()
        }


def _append(
    files: dict[str, NpyWriter],
    group: list[Document],
    first_row: int,
    tokenizer: Tokenizer,
    config: ChunksConfig,
) -> None:
    encoded = tokenizer.encode_batch([document.text for document in group])
    for row, (document, ids) in enumerate(zip(group, encoded, strict=True), first_row):
        chunks = chunk(ids, tokenizer, length=config.length)
        num_bytes = len(document.text.encode())
        if chunks.byte_offsets[-1, 1] != num_bytes:
            raise UserError(
                f"document {document.id!r}: its tokens stand for"
                f" {chunks.byte_offsets[-1, 1]} of its {num_bytes} bytes; the"
                " tokenizer loses text, train one by leaving config.tokenizer.model"
                " empty"
            )
        records = np.empty(len(chunks.lengths), CHUNK)
        records["document"] = row
        records["length"] = chunks.lengths
        records["bytes"] = chunks.byte_offsets
        identity, title = document.id.encode(), document.title.encode()
        id_end = files["strings"].rows + len(identity)
        record = np.zeros(1, DOCUMENT)
        record["num_chunks"] = len(records)
        record["num_bytes"] = num_bytes
        record["id_end"] = id_end
        record["title_end"] = id_end + len(title)
        record["split"] = split_of(document.id, config)
        files["tokens"].append(chunks.tokens)
        files["chunks"].append(records)
        files["documents"].append(record)
        files["strings"].append(np.frombuffer(identity + title, np.uint8))


def _counts(stage: artifacts.Stage, num_shards: int, config: ChunksConfig) -> JsonDict:
    names = ("documents", "chunks", "tokens", "bytes")
    splits = {split: dict.fromkeys(names, 0) for split in SPLITS}
    short = 0
    row = 0
    for shard in range(num_shards):
        documents, chunks = (
            open_npy(stage.directory / shard_name(part, shard, num_shards))
            for part in ("documents", "chunks")
        )
        tokens = np.bincount(chunks["document"] - row, weights=chunks["length"])
        short += int((tokens <= 3).sum())  # BOS, one token, EOS
        row += len(documents)
        for split, number in SPLITS.items():
            mine = documents["split"] == number
            columns = (mine, documents["num_chunks"], tokens, documents["num_bytes"])
            for name, column in zip(names, columns, strict=True):
                splits[split][name] += int(column[mine].sum())
    if not splits["train"]["documents"]:
        raise UserError(
            f"none of the {row} documents is trained on: config.chunks has"
            f" train_fraction={config.train_fraction},"
            f" validation_fraction={config.validation_fraction}, seed={config.seed};"
            " change one of these or add documents"
        )
    totals = {name: sum(splits[split][name] for split in splits) for name in names}
    return {
        "num_shards": num_shards,
        **totals,
        "single_token_documents": short,
        "splits": splits,
    }
