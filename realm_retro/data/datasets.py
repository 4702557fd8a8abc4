"""Corpora as TFDS datasets in array_record, read and written without TensorFlow.

`build` writes any source as one TFDS dataset (kind ``corpus``) which `open_corpus`,
or anyone's ``tfds.builder_from_directory``, reads by random access. Importing this
module also registers `VitalArticles`: ``tfds.builder("vital_articles/en")``.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.data import records, tfds_source
from realm_retro.data.corpus import (
    TFDS_PREFIX,
    Corpus,
    CorpusConfig,
    Document,
    Report,
    load_manifest,
)
from realm_retro.data.records import Records
from realm_retro.data.text_files import decode, document_from, text_files
from realm_retro.data.vital_articles import ATTRIBUTION, FILES, vital_articles
from realm_retro.errors import UserError


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
    return ArrayRecordCorpus(manifest, Records.open(manifest.directory))


def build(config: CorpusConfig, stage: artifacts.Stage) -> Report:
    """Streams the configured source into a corpus, but does not commit it.

    Memory holds one document at a time and eight bytes for each, however large the
    corpus. The same source gives the same bytes in any process.

    Raises:
      UserError: the source cannot be read, holds no text, or an id twice.
    """
    stage.restart()
    report = Report()
    hashes = array.array("Q")

    def kept() -> Iterator[Document]:
        for document in report.keep(documents(config, report)):
            hashes.append(_hash(document.id))
            yield document

    if not records.write(stage.directory, kept()):
        raise UserError(
            f"config.corpus ({config.source}, {' '.join(config.paths) or 'no path'})"
            f" holds no text ({report.empty} empty documents)"
        )
    corpus = Records.open(stage.directory)
    _refuse_duplicates(np.frombuffer(hashes, np.uint64), corpus)
    for name in records.file_names(stage.directory):
        stage.adopt(name)
    return report


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
    name, _, split = config.source.removeprefix(TFDS_PREFIX).partition(":")
    if not name or not split:
        raise UserError(
            f"config.corpus.source is {config.source!r}; name dataset and split, e.g."
            f" {TFDS_PREFIX}wiki40b/en:train"
        )
    source = tfds_source.open_split(
        name,
        split,
        data_dir=config.data_dir,
        setting="config.corpus.source",
        dir_setting="config.corpus.data_dir",
    )
    with progress.bar(total=len(source), unit="documents", label="corpus") as bar:
        for i in range(len(source)):
            origin = f"{name}:{split}[{i}]"
            row = {k: _text(v, origin, report) for k, v in source[i].items()}
            bar.update()
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
            raise UserError(
                f"documents {one.origin} and {other.origin} have the same id"
                f" {one.id!r}; remove one, or set config.corpus.id_field to a field"
                " that is unique (or to nothing)"
            )
