"""Corpora as TFDS datasets in array_record, read and written without TensorFlow.

`build` writes any source as one TFDS dataset (kind ``corpus``) which `open_corpus`,
or anyone's ``tfds.builder_from_directory``, reads by random access. Importing this
module also registers `VitalArticles`: ``tfds.builder("vital_articles/en")``.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.data import dedupe_local, dedupe_writer, records, tfds_source
from realm_retro.data.corpus import (
    TFDS_PREFIX,
    Corpus,
    CorpusConfig,
    Document,
    Report,
    load_manifest,
)
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.data.records import Records
from realm_retro.data.text_files import (
    decode,
    document_from,
    find,
    read_file,
    text_files,
)
from realm_retro.data.vital_articles import ATTRIBUTION, FILES, vital_articles
from realm_retro.errors import UserError

_KEEP_ALL = DedupeConfig()
_PART_ROWS = 1 << 14  # of a TFDS dataset, that one worker reads at once


@dataclasses.dataclass(frozen=True)
class ArrayRecordCorpus:
    """A finished corpus: documents in array_record files, read by row."""

    manifest: artifacts.Manifest
    _records: Records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int, /) -> Document:
        return self._records[row]


def open_corpus(directory: epath.PathLike, *, verify: bool = True) -> ArrayRecordCorpus:
    """Opens a finished corpus.

    Raises:
      UserError: it is missing, unfinished or damaged.
    """
    manifest = load_manifest(directory, verify=verify)
    return ArrayRecordCorpus(manifest, Records.open(manifest.directory, manifest.files))


def build(
    config: CorpusConfig, stage: artifacts.Stage, dedupe: DedupeConfig = _KEEP_ALL
) -> Report:
    """Streams the configured source into a corpus, but does not commit it.

    Memory holds one document at a time and eight bytes for each, however large the
    corpus; for what dropping duplicates takes see `dedupe_local`. The same source gives
    the same bytes in any process.

    Raises:
      UserError: the source cannot be read, holds no text, or an id twice.
    """
    stage.restart()
    records.clear(stage.directory)
    target = dedupe_writer.scratch(stage) if dedupe.enabled else stage.directory
    report = Report()
    hashes = array.array("Q")

    def kept() -> Iterator[Document]:
        for document in report.keep(documents(config, report)):
            hashes.append(_hash(document.id))
            yield document

    if not records.write(target, kept()):
        raise no_text(config, report)
    names = records.file_names(target)
    corpus = Records.open(target, names)
    _refuse_duplicates(np.frombuffer(hashes, np.uint64), corpus)
    if dedupe.enabled:
        dedupe_local.write(corpus, dedupe, stage, target, report)
        return report
    for name in names:
        stage.adopt(name)
    return report


def no_text(config: CorpusConfig, report: Report) -> UserError:
    """The error of a source without text."""
    return UserError(
        f"config.corpus ({config.source}, {' '.join(config.paths) or 'no path'})"
        f" holds no text ({report.empty} empty documents)"
    )


def same_id(one: str, other: str, identity: str) -> UserError:
    """The error of two documents with one id, by their origins."""
    return UserError(
        f"documents {one} and {other} have the same id {identity!r}; remove one, or set"
        " config.corpus.id_field to a field that is unique (or to nothing)"
    )


def documents(config: CorpusConfig, report: Report) -> Iterator[Document]:
    """All documents of the configured source in their order, empty ones included.

    Raises:
      UserError: the source is missing, unreadable or not what the config says.
    """
    if config.source == "vital_articles":
        return vital_articles(config.language, report, config.articles)
    if config.source == "text_files":
        return text_files(config, report)
    return tfds_documents(config, report)


def tfds_documents(config: CorpusConfig, report: Report) -> Iterator[Document]:
    """Documents of one split of a TFDS dataset, which is prepared where it is not.

    Raises:
      UserError: the dataset cannot be had, or lacks a field or the split.
    """
    source = _tfds_split(config)
    with progress.bar(total=len(source), unit="documents", label="corpus") as bar:
        for document in _tfds_rows(source, range(len(source)), config, report):
            bar.update()
            yield document


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source, which one worker reads; all of it by default.

    Attributes:
      name: of a file, see `text_files.find`.
      path: of the file.
      rows: of a TFDS dataset, first and end.
    """

    name: str = ""
    path: str = ""
    rows: tuple[int, int] = (0, 0)


def parts_of(config: CorpusConfig, report: Report) -> list[Part]:
    """The parts of a source, in the order of its documents.

    Raises:
      UserError: see `documents`.
    """
    if config.source == "vital_articles":
        return [Part()]
    if config.source == "text_files":
        files = find(config.paths, report)
        return [Part(name=name, path=str(path)) for name, path in files.items()]
    size = len(_tfds_split(config))
    starts = range(0, size, _PART_ROWS)
    return [Part(rows=(start, min(start + _PART_ROWS, size))) for start in starts]


def documents_of(
    part: Part, config: CorpusConfig, report: Report
) -> Iterator[Document]:
    """The documents of one part, empty ones included.

    Raises:
      UserError: see `documents`.
    """
    if config.source == "vital_articles":
        return vital_articles(config.language, report, config.articles)
    if config.source == "text_files":
        return read_file(part.name, pathlib.Path(part.path), config, report)
    return _tfds_rows(_tfds_split(config), range(*part.rows), config, report)


def _tfds_split(config: CorpusConfig) -> Any:
    name, split = _tfds_name(config)
    return tfds_source.open_split(
        name,
        split,
        data_dir=config.data_dir,
        setting="config.corpus.source",
        dir_setting="config.corpus.data_dir",
    )


def _tfds_name(config: CorpusConfig) -> tuple[str, str]:
    name, _, split = config.source.removeprefix(TFDS_PREFIX).partition(":")
    if not name or not split:
        raise UserError(
            f"config.corpus.source is {config.source!r}; name dataset and split, e.g."
            f" {TFDS_PREFIX}wiki40b/en:train"
        )
    return name, split


def _tfds_rows(
    source: Any, rows: range, config: CorpusConfig, report: Report
) -> Iterator[Document]:
    name, split = _tfds_name(config)
    for i in rows:
        origin = f"{name}:{split}[{i}]"
        row = {k: _text(v, origin, report) for k, v in source[i].items()}
        yield document_from(
            row, default_id=origin, origin=origin, config=config, report=report
        )


class VitalArticles(tfds.core.GeneratorBasedBuilder):
    """Introductions of Wikipedia's vital articles in English, French and Spanish."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's own convention
        tfds.core.BuilderConfig(name=language) for language in FILES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=records.features(), license=ATTRIBUTION
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {records.SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        assert self.builder_config is not None
        for document in vital_articles(self.builder_config.name, Report()):
            yield document.id, dataclasses.asdict(document)


def _text(value: Any, origin: str, report: Report) -> Any:
    # TFDS without TensorFlow gives text as bytes, and lists of it as lists or arrays.
    if isinstance(value, bytes):
        return decode(value, origin, report)
    if isinstance(value, list | np.ndarray):
        return [_text(item, origin, report) for item in value]
    return value


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest())


def _refuse_duplicates(hashes: np.ndarray, corpus: Corpus) -> None:
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for first, second in zip(order[same], order[same + 1], strict=True):
        one, other = corpus[int(first)], corpus[int(second)]
        # Equal hashes are not quite equal ids.
        if one.id == other.id:
            raise same_id(one.origin, other.origin, one.id)
