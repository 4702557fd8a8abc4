"""Which published tensor lies where in our parameters: one table for both directions.

Our layers are stacked on a first axis and queries, keys and values lie in one weight,
so that a published tensor fills a slot of a leaf of ours: ``leaf[index]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from realm_retro.arrays import flatten, unflatten
from realm_retro.nn.bert import BertConfig
from realm_retro.typing import HostArray, Params

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one published tensor lies.

    Attributes:
      theirs: its published name.
      ours: the leaf, e.g. ``bert/layers/up/kernel``.
      index: the slot in the leaf.
      inputs: leading axes of the slot that a matrix contracts. Theirs is
        [outputs, inputs], both flat; ours [*inputs, *outputs]. 0: no matrix.
    """

    theirs: str
    ours: str
    index: tuple[int | slice, ...] = ()
    inputs: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """The leaves of a module, and a place for each published tensor of it.

    Attributes:
      leaves: path → shape.
      places: together they fill every leaf once.
    """

    leaves: Mapping[str, Shape]
    places: tuple[Place, ...]

    def under(self, theirs: str, ours: str) -> Table:
        """The same with prefixes before all names."""
        return Table(
            {f"{ours}{path}": shape for path, shape in self.leaves.items()},
            tuple(
                dataclasses.replace(
                    place, theirs=f"{theirs}{place.theirs}", ours=f"{ours}{place.ours}"
                )
                for place in self.places
            ),
        )

    def shape(self, place: Place) -> Shape:
        """The shape of a published tensor."""
        slot = np.broadcast_to(np.float32(0), self.leaves[place.ours])[place.index]
        if place.inputs:
            inputs, outputs = slot.shape[: place.inputs], slot.shape[place.inputs :]
            return math.prod(outputs), math.prod(inputs)
        # The bias of a projection to several axes is flat in a checkpoint.
        return (slot.size,) if place.theirs.endswith(".bias") else slot.shape


def read(table: Table, take: Callable[[str, Shape], HostArray]) -> dict[str, Any]:
    """Builds our parameters.

    Args:
      table: of the module.
      take: (published name, shape that it must have) → the tensor.

    Returns:
      The tree of the module's parameters, float32.
    """
    flat: dict[str, HostArray] = {}
    for place in table.places:
        value = take(place.theirs, table.shape(place))
        # Not before: no file stands for the sizes until a tensor has them.
        if place.ours not in flat:
            flat[place.ours] = np.empty(table.leaves[place.ours], np.float32)
        slot = flat[place.ours][place.index]
        flat[place.ours][place.index] = (value.T if place.inputs else value).reshape(
            slot.shape
        )
    return unflatten(flat)


def write(table: Table, params: Params) -> dict[str, HostArray]:
    """Published tensors of our parameters; undoes `read`."""
    flat = flatten(params)
    tensors = {}
    for place in table.places:
        slot = np.asarray(flat[place.ours], np.float32)[place.index]
        shape = table.shape(place)
        value = slot.reshape(shape[::-1]).T if place.inputs else slot.reshape(shape)
        tensors[place.theirs] = np.ascontiguousarray(value)
    return tensors


def bert(config: BertConfig) -> Table:
    """`realm_retro.nn.bert.Bert`."""
    width = config.width
    layers = [
        _layer(config).under(f"encoder.layer.{i}.", "")
        for i in range(config.num_layers)
    ]
    return join(
        _table(
            "embeddings.word_embeddings.weight",
            "embeddings/tokens",
            (config.vocab_size, width),
        ),
        _table(
            "embeddings.position_embeddings.weight",
            "embeddings/positions",
            (config.max_positions, width),
        ),
        _table(
            "embeddings.token_type_embeddings.weight",
            "embeddings/segments",
            (config.num_token_types, width),
        ),
        _norm("embeddings.LayerNorm", "embeddings/norm", width),
        _stacked(layers).under("", "layers/"),
    )


