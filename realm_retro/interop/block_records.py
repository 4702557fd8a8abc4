"""The texts of the blocks that published block vectors belong to, row by row.

They come as

* ``.jsonl``, one string or one object with the field ``text`` a line, or ``.txt``, one
  block a line; each may be compressed (.gz, .xz);
* ``.npy`` or ``.npz`` (array ``block_records``) of fixed-width bytes or strings;
* the published ``block_records.npy``, a pickle of byte strings. It is read as data,
  one record at a time: nothing that it names is looked up or called.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import pickletools
import zipfile
import zlib
from collections.abc import Generator, Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from realm_retro.arrays import NOT_AN_ARRAY
from realm_retro.errors import UserError
from realm_retro.typing import HostArray

ARRAY = "block_records"

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_STRINGS = set(
    "BINBYTES SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE".split()  # noqa: SIM905
)
# What stands between the strings of a list without being one.
_BETWEEN = set(
    "MARK APPENDS APPEND MEMOIZE BINPUT LONG_BINPUT FRAME".split()  # noqa: SIM905
)
_DAMAGED = (
    *NOT_AN_ARRAY,
    RuntimeError,  # of an archive with a password
    OSError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


def read(path: epath.PathLike) -> Iterator[str]:
    """Yields the texts in the order of the vectors; see the module docstring.

    Raises:
      UserError: the file is missing or damaged, or a record is no text.
    """
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: is missing")
    done = 0
    try:
        with contextlib.closing(_records(path)) as records:
            for record in records:
                yield record if isinstance(record, str) else record.decode()
                done += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: record {done} is not UTF-8 ({error})") from None
    except _DAMAGED as error:
        raise UserError(
            f"{path}: is damaged, or holds no block records ({error}, after"
            f" {done:,} records); it may be .jsonl, .txt, .npy or .npz"
        ) from None


def _records(path: epath.Path) -> Generator[Any, None, None]:
    name = path.name
    if name.endswith(".npz"):
        # Opened here: numpy leaves the file of a damaged archive open.
        with (
            open(os.fspath(path), "rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            yield from _rows(arrays[ARRAY])
    elif name.endswith(".npy"):
        yield from _npy(path)
    else:
        opener: Any = _OPENERS.get(path.suffix, open)
        kind = name.removesuffix(path.suffix) if path.suffix in _OPENERS else name
        with opener(os.fspath(path), "rt", encoding="utf-8", newline="\n") as lines:
            if kind.endswith(".jsonl"):
                yield from (_text(json.loads(line)) for line in lines)
            elif kind.endswith(".txt"):
                yield from (line.removesuffix("\n") for line in lines)
            else:
                raise ValueError(f"{name} is of another kind")


def _text(value: Any) -> str:
    text = value["text"] if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text


def _rows(array: HostArray) -> Iterator[Any]:
    if array.dtype.kind not in "SU" or array.ndim != 1:
        raise TypeError(f"an array {array.shape} of {array.dtype} is no list of texts")
    yield from array


def _npy(path: epath.Path) -> Iterator[Any]:
    with open(os.fspath(path), "rb") as file:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        if not dtype.hasobject:
            yield from _rows(
                np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)
            )
            return
        count = 0
        for record in _pickled(file):
            count += 1
            yield record
        if (count,) != shape:
            raise ValueError(f"it has {count} records, but its header says {shape}")


def _pickled(file: IO[bytes]) -> Iterator[bytes | str]:
    """The strings of the one list in the pickle of an object array."""
    listed = False
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name == "EMPTY_LIST":
            listed = True
        elif not listed or name in _BETWEEN:
            continue
        elif name in _STRINGS and isinstance(argument, bytes | str):
            yield argument
        elif name.startswith("TUPLE"):  # the array's state, of which the list is last
            return
        else:
            raise ValueError(f"the operation {name} gives no text")
