"""Arrays of many shards on disk, read as one, and the names of arrays in a tree."""

from __future__ import annotations

import mmap
import os
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from etils import epath

from realm_retro.errors import UserError
from realm_retro.typing import HostArray

# What numpy makes of the header of a damaged file.
NOT_AN_ARRAY = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
    SyntaxError,
    EOFError,
    tokenize.TokenError,
)


def open_npy(path: epath.PathLike) -> HostArray:
    """Memory-maps one ``.npy`` file; never unpickles.

    Raises:
      UserError: the file is not an array.
    """
    try:
        # Not `np.load`, which also opens archives.
        return np.lib.format.open_memmap(os.fspath(path), mode="r")
    except NOT_AN_ARRAY as error:
        raise UserError(f"{path}: is not an array file ({error})") from None


def release(array: HostArray) -> None:
    """Lets go of the pages of a memory-mapped array that reads have brought in.

    They count as memory of this process, so that a stage which walks through a file
    once seems to hold all of it at the end. The system keeps them as long as it has
    room; the next read maps them again. Other arrays are left alone.
    """
    if array.flags.writeable or not hasattr(mmap, "MADV_DONTNEED"):
        return
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def write_npy(path: epath.PathLike, array: npt.ArrayLike) -> None:
    """Writes one ``.npy`` file.

    Unlike `np.save` it says when the disk is full: numpy's own error has no number.
    """
    array = np.asarray(array)
    with NpyWriter(path, array.dtype, array.shape[1:]) as file:
        file.append(array)


class ShardedArray:
    """Shards that share all but the first axis, indexed as their concatenation."""

    def __init__(self, shards: Sequence[HostArray]):
        if not shards:
            raise ValueError("ShardedArray needs at least one shard")
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    @classmethod
    def open(cls, paths: Sequence[epath.PathLike]) -> ShardedArray:
        """Memory-maps shards in the given order."""
        return cls([open_npy(path) for path in paths])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenation."""
        return (int(self.starts[-1]), *self.shards[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The shards' dtype."""
        return self.shards[0].dtype

    def __len__(self) -> int:
        """Rows in all shards."""
        return int(self.starts[-1])

    def __getitem__(self, rows: int | slice | HostArray) -> HostArray:
        """Rows as an array in memory; `rows` is an int, a slice or an int array."""
        if isinstance(rows, (int, np.integer)):
            return self[np.asarray([rows])][0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._run(start, stop)
            rows = np.arange(start, stop, step)
        rows = np.asarray(rows)
        flat = rows.reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"rows {flat.min()}…{flat.max()} of {len(self)}")
        out = np.empty((flat.size, *self.shape[1:]), self.dtype)
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        for shard in np.unique(owner):
            mine = owner == shard
            out[mine] = self.shards[shard][flat[mine] - self.starts[shard]]
        return out.reshape(*rows.shape, *self.shape[1:])

    def release(self) -> None:
        """See `release`."""
        for shard in self.shards:
            release(shard)

    def _run(self, start: int, stop: int) -> HostArray:
        """Rows start … stop − 1; no list of them is made, which can be large."""
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        for shard, first in zip(self.shards, self.starts[:-1], strict=True):
            low, high = max(start, int(first)), min(stop, int(first) + len(shard))
            if low < high:
                out[low - start : high - start] = shard[low - first : high - first]
        return out


class NpyWriter:
    """Writes a ``.npy`` file by appending rows: a shard need not fit in memory."""

    def __init__(
        self, path: epath.PathLike, dtype: npt.DTypeLike, row_shape: Sequence[int] = ()
    ):
        self._file = epath.Path(path).open("wb")
        self._dtype = np.dtype(dtype)
        self._row_shape = tuple(row_shape)
        self.rows = 0
        self._write_header()

    def append(self, rows: npt.ArrayLike) -> None:
        """Appends rows [n, *row_shape], converted to the file's dtype."""
        array = np.ascontiguousarray(rows, self._dtype)
        if array.shape[1:] != self._row_shape:
            raise ValueError(f"rows {array.shape[1:]} for a file of {self._row_shape}")
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self.rows += len(array)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.seek(0)
            self._write_header()
        finally:
            self._file.close()

    def _write_header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so that the
        # final header fits over the first one.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as ``a/b/c`` → leaf."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree
