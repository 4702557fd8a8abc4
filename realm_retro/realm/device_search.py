"""Pre-training's retrieval on the devices: exact search inside the jitted step.

The index and the wordpieces of all passages lie on all devices of the mesh; REALM's
13 million vectors of 128 bfloat16 numbers are 3.4 GB. Candidates are found with the
weights of the step itself. What `candidates` does on the host is done here with
jax.numpy, in the same order and with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from realm_retro.data.passages import PassageStore
from realm_retro.parallel import axes
from realm_retro.parallel import mesh as meshes
from realm_retro.realm import model, objective, packing
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.examples import COUNTS, Examples, lost_share
from realm_retro.realm.live_index import InUse, LiveIndex
from realm_retro.retrieval.index import sharded
from realm_retro.train.recipe import Live
from realm_retro.typing import Array, Batch, Bool, HostArray, Int, JsonDict, PyTree

if TYPE_CHECKING:
    from realm_retro.realm.pretrain import PretrainConfig

_EXAMPLE = ("query", "query_len", "mask_positions", "targets", "target_mask")
_NOTES = ("staleness", "index_step", "cut_spans")
BATCH_SPEC = {
    **{name: objective.BATCH_SPEC[name] for name in _EXAMPLE},
    "original": ("batch", "length"),
    "own_document": ("batch",),
    **{name: ("batch",) for name in (*_NOTES, *COUNTS)},
}
_SHINGLE = 5  # as in `candidates`
# Of the share that makes a copy; its product with a number of runs fits an int32.
_LARGEST_DENOMINATOR = 1000


def live(examples: Examples, index: LiveIndex) -> Live:
    """Batches of masked queries alone; the step itself finds the candidates."""

    def ask(step: int, params: PyTree) -> InUse:
        return index.current(step, params)

    def find(step: int, asked: InUse) -> JsonDict:
        return {"index_step": asked.version.step}

    def batch(step: int, found: JsonDict) -> dict[str, HostArray]:
        made = examples(step)
        rows = len(made["row"])
        notes = {
            "staleness": np.full(rows, step - found["index_step"]),
            "index_step": np.full(rows, found["index_step"]),
            "cut_spans": made["cut"],
            **{name: made[name] for name in COUNTS},
        }
        return {
            **{name: made[name] for name in (*_EXAMPLE, "original")},
            "own_document": examples.store.document[made["row"]].astype(np.int32),
            **{name: x.astype(np.float32) for name, x in notes.items()},
        }

    return Live(0, ask, find, batch, index.carry, index.resume)


def tables(
    index: LiveIndex, store: PassageStore, mesh: Mesh
) -> Callable[[int, PyTree], Mapping[str, Array]]:
    """What every batch has besides: the index in use and all passages, sharded."""
    passages: dict[str, Array] = {}

    def shared(step: int, params: PyTree) -> Mapping[str, Array]:
        if not passages:
            rows = np.arange(len(store))
            title, title_length = store.title_tokens(rows)
            for name, values in (
                ("title", title),
                ("title_len", title_length),
                ("body", store.body),
                ("body_len", store.lengths),
                ("document", store.document),
            ):
                kind = jnp.uint16 if values.dtype == np.uint16 else jnp.int32
                table = sharded.place(values, mesh, dtype=jnp.dtype(kind))
                passages[f"all_{name}"] = table
        return {"index": index.current(step, params).index, **passages}

    return shared


def abstract_tables(
    config: RealmConfig, settings: PretrainConfig, size: int, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `tables` gives for so many passages of the model's lengths, as shapes."""
    pieces = np.uint16 if config.vocab_size <= 1 << 16 else np.int32
    shapes = {
        "index": ((size, config.vector_dim), settings.vectors),
        "all_title": ((size, config.title_length), pieces),
        "all_title_len": ((size,), np.int32),
        "all_body": ((size, config.body_length), pieces),
        "all_body_len": ((size,), np.int32),
        "all_document": ((size,), np.int32),
    }
    return {
        name: sharded.abstract(shape, mesh, dtype=jnp.dtype(kind))
        for name, (shape, kind) in shapes.items()
    }


def loss_fn(config: RealmConfig, settings: PretrainConfig, mesh: Mesh, size: int):
    """As `pretrain.loss_fn`, of batches that hold tables of `size` passages."""
    wanted = config.candidates - 1

    def loss(params: PyTree, batch: Batch, key: Array):
        with meshes.active(mesh):
            # Found with the step's own weights, never differentiated (traps: 3).
            vectors = jax.lax.stop_gradient(
                model.embed_queries(
                    config,
                    params,
                    *packing.query_inputs(batch["query"], batch["query_len"]),
                )
            )
            hits, _ = sharded.search(
                mesh,
                batch["index"],
                size,
                vectors,
                wanted + settings.extra,
                recall_target=settings.recall_target,
            )
            # The search gives every device all hits; each goes on with its own.
            hits = axes.constrain(hits, ("batch", None))
            chosen, own, copies = _choose(hits, batch, wanted, settings.copied)
            ready = {**batch, **_assemble(chosen, batch, config)}
            total, weight, metrics = objective.pretrain_loss(
                config, params, ready, key if config.dropout else None
            )
        rows = np.float32(len(vectors))
        notes = {name: (batch[name].sum(), rows) for name in _NOTES}
        notes |= {"own_hits": (own, rows), "copies": (copies, rows)}
        lost = {"lost_targets": lost_share(batch)}
        return total, weight, {**metrics, **notes, **lost}

    return loss


