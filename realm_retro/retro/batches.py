"""From the chunk store and the neighbour table to RETRO's batches.

A *window* is l chunks that the model reads at once. It holds one or more *pieces*, each
a run of chunks of one document. Attention stays inside a piece, and so does chunked
cross-attention (see `_drop_across_pieces`), so a window computes for each piece what
the piece alone would give: packing changes the cost and nothing else.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from realm_retro.data.chunk_store import ChunkStore
from realm_retro.retrieval.neighbours import NeighbourTable
from realm_retro.typing import HostArray


@dataclasses.dataclass(frozen=True)
class Windows:
    """Which chunks each window reads, and which of them count.

    Attributes:
      chunks: int64 [windows, l], chunk ids; −1 is an empty place.
      pieces: int32 [windows, l], number of the piece within its window.
      scored: bool [windows, l], whether the chunk's tokens count as targets.
    """

    chunks: HostArray
    pieces: HostArray
    scored: HostArray

    def __len__(self) -> int:
        return len(self.chunks)


def training_windows(store: ChunkStore, split: int, length: int, seed: int) -> Windows:
    """All chunks of a split, documents in a random order, cut into windows.

    A document may be cut by the end of a window and goes on in the next.

    Args:
      store: the corpus.
      split: e.g. ``chunk_store.TRAIN``.
      length: l, chunks of a window.
      seed: of the documents' order.
    """
    rows = np.flatnonzero(store.documents.split == split)
    rows = np.random.default_rng(seed).permutation(rows)
    first = store.documents.first_chunk
    counts = first[rows + 1] - first[rows]
    # Each document's chunks are consecutive ids: one arange shifted per document.
    starts = np.cumsum(counts) - counts
    chunks = np.arange(counts.sum()) + np.repeat(first[rows] - starts, counts)
    owner = np.repeat(np.arange(len(rows)), counts)
    empty = -len(chunks) % length
    chunks = np.pad(chunks, (0, empty), constant_values=-1).reshape(-1, length)
    owner = np.pad(owner, (0, empty), constant_values=-1).reshape(-1, length)
    pieces = np.cumsum(np.diff(owner, axis=1, prepend=owner[:, :1]) != 0, axis=1)
    return Windows(chunks, pieces.astype(np.int32), chunks >= 0)


def sliding_windows(
    store: ChunkStore, rows: HostArray, length: int, stride: int
) -> Windows:
    """Windows in which each token of each of some documents counts exactly once.

    A document longer than a window is read by windows that start `stride` chunks
    apart; each counts the chunks that no earlier one did. Short pieces share windows.

    Args:
      store: the corpus.
      rows: the documents.
      length: l, chunks of a window.
      stride: chunks between windows, less than `length`: a window repeats at least
        one chunk, which gives the first token that counts something to follow.

    Raises:
      ValueError: the stride would leave tokens out.
    """
    if not 0 < stride < length:
        raise ValueError(
            f"a stride of {stride} chunks does not suit windows of {length}; it must be"
            f" 1 to {length - 1}"
        )
    first = store.documents.first_chunk
    pieces = []  # (first chunk, chunks, chunks at the start that do not count)
    for row in rows:
        start, end = int(first[row]), int(first[row + 1])
        pieces.append((start, min(length, end - start), 0))
        while start + length < end:
            seen = start + length
            start += stride
            pieces.append((start, min(length, end - start), seen - start))
    return _pack(pieces, length)


def _pack(pieces: list[tuple[int, int, int]], length: int) -> Windows:
    """Best-fit, longest pieces first."""
    open_windows: dict[int, list[int]] = {}  # free places → windows
    placed: list[list[tuple[int, int, int]]] = []
    for piece in sorted(pieces, key=lambda p: -p[1]):
        size = piece[1]
        free = next((f for f in range(size, length + 1) if open_windows.get(f)), None)
        if free is None:
            placed.append([])
            window, free = len(placed) - 1, length
        else:
            window = open_windows[free].pop()
        placed[window].append(piece)
        open_windows.setdefault(free - size, []).append(window)
    chunks = np.full((len(placed), length), -1, np.int64)
    numbers = np.full((len(placed), length), -1, np.int32)
    scored = np.zeros((len(placed), length), bool)
    for window, members in enumerate(placed):
        at = 0
        for number, (start, size, unscored) in enumerate(members):
            chunks[window, at : at + size] = np.arange(start, start + size)
            numbers[window, at : at + size] = number
            scored[window, at + unscored : at + size] = True
            at += size
    return Windows(chunks, numbers, scored)


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """Random access to windows as arrays; what `data.loader.batches` draws from.

    Attributes:
      windows: which chunks.
      store: the corpus.
      neighbours: their neighbours; None where the model does not retrieve.
      k: neighbours of each chunk, at most as many as the table holds.
    """

    windows: Windows
    store: ChunkStore
    neighbours: NeighbourTable | None
    k: int

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, HostArray]:
        """One window.

        Returns:
          ``tokens``, ``targets``, ``segments`` int32 [n] and ``loss_mask`` bool [n];
          where it retrieves also ``neighbours`` int32 [l, k, r] and
          ``neighbour_mask`` bool [l, k, r]. A target is the next token of the same
          piece; the last token of a window has none.
        """
        ids = self.windows.chunks[index]
        pieces = self.windows.pieces[index]
        m, pad_id = self.store.chunk_length, self.store.tokenizer.pad_id
        present = ids >= 0
        rows = np.maximum(ids, 0)
        lengths = np.where(present, self.store.lengths[rows], 0)
        real = np.arange(m) < lengths[:, None]
        tokens = np.where(real, self.store.tokens[rows], pad_id)
        segments = np.repeat(np.where(present, pieces, -1), m)

        tokens = tokens.reshape(-1).astype(np.int32)
        counts = (real & self.windows.scored[index][:, None]).reshape(-1)
        same = segments[1:] == segments[:-1]
        item = {
            "tokens": tokens,
            "targets": np.append(tokens[1:], np.int32(pad_id)),
            "loss_mask": np.append(counts[1:] & same, False),
            "segments": segments.astype(np.int32),
        }
        if self.neighbours is not None:
            near = np.asarray(self.neighbours.ids[rows])[:, : self.k]
            near = np.where(present[:, None], near, -1)
            item["neighbours"], mask = self.store.with_continuation(near)
            item["neighbour_mask"] = _drop_across_pieces(mask, pieces)
        return item


def _drop_across_pieces(mask: HostArray, pieces: HostArray) -> HostArray:
    """Masks the neighbours of the last chunk of each piece that another one follows.

    They could only be used by the first m − 1 tokens of that other piece.
    """
    followed = np.append(pieces[1:] != pieces[:-1], False)
    return mask & ~followed[:, None, None]
