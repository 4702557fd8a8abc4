"""REALM's pre-training: masked queries, live retrieval, the marginal likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.parallel import mesh as meshes
from realm_retro.realm import candidates, device_search, model, objective, search
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.examples import COUNTS, MASKINGS, Examples, lost_share
from realm_retro.realm.live_index import MODES, InUse, LiveIndex, Mode
from realm_retro.retrieval.index import sharded
from realm_retro.retrieval.index.base import Index
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Live, LoopState, Recipe, no_batches
from realm_retro.typing import Array, Batch, HostArray, JsonDict, PyTree

# What a batch says about itself, one number an example; reported as means.
_NOTES = ("staleness", "index_step", "cut_spans", "own_hits", "copies")
BATCH_SPEC = {
    **objective.BATCH_SPEC,
    **{name: ("batch",) for name in (*_NOTES, *COUNTS)},
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What is masked and what is searched (section ``pretrain``).

    Attributes:
      masking: ``salient`` (the paper), ``span`` or ``tokens`` (its ablation).
      depth: 1 looks the next batch's candidates up while the device takes a step, with
        weights one step older; 0 waits for them.
      refresh: who refreshes the index: ``inline``, ``workers`` or ``never``; see
        `live_index.LiveIndex`.
      placement: where is searched: on the ``host``, with any index, or on the
        ``device``, exactly, over vectors and passages that lie on all devices of the
        mesh, inside the step.
      index: of the host: ``exact``, ``scann`` or ``auto``.
      vectors: dtype of the vectors on the devices, ``float32`` or ``bfloat16``.
      recall_target: of the search on the devices, above 0; 1 is exact. See
        `sharded.search`.
      extra: hits beyond k − 1 that are searched for, so that enough are left when those
        that give the answer away are taken out.
      copied: a hit that holds this share of the query's runs of five wordpieces is a
        copy and is taken out; above 1 keeps all.
    """

    masking: str = "salient"
    depth: int = 1
    refresh: Mode = "inline"
    placement: str = "host"
    index: str = "auto"
    vectors: str = "float32"
    recall_target: float = 1.0
    extra: int = 16
    copied: float = 0.8

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "masking": MASKINGS,
            "depth": (0, 1),
            "refresh": MODES,
            "index": ("auto", "exact", "scann"),
            "placement": ("host", "device"),
            "vectors": ("float32", "bfloat16"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise UserError(
                    f"config.pretrain.{name}={getattr(self, name)!r}; choose {known}"
                )
        if not 0 < self.recall_target <= 1:
            raise UserError(
                f"config.pretrain.recall_target={self.recall_target} must be above 0"
                " and at most 1"
            )
        if self.extra < 0 or self.copied <= 0:
            raise UserError(
                f"config.pretrain.extra={self.extra} must not be negative, and copied="
                f"{self.copied} must be above 0"
            )


def make(
    config: RealmConfig,
    settings: PretrainConfig,
    train: TrainConfig,
    *,
    store: PassageStore,
    examples: Examples,
    index: LiveIndex,
    mesh: Mesh,
    weights: Callable[[], PyTree] | None,
) -> Recipe:
    """The recipe of pre-training.

    Args:
      config: the model's.
      settings: masks and search.
      train: steps and batch size.
      store: the passages, which are queries and documents.
      examples: the masked queries.
      index: the passages' index.
      mesh: the devices that train.
      weights: parameters to start from; None for random ones.

    Raises:
      UserError: the corpus is smaller than the number of candidates.
    """
    if len(store) < config.candidates:
        raise UserError(
            f"{store.manifest.directory}: holds {len(store)} passages, fewer than"
            f" config.model.candidates={config.candidates}; add text or lower it"
        )

    def refresh(loop: LoopState) -> None:
        if loop.step == train.steps:  # no step is left that would ask an index
            index.end()
        else:
            index.after_step(loop)

    on_device = settings.placement == "device"
    parents = [store.fingerprint]
    if examples.spans is not None:
        parents.append(examples.spans.fingerprint)
    return dataclasses.replace(
        outline(config, settings, train, size=len(store), mesh=mesh),
        description=_description(config, settings, examples, train, mesh),
        batch_at=(
            device_search.live(examples, index)
            if on_device
            else _live(config, settings, store, examples, index)
        ),
        fingerprint=artifacts.fingerprint_of(parents),
        hooks=(refresh,),
        weights=weights,
        shared=device_search.tables(index, store, mesh) if on_device else None,
        examples=lambda step: {"passage": examples.batches[step]["row"]},
    )


def outline(
    config: RealmConfig,
    settings: PretrainConfig,
    train: TrainConfig,
    *,
    size: int,
    mesh: Mesh,
) -> Recipe:
    """The recipe without data: all that a train step is compiled from.

    Args:
      config: the model's.
      settings: masks and search.
      train: steps and batch size.
      size: how many passages there are.
      mesh: the devices that train.
    """
    on_device = settings.placement == "device"
    b, k = train.batch_size, config.candidates
    return Recipe(
        description=f"REALM, {size:,} passages",
        init=lambda key: model.init(config, key, model.PRETRAINING),
        loss=(
            device_search.loss_fn(config, settings, mesh, size)
            if on_device
            else loss_fn(config, mesh)
        ),
        batch_at=no_batches,
        batch_spec=device_search.BATCH_SPEC if on_device else BATCH_SPEC,
        tokens_per_step=b * k * config.joint_tokens,
        flops_per_step=flops(config, b),
        fingerprint="",
    )


def index_builder(
    config: RealmConfig,
    settings: PretrainConfig,
    mesh: Mesh,
    report: Callable[[str], Any],
    *,
    batch_size: int,
) -> Callable[[ShardedArray], Any]:
    """What `LiveIndex` makes of vectors: an index of the host, or their copy there.

    Args:
      config: the model's.
      settings: which.
      mesh: the devices that train.
      report: takes a line about each index of the host that is not exact.
      batch_size: queries of a step.

    Raises:
      UserError: see `search.backend_on`.
    """
    backend = settings.index
    if settings.placement == "host":
        backend = search.backend_on(mesh, backend, batch_size)

    def on_host(vectors: ShardedArray) -> Index:
        return search.build_index(
            np.asarray(vectors[:], np.float32),
            backend=backend,
            k=_searched(config, settings),
            report=report,
        )

    def on_devices(vectors: ShardedArray) -> Array:
        return sharded.place(vectors, mesh, dtype=jnp.dtype(settings.vectors))

    return on_host if settings.placement == "host" else on_devices


def loss_fn(config: RealmConfig, mesh: Mesh):
    """(parameters, batch, key) → −Σ log p(y | x), examples, metrics."""

    def loss(params: PyTree, batch: Batch, key: Array):
        with meshes.active(mesh):
            total, weight, metrics = objective.pretrain_loss(
                config, params, batch, key if config.dropout else None
            )
        rows = np.float32(len(batch["query"]))
        notes = {name: (batch[name].sum(), rows) for name in _NOTES}
        lost = {"lost_targets": lost_share(batch)}
        return total, weight, {**metrics, **notes, **lost}

    return loss


def flops(config: RealmConfig, batch_size: int) -> float:
    """Floating point operations of a step by formula: 6 per weight and token.

    Products with the vocabulary are of masked tokens only; attention's own products
    and everything elementwise are left out.
    """
    layer = 4 * config.width**2 + 2 * config.width * config.hidden
    k = config.candidates
    tokens = (
        config.query_tokens + (k - 1) * config.document_tokens + k * config.joint_tokens
    )
    vocabulary = k * config.max_masks * config.width * config.vocab_size
    return 6.0 * batch_size * (tokens * config.num_layers * layer + vocabulary)


def _live(
    config: RealmConfig,
    settings: PretrainConfig,
    store: PassageStore,
    examples: Examples,
    index: LiveIndex,
) -> Live:
    made: dict[int, dict[str, HostArray]] = {}

    def examples_at(step: int) -> dict[str, HostArray]:
        if step not in made:
            made[step] = examples(step)
        return made[step]

    def ask(step: int, params: PyTree) -> tuple[Array | HostArray, InUse]:
        batch = examples_at(step)
        # Chosen here, in the loop's thread: a swap must not race with the search.
        in_use = index.current(step, params)
        tower = {"query": params["query"]}
        vectors = search.query_vectors(
            config, tower, batch["query"], batch["query_len"]
        )
        index.probe = vectors = hosts.readable(vectors)
        return vectors, in_use

    def find(step: int, asked: tuple[Array | HostArray, InUse]) -> JsonDict:
        batch, (vectors, in_use) = examples_at(step), asked
        queries = np.asarray(vectors)
        hits = in_use.index.search(queries, _searched(config, settings))
        chosen = candidates.choose(
            hits.ids,
            store,
            rows=batch["row"],
            queries=batch["original"],
            lengths=batch["query_len"],
            wanted=config.candidates - 1,
            copied=settings.copied,
        )
        return {
            "ids": chosen.ids.tolist(),
            "own": chosen.own.tolist(),
            "copies": chosen.copies.tolist(),
            "index_step": in_use.version.step,
        }

    def batch(step: int, found: JsonDict) -> dict[str, HostArray]:
        queries = examples_at(step)
        del made[step]
        rows = len(queries["row"])
        ids = np.asarray(found["ids"], np.int64).reshape(rows, -1)
        notes = {
            "staleness": np.full(rows, step - found["index_step"]),
            "index_step": np.full(rows, found["index_step"]),
            "cut_spans": queries["cut"],
            "own_hits": np.asarray(found["own"]),
            "copies": np.asarray(found["copies"]),
            **{name: queries[name] for name in COUNTS},
        }
        return {
            **{n: queries[n] for n in objective.BATCH_SPEC if n in queries},
            **candidates.assemble(ids, store, config),
            **{name: x.astype(np.float32) for name, x in notes.items()},
        }

    return Live(settings.depth, ask, find, batch, index.carry, index.resume)


def _searched(config: RealmConfig, settings: PretrainConfig) -> int:
    """How many hits are asked for; the null document is no hit."""
    return max(1, config.candidates - 1 + settings.extra)


def _description(
    config: RealmConfig,
    settings: PretrainConfig,
    examples: Examples,
    train: TrainConfig,
    mesh: Mesh,
) -> str:
    shapes = jax.eval_shape(
        lambda: model.init(config, jax.random.key(0), model.PRETRAINING)
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    epochs = train.steps * train.batch_size / len(examples.rows)
    searched = ""
    if settings.placement == "device":
        searched = f" that search with a recall target of {settings.recall_target}"
    return (
        f"REALM with {size / 1e6:.1f}M parameters, {len(examples.rows):,} passages to"
        f" ask from, {len(examples.store):,} to retrieve, {config.candidates}"
        f" candidates, {train.steps} steps = {epochs:.1f} epochs, {mesh.size}"
        f" device{'s' if mesh.size > 1 else ''}{searched}"
    )