def _choose(
    hits: Int[Array, "b n"], batch: Batch, wanted: int, copied: float
) -> tuple[Int[Array, "b wanted"], Array, Array]:
    """As `candidates.choose`: the first hits that do not give the answer away."""
    there = hits >= 0
    safe = jnp.where(there, hits, 0)
    document = jnp.take(batch["all_document"], safe, axis=0)
    own = there & (document == batch["own_document"][:, None])
    possible = there & ~own
    bodies = jnp.take(batch["all_body"], safe, axis=0).astype(jnp.int32)
    lengths = jnp.take(batch["all_body_len"], safe, axis=0)
    copy = possible & _copies(batch, bodies, lengths, copied)
    keep = possible & ~copy
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :wanted]
    chosen = jnp.where(
        jnp.take_along_axis(keep, order, axis=1),
        jnp.take_along_axis(hits, order, axis=1),
        -1,
    )
    chosen = jnp.pad(
        chosen, ((0, 0), (0, wanted - chosen.shape[1])), constant_values=-1
    )
    # The host stops looking once it has enough: copies behind that do not count.
    before = jnp.cumsum(keep, axis=1) < wanted
    counts = own.sum().astype(jnp.float32), (copy & before).sum().astype(jnp.float32)
    return chosen, *counts


def _copies(
    batch: Batch, bodies: Array, lengths: Array, copied: float
) -> Bool[Array, "b n"]:
    """Whether a body holds the share `copied` of a query's runs of five wordpieces."""
    if copied > 1:
        return jnp.zeros(bodies.shape[:2], bool)
    query, query_there = _runs(batch["original"], batch["query_len"])
    body, body_there = _runs(bodies, lengths)
    same = query[:, None, :, None] == body[:, :, None, :]
    found = (same & body_there[:, :, None, :]).any(-1) & query_there[:, None, :]
    # Each run counts once, as in a set.
    earlier = jnp.tril(query[:, :, None] == query[:, None, :], -1)
    first = query_there & ~(earlier & query_there[:, None, :]).any(-1)
    total = first.sum(-1)[:, None]
    held = (found & first[:, None, :]).sum(-1)
    # In whole numbers: a device may round a quotient to the other side of `copied`.
    share = Fraction(copied).limit_denominator(_LARGEST_DENOMINATOR)
    return (total > 0) & (held * share.denominator >= total * share.numerator)


def _runs(ids: Array, lengths: Array) -> tuple[Array, Bool[Array, "*axes runs"]]:
    """A hash of every run of five, uint32, and which runs are of real wordpieces."""
    count = ids.shape[-1] - _SHINGLE + 1
    if count < 1:
        return jnp.zeros((*ids.shape[:-1], 1), jnp.uint32), jnp.zeros(
            (*ids.shape[:-1], 1), bool
        )
    hashed = jnp.zeros((*ids.shape[:-1], count), jnp.uint32)
    for i in range(_SHINGLE):
        piece = ids[..., i : i + count].astype(jnp.uint32)
        hashed = (hashed ^ piece) * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA6B)
        hashed = hashed ^ (hashed >> 15)
    place = jnp.arange(count).reshape((1,) * (ids.ndim - 1) + (-1,))
    return hashed, place + _SHINGLE <= lengths[..., None]


def _assemble(
    chosen: Int[Array, "b wanted"], batch: Batch, config: RealmConfig
) -> dict[str, Array]:
    """As `candidates.assemble`: wordpieces of the candidates behind the null one."""
    there = chosen >= 0
    rows = jnp.where(there, chosen, 0)

    def of(name: str, width: int | None = None) -> Array:
        x = jnp.take(batch[f"all_{name}"], rows, axis=0).astype(jnp.int32)
        x = jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, 0)
        pad = [(0, 0), (1, 0)]
        if width is not None:
            pad.append((0, width - x.shape[2]))
        return jnp.pad(x, pad)

    return {
        "title": of("title", config.title_length),
        "title_len": of("title_len"),
        "body": of("body", config.body_length),
        "body_len": of("body_len"),
        "valid": jnp.pad(there, ((0, 0), (1, 0)), constant_values=True),
    }
