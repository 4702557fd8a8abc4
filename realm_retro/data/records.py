"""Documents as records of a TFDS dataset in array_record, without TensorFlow.

The files: ``documents-train.array_record-00000`` … with ``dataset_info.json`` and
``features.json``, which make the folder an ordinary TFDS dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from tensorflow_datasets.core import example_serializer

from realm_retro.data.corpus import FORMAT_VERSION, Document

SPLIT = "train"  # TFDS wants a name; our own splits are made of chunks
METADATA = ("dataset_info.json", "features.json")

_NAME = "documents"
_SHARD_DOCUMENTS = 1 << 14
_FIELDS = [field.name for field in dataclasses.fields(Document)]


@functools.cache
def features() -> Any:
    """The TFDS features of a document."""
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in _FIELDS})


def write(directory: epath.Path, documents: Iterable[Document]) -> int:
    """Writes documents in their order, holding one at a time; returns their number.

    TFDS's builders would sort them by a hash: that takes up to 1 GB of memory, and
    TensorFlow beyond it. The same documents give the same bytes in any process.

    Raises:
      OSError: the disk is full.
    """
    clear(directory)
    lengths: list[int] = []
    rest = iter(documents)
    for first in rest:
        path = directory / shard_name(len(lengths))
        shard = itertools.chain([first], itertools.islice(rest, _SHARD_DOCUMENTS - 1))
        lengths.append(write_shard(path, shard))
    if lengths:
        write_metadata(directory, lengths)
    return sum(lengths)


def clear(directory: epath.Path) -> None:
    """Deletes the shards that an interrupted `write` left behind."""
    for leftover in directory.glob(f"{_NAME}-{SPLIT}.*"):
        leftover.unlink()


def shard_name(shard: int) -> str:
    """The name of a file of documents."""
    return f"{_NAME}-{SPLIT}.array_record-{shard:05d}"


def shard_of(row: int) -> int:
    """Which file the document of a row is in."""
    return row // _SHARD_DOCUMENTS


def rows_of(shard: int, documents: int) -> range:
    """Rows of a file's documents, of so many in all files."""
    start = shard * _SHARD_DOCUMENTS
    return range(start, min(start + _SHARD_DOCUMENTS, documents))


def file_names(directory: epath.Path) -> list[str]:
    """The files of a written dataset."""
    with _quiet():
        split = tfds.builder_from_directory(directory).info.splits[SPLIT]
    return [*METADATA, *sorted(split.filenames)]


@dataclasses.dataclass(frozen=True)
class Records:
    """The documents of a written dataset, read by row."""

    _source: Any

    @classmethod
    def open(cls, directory: epath.Path) -> Records:
        """Opens a dataset that `write` wrote."""
        with _quiet():
            builder: Any = tfds.builder_from_directory(directory)
            return cls(builder.as_data_source(SPLIT))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int, /) -> Document:
        record = self._source[row]
        return Document(**{name: record[name].decode() for name in _FIELDS})


def write_shard(path: epath.Path, documents: Iterable[Document]) -> int:
    """Writes one file of documents in their order; returns their number.

    Raises:
      OSError: the disk is full.
    """
    length = 0
    with _full_disk_is_an_os_error(path):
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for document in documents:
            writer.write(_serialise(document))
            length += 1
        writer.close()
    return length


@functools.cache
def _serialiser() -> example_serializer.ExampleSerializer:
    return example_serializer.ExampleSerializer(features().get_serialized_info())


def _serialise(document: Document) -> bytes:
    example = features().encode_example(dataclasses.asdict(document))
    # TFDS's own writers leave the order of an example's fields to chance, so that each
    # process writes other bytes, and a fingerprint would name the run, not the text.
    return _serialiser().get_tf_example(example).SerializeToString(deterministic=True)


@contextlib.contextmanager
def _full_disk_is_an_os_error(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # array_record reports a full disk in words only.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space", str(path)) from error


def write_metadata(directory: epath.Path, lengths: list[int]) -> None:
    """Makes a folder of written shards a TFDS dataset.

    Args:
      directory: of the shards ``shard_name(0)`` and so on.
      lengths: documents of each.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name=_NAME,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    num_bytes = sum(path.stat().length for path in directory.glob(f"{_NAME}-{SPLIT}.*"))
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=num_bytes,
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(),
        split_infos=[split],
        filename_template=template,
        version=f"{FORMAT_VERSION}.0.0",
        check_data=False,  # would need TensorFlow
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TFDS logs every dataset that it opens.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
