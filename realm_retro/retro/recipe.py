"""How a RETRO, or the plain decoder it is compared with, is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.data import chunk_store, loader
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.nn import losses
from realm_retro.parallel import axes
from realm_retro.parallel import mesh as meshes
from realm_retro.retrieval.neighbours import NeighbourTable
from realm_retro.retro import batches, flops, retrofit
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.model import Retro
from realm_retro.retro.retrofit import InitConfig
from realm_retro.train import checkpoint
from realm_retro.train import state as states
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Recipe, no_batches
from realm_retro.typing import Array, Batch, Config, HostArray, PyTree

BATCH_SPEC = {
    "tokens": ("batch", "length"),
    "targets": ("batch", "length"),
    "loss_mask": ("batch", "length"),
    "segments": ("batch", "length"),
}
NEIGHBOUR_SPEC = {
    "neighbours": ("batch", "chunks", "neighbours", "retrieved"),
    "neighbour_mask": ("batch", "chunks", "neighbours", "retrieved"),
}


def make(config: Config, workdir: epath.PathLike, mesh: Mesh) -> Recipe:
    """The recipe of a config, on the chunks and neighbours of a workdir.

    Args:
      config: sections ``model``, ``train`` and ``init``, and ``seed``.
      workdir: holds ``chunks/`` and, where the model retrieves, ``neighbours/``.
      mesh: the devices that will train.

    Raises:
      UserError: an artefact is missing or does not fit the config.
    """
    model, init = model_config(config), init_config(config)
    train = config_lib.build(TrainConfig, config.train, name="config.train")
    store = open_store(model, workdir)
    table = open_neighbours(model, store, workdir, k=train.neighbours)
    source = batches.WindowSource(
        batches.training_windows(
            store, chunk_store.TRAIN, train.sequence_chunks, config.seed
        ),
        store,
        table,
        train.neighbours,
    )
    rows = loader.batches(source, seed=config.seed, batch_size=train.batch_size)
    # The same order, of the windows' numbers alone.
    order = loader.batches(
        loader.Rows(np.arange(len(source))),
        seed=config.seed,
        batch_size=train.batch_size,
    )

    def examples(step: int) -> dict[str, HostArray]:
        windows = order[step]["row"]
        return {"window": windows, "chunks": source.windows.chunks[windows]}

    window = train.sequence_chunks * model.chunk_length
    parents = [store.fingerprint] + ([table.fingerprint] if table else [])
    epochs = train.steps * train.batch_size / max(1, len(source))
    return dataclasses.replace(
        outline(config, mesh),
        description=(
            f"{'RETRO' if model.retrieves else 'plain decoder'} with"
            f" {_sizes(model, init)}, {len(source)} windows of"
            f" {window} tokens, {train.steps} steps = {epochs:.1f} epochs,"
            f" {mesh.size} device{'s' if mesh.size > 1 else ''}"
        ),
        batch_at=rows.__getitem__,
        fingerprint=artifacts.fingerprint_of(parents),
        examples=examples,
        weights=((lambda: start_params(config, workdir, mesh)) if init.run else None),
    )


def outline(config: Config, mesh: Mesh) -> Recipe:
    """The recipe without data: all that a train step is compiled from."""
    model, init = model_config(config), init_config(config)
    train = config_lib.build(TrainConfig, config.train, name="config.train")
    window = train.sequence_chunks * model.chunk_length
    tokens = train.batch_size * window
    return Recipe(
        description="RETRO" if model.retrieves else "plain decoder",
        init=init_fn(model),
        loss=loss_fn(model, mesh),
        batch_at=no_batches,
        batch_spec=batch_spec(model),
        tokens_per_step=tokens,
        flops_per_step=flops.training_flops(
            model,
            tokens=tokens,
            window=window,
            k=train.neighbours,
            frozen=init.frozen,
        ),
        fingerprint="",
        trainable=retrofit.trainable if init.frozen else None,
    )


def abstract_batch(
    model: RetroConfig, train: TrainConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the global batch, as `batches.WindowSource` makes it."""
    rows, chunks, m = train.batch_size, train.sequence_chunks, model.chunk_length
    kinds = {"tokens": "int32", "targets": "int32", "loss_mask": "bool"}
    kinds["segments"] = "int32"
    shapes = {name: ((rows, chunks * m), kind) for name, kind in kinds.items()}
    if model.retrieves:
        near = (rows, chunks, train.neighbours, model.neighbour_length)
        shapes |= {"neighbours": (near, "int32"), "neighbour_mask": (near, "bool")}
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
        for name, (shape, kind) in shapes.items()
    }


def model_config(config: Config) -> RetroConfig:
    """The model's shape from a config's section ``model``."""
    return config_lib.build(RetroConfig, config.model, name="config.model")


def init_config(config: Config) -> InitConfig:
    """Where the weights come from, section ``init``.

    Raises:
      UserError: it does not fit the model.
    """
    section = config_lib.section(config, "init")
    init = config_lib.build(InitConfig, section, name="config.init")
    retrofit.check(init, model_config(config))
    return init


