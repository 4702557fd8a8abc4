r"""Reads a corpus and cuts it: into chunks for RETRO, into passages for REALM.

Reads   the source that config.corpus names.
Writes  WORKDIR/corpus     the documents, a TFDS dataset in array_record; without
                           duplicates and evaluation sets if config.dedupe says so
        WORKDIR/chunks     a tokenizer trained on them, and chunks of
                           config.chunks.length tokens
        WORKDIR/passages   if the config has a section `passages`: passages of at most
                           config.passages.length wordpieces of config.encoder's
                           tokenizer. Without a section `chunks` only these are written

Example:
  python -m realm_retro.cli.prepare --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.corpus.source=text_files \
      --config.corpus.path='~/notes'

An interrupted run resumes at the first missing shard of chunks or passages. A corpus
that prepare_beam wrote is taken as it is.
"""

from __future__ import annotations

import os
import time
from typing import TypeVar

import ml_collections
from etils import epath

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.cli import common
from realm_retro.data import chunk_store, chunk_writer, passage_writer
from realm_retro.data import corpus as corpus_lib
from realm_retro.data import dedupe as dedupe_lib
from realm_retro.data import passages as passages_lib
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import CorpusConfig, Report
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.data.passages import PassageConfig
from realm_retro.text.tokenizer import TokenizerConfig
from realm_retro.text.wordpiece import load_tokenizer
from realm_retro.typing import JsonDict

T = TypeVar("T")


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    corpus = config_lib.read(config, "corpus", CorpusConfig)
    dedupe = config_lib.read(config, "dedupe", DedupeConfig)
    tokenizer = config_lib.read(config, "tokenizer", TokenizerConfig)
    chunks = config_lib.read(config, "chunks", ChunksConfig)
    passages = config_lib.read(config, "passages", PassageConfig)
    # Before the long work starts: a tokenizer that is missing is an early error.
    wordpieces = _wordpieces(config) if "passages" in config else None
    manifest = _write_corpus(corpus, dedupe, workdir / "corpus")
    if "chunks" in config or not wordpieces:
        _write_chunks(chunks, tokenizer, manifest, workdir / "chunks")
    if wordpieces:
        _write_passages(passages, wordpieces, manifest, workdir / "passages")


def _write_corpus(
    config: CorpusConfig, dedupe: DedupeConfig, directory: epath.Path
) -> artifacts.Manifest:
    stage = corpus_lib.open_stage(config, directory, dedupe=dedupe_lib.settings(dedupe))
    if stage.finished:
        return corpus_finished(directory)
    from realm_retro.data import datasets  # TFDS takes a while to import

    started = time.monotonic()
    with stage.released_on_error():
        report = datasets.build(config, stage, dedupe)
    return commit_corpus(stage, report, time.monotonic() - started)


def corpus_finished(directory: epath.Path) -> artifacts.Manifest:
    """Says that a corpus is there, and reads its manifest."""
    manifest = corpus_lib.load_manifest(directory, verify=False)
    count = manifest.meta["documents"]
    common.say(f"corpus: finished already, {count:,} documents in {directory}")
    return manifest


def commit_corpus(
    stage: artifacts.Stage, report: Report, seconds: float
) -> artifacts.Manifest:
    """Commits a corpus that was written in that time, and says what it holds."""
    manifest = stage.commit({**report.as_meta(), "seconds": round(seconds, 2)})
    common.say(
        f"corpus: {report.documents:,} documents, {report.text_bytes / 1e6:,.1f} MB of"
        f" text in {seconds:.1f} s ({report.documents / seconds:,.0f} documents/s)"
    )
    for line in report.lines():
        common.say(f"corpus: {line}")
    return manifest


