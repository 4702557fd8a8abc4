"""Bits per byte of held-out documents, with retrieval OFF and ON (section 2.6).

The denominator is the UTF-8 bytes of the original text. Every token of a document is
predicted once, by sliding windows, given what the window holds before it; the end of
a document is no text and does not count. Sums are in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realm_retro import progress
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.nn import losses
from realm_retro.parallel import axes, hosts
from realm_retro.parallel import mesh as meshes
from realm_retro.retro import batches, recipe
from realm_retro.retro.config import RetroConfig
from realm_retro.typing import Array, Batch, HostArray, JsonDict, PyTree

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The ``evaluate`` section of a config.

    Attributes:
      split: which documents; ``validation`` ones are never retrieved from.
      batch_size: windows at a time.
      window_chunks: chunks of a window; 0 takes that of training.
      stride_chunks: chunks between windows; less costs more and gives each token
        more context. Less than a window, so that each counted token has one before
        it.
      neighbours: the sweep of ON; 0 is OFF, which is always measured.
      max_documents: evaluate only so many, evenly spread; 0 is all of them.
    """

    split: str = "validation"
    batch_size: int = 8
    window_chunks: int = 0
    stride_chunks: int = 4
    neighbours: tuple[int, ...] = ()
    max_documents: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.stride_chunks < 1 or self.window_chunks < 0:
            raise UserError(
                "config.evaluate: batch_size and stride_chunks must be at least 1,"
                " window_chunks at least 0"
            )
        if any(k < 0 for k in self.neighbours):
            raise UserError(
                f"config.evaluate.neighbours is {self.neighbours}; each at least 0"
            )


def document_bits(
    model: RetroConfig,
    params: PyTree,
    source: batches.WindowSource,
    rows: HostArray,
    *,
    batch_size: int,
    mesh: Mesh,
    label: str,
) -> HostArray:
    """Bits of each document.

    Args:
      model: the model's shape.
      params: its weights.
      source: sliding windows over the documents.
      rows: the documents, ascending.
      batch_size: windows at a time.
      mesh: the devices.
      label: names the pass in the progress bar.

    Returns:
      float64 [documents], in the order of `rows`.
    """
    store, bits = source.store, np.zeros(len(rows))
    eos = store.tokenizer.eos_id
    spec = {
        name: names
        for name, names in recipe.batch_spec(model).items()
        if source.neighbours is not None or name in recipe.BATCH_SPEC
    }
    pending: list[tuple[Array, HostArray, HostArray]] = []

    def collect() -> None:
        nats, counted, owner = pending.pop(0)
        values = np.asarray(nats, np.float64)[: len(counted)]
        np.add.at(bits, owner[counted], values[counted] / np.log(2))

    with progress.bar(total=len(source), unit="windows", label=label) as bar:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            items = [source[i] for i in indices]
            # A short last batch repeats its last window: one shape, one program.
            padded = items + [items[-1]] * (batch_size - len(items))
            batch = {
                name: hosts.to_global(x, axes.sharding(spec[name], x.shape, mesh))
                for name in spec
                for x in [np.stack([item[name] for item in padded])]
            }
            targets = np.stack([item["targets"] for item in items])
            counted = np.stack([item["loss_mask"] for item in items])
            counted &= targets != eos
            chunks = source.windows.chunks[start : start + len(items)]
            document = store.document[np.maximum(chunks, 0)]
            owner = np.searchsorted(rows, document).repeat(store.chunk_length, axis=1)
            pending.append((_token_nats(model, mesh, params, batch), counted, owner))
            # One batch behind: the device works while the host adds up.
            if len(pending) > 1:
                collect()
            bar.update(len(items))
        while pending:
            collect()
    return bits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_nats(model: RetroConfig, mesh: Mesh, params: PyTree, batch: Batch) -> Array:
    with meshes.active(mesh):
        logits = recipe.apply(model, params, batch)
    nats = losses.token_losses(logits, batch["targets"])
    # Whole on every device, so that every process can read it.
    return jax.lax.with_sharding_constraint(nats, NamedSharding(mesh, PartitionSpec()))


def interval(
    bits: HostArray, num_bytes: HostArray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Σ bits / Σ bytes with its 95 % bootstrap interval over documents.

    Args:
      bits: float64 [documents]; also differences of bits, for paired comparisons.
      num_bytes: int64 [documents].
      seed: of the resampling.

    Returns:
      (value, low, high).
    """
    rng = np.random.default_rng(seed)
    documents = len(bits)
    values = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        picked = rng.integers(documents, size=documents)
        values[i] = bits[picked].sum() / num_bytes[picked].sum()
    low, high = np.quantile(values, [0.025, 0.975])
    return float(bits.sum() / num_bytes.sum()), float(low), float(high)


def result(label: str, k: int, bits: HostArray, num_bytes: HostArray) -> JsonDict:
    """One row of an evaluation."""
    value, low, high = interval(bits, num_bytes)
    return {
        "label": label,
        "neighbours": k,
        "bits_per_byte": value,
        "low": low,
        "high": high,
    }


def documents_of(store: ChunkStore, split: int, most: int) -> HostArray:
    """Rows of a split's documents that have text; `most` of them, evenly spread."""
    documents = store.documents
    rows = np.flatnonzero((documents.split == split) & (documents.num_bytes > 0))
    if most and len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return rows
