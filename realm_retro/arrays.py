"""Arrays of many shards on disk, read as one: memory-mapped, never loaded whole."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from realm_retro.errors import UserError
from realm_retro.typing import HostArray


def open_npy(path: epath.PathLike) -> HostArray:
    """Memory-maps one ``.npy`` file; never unpickles.

    Raises:
      UserError: the file is not an array.
    """
    try:
        return np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: is not an array file ({error})") from None


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
            rows = np.arange(*rows.indices(len(self)))
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
