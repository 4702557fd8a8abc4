"""Shapes and dtypes of REALM's batches, without any data: for plans.

The arrays are those of `pretrain`, `finetune` and `ict_recipe`; a test compares them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from realm_retro.realm import device_search, finetune, pretrain
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.realm.question_sets import QaConfig

Shapes = dict[str, jax.ShapeDtypeStruct]


def pretrain_batch(
    config: RealmConfig,
    settings: PretrainConfig,
    batch_size: int,
    *,
    size: int,
    mesh: Mesh | AbstractMesh,
) -> Shapes:
    """A batch of pre-training.

    Args:
      config: the model's.
      settings: where is searched.
      batch_size: examples.
      size: how many passages there are.
      mesh: where the index and the passages lie that the device search has besides;
        they alone have a sharding.
    """
    b, k, j = batch_size, config.candidates, config.max_masks
    found = {
        "query": ((b, config.query_length), "int32"),
        "query_len": ((b,), "int32"),
        "mask_positions": ((b, j), "int32"),
        "targets": ((b, j), "int32"),
        "target_mask": ((b, j), "bool"),
    }
    if settings.placement == "device":
        found |= {
            "original": ((b, config.query_length), "int32"),
            "own_document": ((b,), "int32"),
        }
        names = device_search.BATCH_SPEC
        tables = device_search.abstract_tables(config, settings, size, mesh)
    else:
        found |= {**_passages(config, (b, k)), "valid": ((b, k), "bool")}
        names, tables = pretrain.BATCH_SPEC, {}
    notes = {name: ((b,), "float32") for name in names if name not in found}
    return {**_abstract({**found, **notes}), **tables}


def finetune_batch(config: RealmConfig, settings: QaConfig, batch_size: int) -> Shapes:
    """A batch of questions, where there are enough passages for the beam."""
    b, beam, k = batch_size, settings.beam, settings.read
    passages = _passages(config, (b, k))
    found = {
        "query": ((b, config.query_length), "int32"),
        "query_len": ((b,), "int32"),
        "beam_vectors": ((b, beam, config.vector_dim), "float32"),
        "beam_valid": ((b, beam), "bool"),
        "beam_has": ((b, beam), "bool"),
        "slots": ((b, k), "int32"),
        "correct": ((b, k, config.body_length, config.span_width), "bool"),
        **{n: ((b,), "float32") for n in ("unreachable", "gold_named", "gold_read")},
    }
    names = finetune.batch_spec(settings)
    return _abstract(
        {name: {**passages, **found}[name] for name in names},
    )


def ict_batch(config: RealmConfig, batch_size: int) -> Shapes:
    """A batch of the inverse cloze task."""
    b = batch_size
    return _abstract(
        {
            "query": ((b, config.query_length), "int32"),
            "query_len": ((b,), "int32"),
            **_passages(config, (b,)),
            "passage": ((b,), "int32"),
            "removed": ((b,), "bool"),
            "truncated": ((b,), "float32"),
        }
    )


def _passages(config: RealmConfig, rows: tuple[int, ...]):
    return {
        "title": ((*rows, config.title_length), "int32"),
        "title_len": (rows, "int32"),
        "body": ((*rows, config.body_length), "int32"),
        "body_len": (rows, "int32"),
    }


def _abstract(shapes) -> Shapes:
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
        for name, (shape, kind) in shapes.items()
    }