def start_params(config: Config, workdir: epath.PathLike, mesh: Mesh) -> PyTree:
    """A decoder's weights of ``config.init.run`` and new ones for all else, on `mesh`.

    Raises:
      UserError: there is no such run, or its decoder has other sizes.
    """
    model, name = model_config(config), init_config(config).run
    run_dir = epath.Path(workdir) / "runs" / name
    try:
        decoder, _ = checkpoint.restore_params(
            run_dir, init_fn(retrofit.plain(model)), mesh
        )
    except UserError as error:
        raise UserError(
            f"config.init.run={name!r} must be a trained plain decoder (the same"
            f" --config with :plain) of these sizes: {error}"
        ) from None
    new = init_fn(model)
    key = states.key_for(config.seed, states.INIT)
    # Cut and put together on the devices: none of them holds all of it.
    extend = jax.jit(
        lambda decoder: retrofit.extend(model, decoder, axes.unbox(new(key))),
        out_shardings=states.shardings_of(states.abstract_params(new, mesh)),
    )
    return extend(decoder)


def without_retrieval(
    model: RetroConfig, params: PyTree, mesh: Mesh
) -> tuple[RetroConfig, PyTree]:
    """RETRO[OFF] as the plain decoder that it is: the model's shape, weights on `mesh`.

    With a frozen decoder it gives what that gave, bit for bit; see `retrofit`.
    """
    if not model.retrieves:
        return model, params
    plain = retrofit.plain(model)
    abstract = states.abstract_params(init_fn(plain), mesh)
    cut = jax.jit(
        lambda params: retrofit.decoder_of(model, params),
        out_shardings=states.shardings_of(abstract),
    )
    return plain, cut(params)


def open_store(model: RetroConfig, workdir: epath.PathLike) -> ChunkStore:
    """The chunks of a workdir.

    Raises:
      UserError: its chunks or its vocabulary do not fit the model.
    """
    store = ChunkStore.open(epath.Path(workdir) / "chunks")
    if store.chunk_length != model.chunk_length:
        raise UserError(
            f"{workdir}/chunks: chunks of {store.chunk_length} tokens do not fit"
            f" config.model.chunk_length={model.chunk_length}; make them equal"
        )
    if store.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{workdir}/chunks: a vocabulary of {store.tokenizer.vocab_size} does not"
            f" fit config.model.vocab_size={model.vocab_size}; raise it"
        )
    return store


def open_neighbours(
    model: RetroConfig, store: ChunkStore, workdir: epath.PathLike, *, k: int
) -> NeighbourTable | None:
    """The neighbours of a workdir's chunks; None for a plain decoder.

    Raises:
      UserError: they are of other chunks, or fewer than `k`.
    """
    if not model.retrieves:
        return None
    table = NeighbourTable.open(
        epath.Path(workdir) / "neighbours", parents={"chunks": store.fingerprint}
    )
    if k > table.ids.shape[1]:
        raise UserError(
            f"{workdir}/neighbours: holds {table.ids.shape[1]} neighbours of each"
            f" chunk, {k} are asked for; ask for fewer or raise config.neighbours.k,"
            " delete the folder and run: python -m realm_retro.cli.find_neighbours"
        )
    return table


def init_fn(model: RetroConfig) -> Callable[[Array], PyTree]:
    """Key → boxed parameters."""

    def init(key: Array) -> PyTree:
        n = model.chunk_length
        tokens = jnp.zeros((1, n), jnp.int32)
        if not model.retrieves:
            return Retro(model).init(key, tokens)
        neighbours = jnp.zeros((1, 1, 1, model.neighbour_length), jnp.int32)
        mask = jnp.ones(neighbours.shape, bool)
        return Retro(model).init(key, tokens, None, neighbours, mask)

    return init


def loss_fn(model: RetroConfig, mesh: Mesh):
    """(parameters, batch, key) → summed loss in nats, tokens, no further metrics."""

    def loss(params: PyTree, batch: Batch, key: Array):
        del key  # nothing is random: the paper trains without dropout
        with meshes.active(mesh):
            logits = apply(model, params, batch)
        total, weight = losses.cross_entropy(
            logits, batch["targets"], batch["loss_mask"]
        )
        return total, weight, {}

    return loss


def apply(model: RetroConfig, params: PyTree, batch: Batch) -> Array:
    """Logits of a batch of windows; RETRO[OFF] where it holds no neighbours."""
    return Retro(model).apply(
        params,
        batch["tokens"],
        batch["segments"],
        batch.get("neighbours"),
        batch.get("neighbour_mask"),
    )  # pyright: ignore[reportReturnType]


def batch_spec(model: RetroConfig) -> Mapping[str, axes.Names]:
    """Logical axes of each array of a batch."""
    return {**BATCH_SPEC, **(NEIGHBOUR_SPEC if model.retrieves else {})}


def abstract_params(config: Config) -> PyTree:
    """Shapes of a config's boxed parameters; nothing is computed."""
    return jax.eval_shape(init_fn(model_config(config)), jax.random.key(0))


def count_params(model: RetroConfig) -> int:
    """All parameters, embeddings included."""
    shapes = jax.eval_shape(init_fn(model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _sizes(model: RetroConfig, init: InitConfig) -> str:
    total = f"{count_params(model) / 1e6:.1f}M parameters"
    if not init.frozen:
        return total
    trained = count_params(model) - count_params(retrofit.plain(model))
    return f"{total}, of which {trained / 1e6:.1f}M are trained"
