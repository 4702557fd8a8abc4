"""How the inverse cloze task is trained; its formula is in `realm_retro.realm.ict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from realm_retro.data import chunk_store, loader
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.parallel import mesh as meshes
from realm_retro.realm import ict, model
from realm_retro.realm.config import RealmConfig
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Recipe, no_batches
from realm_retro.typing import Array, Batch, HostArray, PyTree


@dataclasses.dataclass(frozen=True)
class IctConfig:
    """The warm start (section ``ict``).

    Attributes:
      mask_rate: how often the sentence is taken out of its passage.
    """

    mask_rate: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.mask_rate <= 1:
            raise UserError(
                f"config.ict.mask_rate={self.mask_rate} is a probability from 0 to 1"
            )


def make(
    config: RealmConfig,
    settings: IctConfig,
    train: TrainConfig,
    *,
    store: PassageStore,
    seed: int,
    mesh: Mesh,
    weights: Callable[[], PyTree] | None,
) -> Recipe:
    """The recipe of the warm start; arguments as in `pretrain.make`.

    Raises:
      UserError: a batch of one example, which has nothing to be told from.
    """
    if train.batch_size < 2:
        raise UserError(
            f"config.train.batch_size={train.batch_size}: the inverse cloze task tells"
            " a passage from the others of its batch; use 2 or more"
        )
    rows = store.passages_of(chunk_store.TRAIN)
    source = loader.Rows(rows)
    order = loader.batches(source, seed=seed, batch_size=train.batch_size)

    def batch_at(step: int) -> dict[str, HostArray]:
        chosen = order[step]["row"]
        made = ict.ict_examples(
            store.body[chosen],
            store.lengths[chosen],
            [store.sentences(int(row)) for row in chosen],
            np.random.default_rng((seed, step)),
            query_length=config.query_length,
            mask_rate=settings.mask_rate,
        )
        title, title_length = store.title_tokens(chosen)
        body = np.zeros((len(chosen), config.body_length), np.int32)
        body[:, : made.body.shape[1]] = made.body
        wide = np.zeros((len(chosen), config.title_length), np.int32)
        wide[:, : title.shape[1]] = title
        return {
            "query": made.query,
            "query_len": made.query_len,
            "title": wide,
            "title_len": title_length.astype(np.int32),
            "body": body,
            "body_len": made.body_len,
            "passage": np.where(made.usable, chosen, -1).astype(np.int32),
            "removed": made.removed,
            "truncated": made.truncated.astype(np.float32),
        }

    return dataclasses.replace(
        outline(config, train, mesh),
        description=(
            f"inverse cloze task on {len(rows):,} passages, {train.batch_size} at a"
            f" time, {train.steps} steps ="
            f" {train.steps * train.batch_size / max(1, len(rows)):.1f} epochs"
        ),
        batch_at=batch_at,
        fingerprint=store.fingerprint,
        weights=weights,
        examples=lambda step: {"passage": order[step]["row"]},
    )


def outline(config: RealmConfig, train: TrainConfig, mesh: Mesh) -> Recipe:
    """The recipe without data: all that a train step is compiled from."""

    def loss(params: PyTree, batch: Batch, key: Array):
        with meshes.active(mesh):
            total, weight, metrics = ict.ict_loss(
                config, params, batch, key if config.dropout else None
            )
        cut = batch["truncated"]
        return total, weight, {**metrics, "cut_tokens": (cut.sum(), weight)}

    tokens = config.query_tokens + config.document_tokens
    layer = 4 * config.width**2 + 2 * config.width * config.hidden
    return Recipe(
        description="inverse cloze task",
        init=lambda key: model.init(config, key, model.TOWERS),
        loss=loss,
        batch_at=no_batches,
        batch_spec={**ict.BATCH_SPEC, "truncated": ("batch",)},
        tokens_per_step=train.batch_size * tokens,
        flops_per_step=6.0 * train.batch_size * tokens * config.num_layers * layer,
        fingerprint="",
    )