def masked_lm_head(config: BertConfig) -> Table:
    """`realm_retro.realm.model.MaskedLmHead`, below ``cls.predictions.``."""
    width = config.width
    return join(
        _linear("transform.dense", "dense", (width,), (width,)),
        _norm("transform.LayerNorm", "norm", width),
        _table("bias", "bias", (config.vocab_size,)),
    )


def tower(config: BertConfig, dim: int) -> Table:
    """`realm_retro.realm.model.Embedder`, from a RealmEmbedder."""
    width = config.width
    return join(
        bert(config).under("realm.", "bert/"),
        _linear("realm.pooler.dense", "pooler", (width,), (width,)),
        _linear("cls.dense", "projection", (width,), (dim,)),
        _norm("cls.LayerNorm", "projection_norm", dim),
    )


def knowledge_encoder(config: BertConfig) -> Table:
    """`realm_retro.realm.model.KnowledgeEncoder`, from a RealmKnowledgeAugEncoder."""
    return join(
        bert(config).under("realm.", "bert/"),
        masked_lm_head(config).under("cls.predictions.", "head/"),
    )


def span_reader(config: BertConfig, hidden: int) -> Table:
    """`realm_retro.realm.model.SpanReader`, from a RealmReader."""
    outputs = "qa_outputs."
    return join(
        bert(config).under("realm.", "bert/"),
        # Their first half scores a span's first token, the second its last.
        _linear(
            f"{outputs}dense_intermediate", "span_ends", (config.width,), (2, hidden)
        ),
        _norm(f"{outputs}layer_normalization", "span_norm", hidden),
        _linear(f"{outputs}dense_output", "span_score", (hidden,), (1,)),
    )


def join(*tables: Table) -> Table:
    """All of several tables."""
    leaves = {path: shape for table in tables for path, shape in table.leaves.items()}
    return Table(leaves, tuple(place for table in tables for place in table.places))


def _layer(config: BertConfig) -> Table:
    width, hidden = config.width, config.hidden
    heads = (config.num_heads, width // config.num_heads)
    qkv = [
        place
        for number, name in enumerate(("query", "key", "value"))
        for place in (
            Place(f"{name}.weight", "qkv/kernel", (slice(None), number), inputs=1),
            Place(f"{name}.bias", "qkv/bias", (number,)),
        )
    ]
    leaves = {"qkv/kernel": (width, 3, *heads), "qkv/bias": (3, *heads)}
    return join(
        Table(leaves, tuple(qkv)).under("attention.self.", "attention/"),
        _linear("attention.output.dense", "attention/output", heads, (width,)),
        _norm("attention.output.LayerNorm", "attention_norm", width),
        _linear("intermediate.dense", "up", (width,), (hidden,)),
        _linear("output.dense", "down", (hidden,), (width,)),
        _norm("output.LayerNorm", "output_norm", width),
    )


def _stacked(layers: Sequence[Table]) -> Table:
    leaves = {path: (len(layers), *shape) for path, shape in layers[0].leaves.items()}
    places = (
        dataclasses.replace(place, index=(number, *place.index))
        for number, layer in enumerate(layers)
        for place in layer.places
    )
    return Table(leaves, tuple(places))


def _linear(theirs: str, ours: str, inputs: Shape, outputs: Shape) -> Table:
    return Table(
        {f"{ours}/kernel": inputs + outputs, f"{ours}/bias": outputs},
        (
            Place(f"{theirs}.weight", f"{ours}/kernel", inputs=len(inputs)),
            Place(f"{theirs}.bias", f"{ours}/bias"),
        ),
    )


def _norm(theirs: str, ours: str, width: int) -> Table:
    return join(
        _table(f"{theirs}.weight", f"{ours}/scale", (width,)),
        _table(f"{theirs}.bias", f"{ours}/bias", (width,)),
    )


def _table(theirs: str, ours: str, shape: Shape) -> Table:
    return Table({ours: shape}, (Place(theirs, ours),))
