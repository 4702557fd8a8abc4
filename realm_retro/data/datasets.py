"""Corpora as TFDS datasets in array_record, read and written without TensorFlow.

`build` writes any source as one TFDS dataset (kind ``corpus``) which `open_corpus`,
or anyone's ``tfds.builder_from_directory``, reads by random access. Importing this
module also registers `VitalArticles`: ``tfds.builder("vital_articles/en")``.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.data.corpus import (
    FORMAT_VERSION,
    TFDS_PREFIX,
    CorpusConfig,
    Document,
    Report,
    batched_by_size,
    load_manifest,
)
from realm_retro.data.text_files import decode, document_from, text_files
from realm_retro.data.vital_articles import ATTRIBUTION, FILES, vital_articles
from realm_retro.errors import UserError

_FIELDS = [field.name for field in dataclasses.fields(Document)]
_NAME = "documents"
_SPLIT = "train"  # TFDS wants a name; our own splits are made of chunks
_SHARD_DOCUMENTS = 1 << 14


@dataclasses.dataclass(frozen=True)
class ArrayRecordCorpus:
    """A finished corpus: documents in array_record files, read by row."""

    manifest: artifacts.Manifest
    _records: Any

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int, /) -> Document:
        record = self._records[row]
        return Document(**{name: record[name].decode() for name in _FIELDS})


def open_corpus(directory: epath.PathLike, *, verify: bool = True) -> ArrayRecordCorpus:
    """Opens a finished corpus.

    Raises:
      UserError: it is missing, unfinished or damaged.
    """
    manifest = load_manifest(directory, verify=verify)
    return ArrayRecordCorpus(manifest, _records(manifest.directory))


def build(config: CorpusConfig, stage: artifacts.Stage) -> Report:
    """Streams the configured source into a corpus, but does not commit it.

    Memory holds a few MB of text and eight bytes a document, however large the
    corpus.

    Raises:
      UserError: the source cannot be read, holds no text, or an id twice.
    """
    stage.restart()
    for leftover in stage.directory.glob(f"{_NAME}-{_SPLIT}.*"):
        leftover.unlink()
    report = Report()
    hashes = array.array("Q")
    with _writer(stage.directory) as writer:
        for group in batched_by_size(report.keep(documents(config, report))):
            writer.add_examples({_SPLIT: [dataclasses.asdict(d) for d in group]})
            hashes.extend(_hash(document.id) for document in group)
    if not report.documents:
        raise UserError(
            f"config.corpus ({config.source}, {' '.join(config.paths) or 'no path'})"
            f" holds no text ({report.empty} empty documents)"
        )
    _refuse_duplicates(np.frombuffer(hashes, np.uint64), _records(stage.directory))
    for name in _file_names(stage.directory):
        stage.adopt(name)
    return report


def documents(config: CorpusConfig, report: Report) -> Iterator[Document]:
    """All documents of the configured source in their order, empty ones included.

    Raises:
      UserError: the source is missing, unreadable or not what the config says.
    """
    if config.source == "vital_articles":
        return vital_articles(config.language, report)
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
    records = _tfds_records(name, split, config.data_dir)
    with progress.bar(total=len(records), unit="documents", label="corpus") as bar:
        for i in range(len(records)):
            origin = f"{name}:{split}[{i}]"
            row = {k: _text(v, origin, report) for k, v in records[i].items()}
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
            builder=self, features=_features(), license=ATTRIBUTION
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        assert self.builder_config is not None
        for document in vital_articles(self.builder_config.name, Report()):
            yield document.id, dataclasses.asdict(document)


def _text(value: Any, origin: str, report: Report) -> Any:
    # TFDS without TensorFlow gives text as bytes, and lists of it as object arrays.
    if isinstance(value, bytes):
        return decode(value, origin, report)
    if isinstance(value, np.ndarray):
        return [_text(item, origin, report) for item in value.tolist()]
    return value


def _features() -> Any:
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS})


@contextlib.contextmanager
def _writer(directory: epath.Path) -> Iterator[tfds.core.SequentialWriter]:
    # TFDS's own builders sort examples by a hash, for which they hold up to 1 GB in
    # memory and need TensorFlow beyond; this one streams and keeps the order.
    writer = tfds.core.SequentialWriter(
        _info(directory), _SHARD_DOCUMENTS, file_format="array_record"
    )
    writer.initialize_splits([_SPLIT])
    try:
        yield writer
        writer.close_all()
    except RuntimeError as error:
        # array_record reports a full disk in words only.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space", str(directory)) from error


def _info(directory: epath.Path) -> tfds.core.DatasetInfo:
    identity = tfds.core.DatasetIdentity(
        name=_NAME,
        version=tfds.core.Version(f"{FORMAT_VERSION}.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    return tfds.core.DatasetInfo(builder=identity, features=_features())


def _file_names(directory: epath.Path) -> list[str]:
    with _quiet():
        split = tfds.builder_from_directory(directory).info.splits[_SPLIT]
    return ["dataset_info.json", "features.json", *sorted(split.filenames)]


def _records(directory: epath.Path) -> Any:
    with _quiet():
        builder: Any = tfds.builder_from_directory(directory)
        return builder.as_data_source(_SPLIT)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TFDS logs every dataset that it opens.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest())


def _refuse_duplicates(hashes: np.ndarray, records: Any) -> None:
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for first, second in zip(order[same], order[same + 1], strict=True):
        one, other = records[int(first)], records[int(second)]
        # Equal hashes are not quite equal ids.
        if one["id"] == other["id"]:
            raise UserError(
                f"documents {one['origin'].decode()} and {other['origin'].decode()}"
                f" have the same id {one['id'].decode()!r}; remove one, or set"
                " config.corpus.id_field to a field that is unique (or to nothing)"
            )


def _tfds_records(name: str, split: str, data_dir: str) -> Any:
    what = f"config.corpus.source: the TFDS dataset {name!r}"
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        raise UserError(f"{what} is not known ({_first_line(error)})") from None
    if not builder.is_prepared():
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # whatever its own download code may raise
            raise UserError(
                f"{what} could not be prepared ({_first_line(error)}); prepare it"
                " elsewhere with file_format='array_record' and set"
                " config.corpus.data_dir"
            ) from error
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"{what} in {builder.data_dir} is not in array_record; prepare it with"
            " file_format='array_record' in another folder and set"
            " config.corpus.data_dir"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{what} has no split {split!r} ({_first_line(error)}); it has:"
            f" {', '.join(builder.info.splits)}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
