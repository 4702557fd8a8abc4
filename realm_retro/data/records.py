"""Documents as records of a TFDS dataset in array_record, without TensorFlow.

The files: ``documents-train.array_record-00000`` … with ``dataset_info.json`` and
``features.json``, which make the folder an ordinary TFDS dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from tensorflow_datasets.core import example_serializer

from realm_retro.data.corpus import FORMAT_VERSION, MADE_BY, Document
from realm_retro.disk import named_errors, size, tells_damage
from realm_retro.errors import UserError

SPLIT = "train"  # TFDS wants a name; our own splits are made of chunks
METADATA = ("dataset_info.json", "features.json")

_NAME = "documents"
_SHARD = re.compile(rf"{_NAME}-{SPLIT}\.array_record-(\d+)")
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
    return [*METADATA, *_shards(path.name for path in directory.iterdir())]


@dataclasses.dataclass(frozen=True)
class Records:
    """The documents of a written dataset, read by row."""

    directory: epath.Path
    _source: ArrayRecordDataSource

    @classmethod
    def open(cls, directory: epath.Path, names: Iterable[str]) -> Records:
        """Opens a dataset that `write` wrote.

        TFDS would go by the dataset's own metadata, which may name paths anywhere and
        Python modules to import.

        Args:
          directory: of the dataset.
          names: of its files.

        Raises:
          UserError: they are no documents.
          OSError: the disk cannot be read.
        """
        try:
            paths = [os.fspath(directory / name) for name in _shards(names)]
            with named_errors(directory):
                return cls(directory, ArrayRecordDataSource(paths))
        except Exception as error:  # whatever the library makes of damaged files
            if not tells_damage(error):
                raise
            raise _damaged(directory, "its records", error) from None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int, /) -> Document:
        if not 0 <= row < len(self):
            raise IndexError(f"document {row} of {len(self)}")
        try:
            with named_errors(self.directory):
                record = features().deserialize_example_np(self._source[row])
            return Document(**{name: record[name].decode() for name in _FIELDS})
        except Exception as error:  # as above
            if not tells_damage(error):
                raise
            raise _damaged(self.directory, f"document {row}", error) from None


def _damaged(directory: epath.Path, what: str, error: Exception) -> UserError:
    return UserError(
        f"{directory}: {what} cannot be read ({error}); delete {directory} and run:"
        f" python -m {MADE_BY}"
    )


def _shards(names: Iterable[str]) -> list[str]:
    """Those of the names that are files of documents, in their order."""
    found = {int(m[1]): name for name in names if (m := _SHARD.fullmatch(name))}
    return [found[number] for number in sorted(found)]


def write_shard(path: epath.Path, documents: Iterable[Document]) -> int:
    """Writes one file of documents in their order; returns their number.

    Raises:
      OSError: the disk is full.
    """
    length = 0
    with named_errors(path):
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
    num_bytes = sum(size(path) for path in directory.glob(f"{_NAME}-{SPLIT}.*"))
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
