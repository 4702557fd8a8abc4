"""Published REALM and BERT checkpoints (Hugging Face names) into our parameters.

    RealmEmbedder              part query; alone it is a tied tower
    RealmScorer                parts query and document; query alone where they are tied
    RealmKnowledgeAugEncoder   part encoder
    RealmReader                part reader
    RealmForOpenQA             parts query and reader, and the vectors of its blocks
    BertModel, BertForMaskedLM part bert, and head where there is one

Every tensor finds its place, or is one that the published model itself never reads
(`Published.unused`), or the error names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from realm_retro import disk
from realm_retro.arrays import ShardedArray, flatten
from realm_retro.errors import UserError
from realm_retro.interop import bert as bert_lib
from realm_retro.interop import name_table
from realm_retro.interop.tensors import Tensors
from realm_retro.nn.bert import BertConfig
from realm_retro.typing import HostArray, JsonDict, Params

BLOCKS = "block_emb"
HEAD = "cls.predictions."

# Fields of `BertConfig` that `RealmConfig` has too.
BERT_FIELDS = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "hidden",
    "max_positions",
    "activation",
    "epsilon",
)
# Their name of a size → ours, and its default.
SIZES = {
    "retriever_proj_size": ("embed_dim", 128),
    "max_span_width": ("span_width", 10),
    "span_hidden_size": ("span_hidden", 256),
}
# The released model: tanh pooler, projection and norm; title and body in segments.
CHOICES = {
    "pooling": "cls",
    "pooler": True,
    "projection_norm": True,
    "document_types": True,
}
# Of the norm in the span scorer; ours is fixed to the same.
READER_EPSILON = 1e-3

# In an embedder and a reader the masked-LM head is not read, in an encoder and a reader
# the pooler is not.
_UNUSED = (
    *(f"realm.{name}" for name in (*bert_lib.UNNEEDED, "embeddings.token_type_ids")),
    f"{HEAD}bias",
    f"{HEAD}decoder.weight",
    f"{HEAD}decoder.bias",
    f"{HEAD}transform.dense.weight",
    f"{HEAD}transform.dense.bias",
    f"{HEAD}transform.LayerNorm.weight",
    f"{HEAD}transform.LayerNorm.bias",
)
_NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")


@dataclasses.dataclass(frozen=True)
class Published:
    """A checkpoint in our names.

    Attributes:
      model: the fields of `realm_retro.realm.config.RealmConfig` that the checkpoint
        fixes. Lengths of queries, titles and bodies are free, within max_positions.
      parts: part → parameters, float32, as the module docstring lists them.
      vectors: float32 [blocks, d] of RealmForOpenQA, on disk; None elsewhere.
      unused: tensors that are there and that the published model never reads.
    """

    model: JsonDict
    parts: Mapping[str, Params]
    vectors: HostArray | ShardedArray | None = None
    unused: tuple[str, ...] = ()


def load(path: epath.PathLike) -> Published:
    """Reads a checkpoint of any kind that the module docstring names.

    Args:
      path: a folder with config.json and weights (see `Tensors.open`).

    Raises:
      UserError: a file is missing or damaged; a tensor is missing, of another shape
        than the config says, or has no place.
    """
    folder = epath.Path(path).expanduser()
    config = folder / bert_lib.CONFIG
    if not disk.there(config):
        raise UserError(
            f"{folder}: is not the folder of a checkpoint: it has no {config.name}"
        )
    tensors = Tensors.open(folder)
    published = take(tensors, config)
    tensors.refuse_leftovers()
    return published


def take(tensors: Tensors, config: epath.Path) -> Published:
    """Takes the tensors of a checkpoint; of which kind it is, their names tell.

    Args:
      tensors: of the checkpoint; what has no place is left in it.
      config: its config.json.

    Raises:
      UserError: as `load`, leftovers excepted.
    """
    names, shape = tensors.names(), bert_lib.read_config(config)
    if shape.num_token_types != 2:
        raise UserError(
            f"{config}: type_vocab_size={shape.num_token_types} is not supported, only"
            " 2"
        )
    model = {name: getattr(shape, name) for name in BERT_FIELDS}

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if not (has("realm.") or has("embedder.") or has("reader.")):
        return _bert(tensors, shape, model, prefix="bert." if has("bert.") else "")
    model |= {**_sizes(config), **CHOICES}
    if has("reader."):
        return _open_qa(tensors, shape, model)
    if has("embedder."):
        return _scorer(tensors, shape, model, twice=has("query_embedder."))
    if has("qa_outputs."):
        parts = {"reader": _reader(tensors, shape, model, "")}
    elif has("cls.dense."):
        parts = {"query": _tower(tensors, shape, model, "")}
    else:
        table = name_table.knowledge_encoder(shape)
        parts = {"encoder": name_table.read(table, tensors.under(""))}
        _check_ties(tensors, parts["encoder"])
    model["tied"] = "query" in parts
    return Published(model, parts, None, _unused(tensors, ""))


def merge(found: Sequence[tuple[epath.PathLike, Published]]) -> Published:
    """Several checkpoints as one model.

    A tied tower beside another query tower becomes the document tower: the published
    pre-trained embedder beside the fine-tuned RealmForOpenQA.

    Args:
      found: (where it came from, the checkpoint); REALM or BERT, not both.

    Raises:
      UserError: their shapes differ, or two have the same part.
    """
    (first, merged), *rest = found
    origin: dict[str, epath.PathLike] = dict.fromkeys(merged.parts, first)
    for place, other in rest:
        for name in (merged.model.keys() | other.model.keys()) - {"tied"}:
            here, there = merged.model.get(name), other.model.get(name)
            if here != there:
                raise UserError(
                    f"{place}: has {name}={there}, but {first} has {here}; one model"
                    " needs one shape"
                )
        mine, its = dict(merged.parts), dict(other.parts)
        if "query" in mine and "query" in its and "document" not in mine | its:
            # Of two tied towers nobody can say which is which: they clash below.
            if merged.model["tied"] and not other.model["tied"]:
                mine["document"] = mine.pop("query")
                origin["document"] = origin.pop("query")
            elif other.model["tied"] and not merged.model["tied"]:
                its["document"] = its.pop("query")
        for part in mine.keys() & its.keys():
            raise UserError(
                f"{place}: has the part {part!r}, which {origin[part]} has too; convert"
                " them to two folders"
            )
        origin |= dict.fromkeys(its, place)
        tied = any(one.model.get("tied", False) for one in (merged, other))
        parts = {**mine, **its}
        merged = Published(
            {**merged.model, "tied": tied and "document" not in parts},
            parts,
            other.vectors if merged.vectors is None else merged.vectors,
            (*merged.unused, *other.unused),
        )
    return merged


def _sizes(config: epath.Path) -> JsonDict:
    found: JsonDict = json.loads(config.read_text())
    epsilon = found.get("reader_layer_norm_eps", READER_EPSILON)
    if epsilon != READER_EPSILON:
        raise UserError(
            f"{config}: reader_layer_norm_eps={epsilon} is not supported, only"
            f" {READER_EPSILON}"
        )
    try:
        return {
            ours: bert_lib.size(theirs, found.get(theirs, default))
            for theirs, (ours, default) in SIZES.items()
        }
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{config}: is damaged ({error}); download it again") from None


def _bert(
    tensors: Tensors, shape: BertConfig, model: JsonDict, *, prefix: str
) -> Published:
    parts = {"bert": name_table.read(name_table.bert(shape), tensors.under(prefix))}
    if f"{HEAD}transform.dense.weight" in tensors.names():
        table = name_table.masked_lm_head(shape)
        parts["head"] = name_table.read(table, tensors.under(HEAD))
        _check_ties(tensors, parts)
    unneeded = [f"{prefix}{name}" for name in bert_lib.UNNEEDED]
    unused = tensors.drop([*unneeded, *_NEXT_SENTENCE])
    return Published(model, parts, None, tuple(unused))


def _open_qa(tensors: Tensors, shape: BertConfig, model: JsonDict) -> Published:
    parts = {
        "query": _tower(tensors, shape, model, "embedder."),
        "reader": _reader(tensors, shape, model, "reader."),
    }
    vectors = tensors.take(BLOCKS) if BLOCKS in tensors.names() else None
    if vectors is not None and vectors.shape[1:] != (model["embed_dim"],):
        raise UserError(
            f"{tensors.place}: tensor {BLOCKS!r} has shape {vectors.shape}, but"
            f" config.json asks for vectors of {model['embed_dim']}"
        )
    unused = _unused(tensors, "embedder.", "reader.")
    # The document tower is that of the pre-trained embedder, which is not in there.
    return Published({**model, "tied": False}, parts, vectors, unused)


def _scorer(
    tensors: Tensors, shape: BertConfig, model: JsonDict, *, twice: bool
) -> Published:
    parts = {"query": _tower(tensors, shape, model, "embedder.")}
    if twice:
        query = _tower(tensors, shape, model, "query_embedder.")
        # A scorer with a single tower is saved with that tower under both names.
        if not _equal(query, parts["query"]):
            parts = {"query": query, "document": parts["query"]}
    unused = _unused(tensors, "embedder.", "query_embedder.")
    return Published({**model, "tied": len(parts) == 1}, parts, None, unused)


def _tower(tensors: Tensors, shape: BertConfig, model: JsonDict, prefix: str) -> Any:
    table = name_table.tower(shape, model["embed_dim"])
    return name_table.read(table, tensors.under(prefix))


def _reader(tensors: Tensors, shape: BertConfig, model: JsonDict, prefix: str) -> Any:
    table = name_table.span_reader(shape, model["span_hidden"])
    return name_table.read(table, tensors.under(prefix))


def _check_ties(tensors: Tensors, parts: Params) -> None:
    """Output weights of a masked-LM head must be the word embeddings, as ours are."""
    wanted = {
        f"{HEAD}decoder.weight": parts["bert"]["embeddings"]["tokens"],
        f"{HEAD}decoder.bias": parts["head"]["bias"],
    }
    for name, value in wanted.items():
        if name in tensors.names() and not np.array_equal(tensors.take(name), value):
            raise UserError(
                f"{tensors.place}: tensor {name!r} differs from the one that it is tied"
                " to; models with output weights of their own are not supported"
            )


def _unused(tensors: Tensors, *prefixes: str) -> tuple[str, ...]:
    return tuple(tensors.drop(f"{p}{name}" for p in prefixes for name in _UNUSED))


def _equal(a: Params, b: Params) -> bool:
    there = flatten(b)
    return all(np.array_equal(x, there[k]) for k, x in flatten(a).items())