def _write_chunks(
    config: ChunksConfig,
    tokenizer_config: TokenizerConfig,
    corpus: artifacts.Manifest,
    directory: epath.Path,
) -> None:
    started = time.monotonic()
    stage = chunk_writer.open_stage(
        directory,
        chunks=config,
        tokenizer=tokenizer_config,
        corpus_fingerprint=corpus.fingerprint,
    )
    if stage.finished:
        count = chunk_store.load_manifest(directory, verify=False).meta["chunks"]
        common.say(f"chunks: finished already, {count:,} chunks in {directory}")
        return
    from realm_retro.data import datasets

    documents = datasets.open_corpus(corpus.directory)
    with stage.released_on_error():
        tokenizer = chunk_writer.prepare_tokenizer(documents, tokenizer_config, stage)
    tokenizer_seconds = time.monotonic() - started
    common.say(
        f"tokenizer: {tokenizer.vocab_size:,} pieces in {tokenizer_seconds:.1f} s"
    )
    counts = chunk_writer.build(documents, tokenizer, config, stage)
    seconds = time.monotonic() - started
    stage.commit(
        {
            **counts,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "tokenizer_seconds": round(tokenizer_seconds, 2),
            "seconds": round(seconds, 2),
        }
    )
    _report(counts, seconds - tokenizer_seconds)


def _report(counts: JsonDict, seconds: float) -> None:
    common.say(
        f"chunks: {counts['chunks']:,} chunks, {counts['tokens']:,} tokens,"
        f" {counts['bytes'] / counts['tokens']:.2f} bytes a token in {seconds:.1f} s"
        f" ({counts['tokens'] / seconds:,.0f} tokens/s)"
    )
    for split, of in counts["splits"].items():
        common.say(
            f"chunks: {split}: {of['documents']:,} documents, {of['chunks']:,} chunks,"
            f" {of['bytes'] / 1e6:,.1f} MB"
        )
    if short := counts["single_token_documents"]:
        common.say(f"chunks: {short:,} documents have a single token")
    if not counts["splits"]["validation"]["documents"]:
        common.say(
            "chunks: no document is held out, so nothing can be evaluated; raise"
            " config.chunks.validation_fraction or add documents"
        )


def _wordpieces(config: ml_collections.ConfigDict) -> epath.Path:
    from realm_retro.cli import encoders  # JAX takes a while to import

    path = encoders.EncoderConfig.of(config).folder() / encoders.TOKENIZER
    load_tokenizer(path)
    return path


def _write_passages(
    config: PassageConfig,
    tokenizer: epath.Path,
    corpus: artifacts.Manifest,
    directory: epath.Path,
) -> None:
    started = time.monotonic()
    stage = passage_writer.open_stage(
        directory,
        config=config,
        tokenizer=tokenizer,
        corpus_fingerprint=corpus.fingerprint,
    )
    if stage.finished:
        count = passages_lib.load_manifest(directory, verify=False).meta["passages"]
        common.say(f"passages: finished already, {count:,} passages in {directory}")
        return
    from realm_retro.data import datasets

    # Said aloud, the tokenizer's threads do not warn when something forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    documents = datasets.open_corpus(corpus.directory)
    with stage.released_on_error():
        counts = passage_writer.build(documents, tokenizer, config, stage)
    seconds = time.monotonic() - started
    stage.commit({**counts, "seconds": round(seconds, 2)})
    _report_passages(counts, config, seconds)


def _report_passages(counts: JsonDict, config: PassageConfig, seconds: float) -> None:
    common.say(
        f"passages: {counts['passages']:,} passages, {counts['tokens']:,} wordpieces,"
        f" {counts['tokens'] / counts['passages']:.0f} a passage in {seconds:.1f} s"
        f" ({counts['tokens'] / seconds:,.0f} wordpieces/s)"
    )
    for split, of in counts["splits"].items():
        common.say(
            f"passages: {split}: {of['documents']:,} documents, {of['passages']:,}"
            f" passages, {of['bytes'] / 1e6:,.1f} MB"
        )
    said = {
        "empty_documents": "documents hold no wordpiece and have no passage",
        "titles_truncated": f"titles were cut to {config.title_length} wordpieces;"
        " raise config.passages.title_length to keep all of them",
        "unknown": "words are unknown to the tokenizer and read as [UNK]",
    }
    for name, text in said.items():
        if counts[name]:
            common.say(f"passages: {counts[name]:,} {text}")


def entry() -> None:
    """Console script."""
    common.run(main, name="prepare")


if __name__ == "__main__":
    entry()
