"""Batches as a pure function of (seed, step), by grain.

There is no iterator state to save: a run resumes by asking for the next step, and
any number of processes sees the same global batches, each reading its own rows.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import grain
import numpy as np

from realm_retro.errors import UserError
from realm_retro.typing import HostArray

T_co = TypeVar("T_co", covariant=True)


class RandomAccess(Protocol[T_co]):
    """Anything with a length whose items can be asked for in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """A choice of a store's rows as a source of `batches`, items ``{"row": int}``."""

    rows: HostArray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.int64]:
        return {"row": self.rows[index]}


class Batches:
    """Global batches by step. See `batches`."""

    def __init__(self, rows: grain.MapDataset[dict[str, Any]], batch_size: int):
        self._rows = rows
        self.batch_size = batch_size

    def __getitem__(self, step: int) -> dict[str, HostArray]:
        """The global batch of a step: name → array [batch, …]."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, HostArray]:
        """Rows [start, stop) of the global batch of a step; only these are read."""
        first = step * self.batch_size
        items: list[Any] = [self._rows[first + row] for row in range(start, stop)]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def local(
        self, step: int, process_index: int, process_count: int
    ) -> dict[str, HostArray]:
        """One process's equal, contiguous share of the global batch of a step."""
        share, rest = divmod(self.batch_size, process_count)
        if rest:
            raise UserError(
                f"config.train.batch_size={self.batch_size} cannot be divided among"
                f" {process_count} processes; make it a multiple of {process_count}"
            )
        return self.rows(step, process_index * share, (process_index + 1) * share)


def batches(
    source: RandomAccess[dict[str, Any]], *, seed: int, batch_size: int
) -> Batches:
    """Shuffles a source anew each epoch, repeats it for ever, and batches it.

    A batch may hold the end of one epoch and the start of the next: no item is ever
    left out.

    Args:
      source: items are dicts of equally shaped arrays or numbers.
      seed: of the order.
      batch_size: rows of the global batch.

    Raises:
      UserError: the source is empty.
    """
    if not len(source):
        raise UserError(
            "there is nothing to make batches of: no training sequence; add text or"
            " raise config.chunks.train_fraction"
        )
    # grain adds the number of the epoch to the shuffle's seed. `seed` hashes ours, so
    # that the epochs of seed 1 are not those of seed 0, one further.
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()  # pyright: ignore[reportArgumentType]
    return Batches(rows, batch_size)


def prefetch(
    source: RandomAccess[T_co], start: int, *, depth: int = 2
) -> Iterator[T_co]:
    """Yields ``source[start]``, ``source[start + 1]``, … read ahead in threads.

    Args:
      source: e.g. `Batches`.
      start: the first step.
      depth: how many steps to read ahead, each in a thread of its own.
    """
    with ThreadPoolExecutor(depth, thread_name_prefix="batches") as pool:
        ahead = collections.deque(
            pool.submit(source.__getitem__, start + i) for i in range(depth)
        )
        for step in itertools.count(start + depth):
            item = ahead.popleft().result()
            ahead.append(pool.submit(source.__getitem__, step))
            yield item
