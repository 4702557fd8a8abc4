"""The parts of a REALM: two towers, the knowledge-augmented encoder, the reader.

Parameters are a dict of parts, so that each stage holds only what it needs:

    query      the query tower; with tied towers the document tower too
    document   the document tower; absent with tied towers
    encoder    p(y | z, x) of pre-training
    reader     answer spans of fine-tuning, see `realm_retro.realm.reader`

`PRETRAINING`, `FINETUNING` and `TOWERS` name the parts of each stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.errors import UserError
from realm_retro.nn.bert import Bert
from realm_retro.nn.layers import LayerNorm, Projection, parameter
from realm_retro.parallel import axes
from realm_retro.realm import packing
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.reader import SpanReader
from realm_retro.retrieval.embed import mean_pool
from realm_retro.typing import Array, Bool, Float, Int, Params, PyTree

TOWERS = ("query", "document")
PRETRAINING = (*TOWERS, "encoder")
FINETUNING = (*TOWERS, "reader")

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Embedder(nn.Module):
    """A tower: tokens to one retrieval vector, Embed(·) of section 3.2."""

    config: RealmConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch d"]:
        """Embeds a batch.

        Args:
          ids: token ids with their special ones; any at padding.
          mask: True on real tokens.
          token_types: segments; all 0 where it is None.
          train: whether the config's dropout is on, with the random stream
            ``dropout``.

        Returns:
          float32 vectors.
        """
        config = self.config
        hidden = Bert(config.bert, name="bert")(ids, mask, token_types)
        if config.pooling == "mean":
            x = mean_pool(hidden, mask)
        else:
            x = hidden[:, 0].astype(jnp.float32)
        # From here on float32: it is a small part of the work and decides the ranking.
        if config.pooler:
            pooler = Projection(
                (config.width,), ("embed", None), bias=True, name="pooler"
            )
            x = jnp.tanh(pooler(x))
        if config.embed_dim:
            shape = (config.embed_dim,)
            x = Projection(shape, ("embed", None), bias=True, name="projection")(x)
            if config.projection_norm:
                x = LayerNorm(epsilon=config.epsilon, name="projection_norm")(x)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        if config.normalise:
            norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.maximum(norm, 1e-24))
        return axes.constrain(x, ("batch", "embed_act"))


class KnowledgeEncoder(nn.Module):
    """p(y_j | z, x) from ``[CLS] x [SEP] body [SEP]``, section 3.2."""

    config: RealmConfig

    def setup(self):
        """A BERT and the head of its masked language model."""
        self.bert = Bert(self.config.bert)
        self.head = MaskedLmHead(self.config)

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
        positions: Int[Array, "batch targets"],
    ) -> Float[Array, "batch targets vocab"]:
        """Logits of each masked token.

        Args:
          ids: joint inputs; any at padding.
          mask: True on real tokens.
          token_types: segments; all 0 where it is None.
          positions: where the targets stand in `ids`, [CLS] counted; any legal place
            for a target that is not there.

        Returns:
          float32 logits.
        """
        hidden = self.bert(ids, mask, token_types)
        # The product with the vocabulary is the widest of all: masked tokens only.
        masked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        tables = nn.meta.unbox(self.bert.variables["params"]["embeddings"])
        return self.head(masked, tables["tokens"])


class MaskedLmHead(nn.Module):
    """BERT's: a layer, a norm, and the word embeddings as output weights."""

    config: RealmConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch targets width"],
        table: Float[Array, "vocab width"],
    ) -> Float[Array, "batch targets vocab"]:
        """float32 logits of hidden states; `table` is the token embedding."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        dense = Projection(
            (config.width,), ("embed", None), dtype, bias=True, name="dense"
        )
        x = _ACTIVATIONS[config.activation](dense(x))
        x = LayerNorm(dtype, config.epsilon, name="norm")(x)
        logits = jnp.einsum(
            "bjd,vd->bjv",
            x,
            table.astype(dtype),
            preferred_element_type=jnp.float32,
        )
        zeros = nn.initializers.zeros
        bias = parameter(self, "bias", zeros, ("vocab",), (config.vocab_size,))
        return axes.constrain(logits + bias[None, None], ("batch", None, "vocab"))


def embed_queries(
    config: RealmConfig,
    params: Params,
    ids: Int[Array, "*axes length"],
    mask: Bool[Array, "*axes length"],
    key: Array | None = None,
) -> Float[Array, "*axes d"]:
    """Vectors of `packing.query_inputs`.

    Args:
      config: the model's.
      params: a tree with the part ``query``.
      ids: token ids.
      mask: True on real tokens.
      key: for dropout while training; None to search.
    """
    return _embed(config, params["query"], ids, mask, None, key)


def embed_documents(
    config: RealmConfig,
    params: Params,
    ids: Int[Array, "*axes length"],
    mask: Bool[Array, "*axes length"],
    key: Array | None = None,
) -> Float[Array, "*axes d"]:
    """Vectors of `packing.document_inputs`.

    Args:
      config: the model's.
      params: a tree with the part ``document``, or ``query`` where towers are tied.
      ids: token ids.
      mask: True on real tokens.
      key: for dropout while training; None to build an index.
    """
    tower = params["query" if config.tied else "document"]
    types = packing.second_segment(ids) if config.document_types else None
    return _embed(config, tower, ids, mask, types, key)


def init(
    config: RealmConfig, key: Array, parts: Sequence[str] = PRETRAINING
) -> dict[str, PyTree]:
    """Random parameters, boxed with their axis names.

    Args:
      config: the model's.
      key: random key; a part's weights depend on it and on the part alone.
      parts: which, e.g. `FINETUNING`; with tied towers ``document`` is left out.
    """
    ids = jnp.zeros((1, 2), jnp.int32)
    mask = jnp.ones((1, 2), bool)
    modules: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "query": (Embedder(config), (ids, mask)),
        "document": (Embedder(config), (ids, mask)),
        "encoder": (KnowledgeEncoder(config), (ids, mask, ids, ids[:, :1])),
        "reader": (SpanReader(config), (ids, mask, ids)),
    }
    made = {}
    for number, (name, (module, inputs)) in enumerate(modules.items()):
        if name in parts and not (name == "document" and config.tied):
            made[name] = module.init(jax.random.fold_in(key, number), *inputs)["params"]
    return made


def init_reader(config: RealmConfig, key: Array) -> PyTree:
    """Random boxed parameters of the part ``reader``."""
    return init(config, key, ("reader",))["reader"]


def from_bert(
    config: RealmConfig,
    bert_params: Params,
    key: Array,
    parts: Sequence[str] = PRETRAINING,
    head: Params | None = None,
) -> dict[str, PyTree]:
    """Boxed parameters in which every BERT has published weights.

    The query and document towers start equal, projection included: texts that the BERT
    puts near each other are near from the first step. What a BERT does not have (the
    projection, the span scorer, the masked-LM head without `head`) is random.

    Call it outside `jax.jit`, which would write the weights into the program.

    Args:
      config: the model's.
      bert_params: of `realm_retro.nn.bert.Bert`, e.g. from
        `realm_retro.interop.bert.load_safetensors`.
      key: random key of the rest.
      parts: see `init`.
      head: of `MaskedLmHead`, where the checkpoint has one.

    Raises:
      UserError: a weight is of another shape than the config says, or missing.
    """
    shapes = jax.eval_shape(lambda: init(config, key, parts))
    # First what can fail.
    started = {
        name: {"bert": _filled(part["bert"], bert_params, f"{name}/bert")}
        for name, part in shapes.items()
    }
    rest = jax.jit(lambda: _without_bert(init(config, key, parts)))()
    if "query" in rest and "document" in rest:
        rest["document"] = jax.tree.map(jnp.copy, rest["query"])
    if head is not None and "encoder" in rest:
        rest["encoder"] = {"head": _filled(shapes["encoder"]["head"], head, "head")}
    return {name: {**started[name], **rest[name]} for name in started}


def _without_bert(params: PyTree) -> dict[str, PyTree]:
    return {
        name: {key: leaf for key, leaf in part.items() if key != "bert"}
        for name, part in params.items()
    }


def _filled(boxed: PyTree, values: PyTree, name: str) -> PyTree:
    """`boxed` with the values of another tree; only leaves of its own shape fit."""
    paths, tree = jax.tree_util.tree_flatten_with_path(
        boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    given = dict(jax.tree_util.tree_flatten_with_path(values)[0])
    filled = []
    for path, box in paths:
        where = f"{name}{jax.tree_util.keystr(path)}"
        value = given.pop(path, None)
        if value is None:
            raise UserError(f"{where}: the checkpoint has no such weight")
        if np.shape(value) != box.value.shape:
            raise UserError(
                f"{where}: has shape {np.shape(value)} in the checkpoint, but"
                f" config.model asks for {box.value.shape}; make config.model fit it"
            )
        # A copy for each part: a train step donates every buffer once.
        filled.append(box.replace_boxed(jnp.array(value, jnp.float32)))
    if given:
        left = jax.tree_util.keystr(next(iter(given)))
        raise UserError(f"{name}: the checkpoint has weights without a place: {left}")
    return jax.tree.unflatten(tree, filled)


def _embed(
    config: RealmConfig,
    tower: Params,
    ids: Array,
    mask: Array,
    types: Array | None,
    key: Array | None,
) -> Array:
    flat = ids.reshape(-1, ids.shape[-1])
    vectors = Embedder(config).apply(
        {"params": tower},
        flat,
        mask.reshape(flat.shape),
        None if types is None else types.reshape(flat.shape),
        train=key is not None,
        rngs=None if key is None else {"dropout": key},
    )
    return cast(Array, vectors).reshape(*ids.shape[:-1], config.vector_dim)
