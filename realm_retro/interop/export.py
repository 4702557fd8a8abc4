"""Our parameters as checkpoints that Hugging Face transformers reads."""

from __future__ import annotations

import json

from etils import epath

from realm_retro import disk
from realm_retro.arrays import flatten
from realm_retro.errors import UserError
from realm_retro.interop import bert as bert_lib
from realm_retro.interop import name_table
from realm_retro.interop.name_table import Table
from realm_retro.interop.realm import BERT_FIELDS, HEAD, READER_EPSILON, SIZES
from realm_retro.interop.tensors import write_safetensors
from realm_retro.nn.bert import BertConfig
from realm_retro.typing import JsonDict, Params

BERT = "BertModel"
# What a part is called there; `BERT` takes the BERT of any of them.
KINDS = {
    "query": "RealmEmbedder",
    "document": "RealmEmbedder",
    "encoder": "RealmKnowledgeAugEncoder",
    "reader": "RealmReader",
}


def save(folder: epath.PathLike, kind: str, model: JsonDict, params: Params) -> None:
    """Writes one part as config.json and model.safetensors.

    Tensors that the published model never reads are left out: transformers says so
    when it loads the folder, and makes them up.

    Args:
      folder: where; created if needed.
      kind: `BERT`, or one of `KINDS`.
      model: the fields of `realm_retro.realm.config.RealmConfig`.
      params: of the part: ``{"bert": …, …}``.

    Raises:
      UserError: the part is not of that kind.
    """
    folder = epath.Path(folder)
    shape = BertConfig(**{name: model[name] for name in BERT_FIELDS})
    table = _table(kind, shape, model)
    if kind == BERT:
        params = {"bert": params["bert"]}
    there = flatten(params).keys()
    for path in sorted(there ^ table.leaves.keys()):
        states = "lacks" if path in table.leaves else "has"
        raise UserError(
            f"{folder}: the model {states} {path}, unlike a {kind}; write its BERT"
            " alone with --format=bert"
        )
    tensors = name_table.write(table, params)
    if kind == KINDS["encoder"]:
        tokens = tensors["realm.embeddings.word_embeddings.weight"]
        tensors[f"{HEAD}decoder.weight"] = tokens
    folder.mkdir(parents=True, exist_ok=True)
    # The metadata is what transformers asks for before it reads a file.
    with disk.replacing(folder / bert_lib.WEIGHTS) as path:
        write_safetensors(path, tensors, {"format": "pt"})
    with disk.replacing(folder / bert_lib.CONFIG) as path:
        path.write_text(json.dumps(_config(kind, model), indent=1))


def _table(kind: str, shape: BertConfig, model: JsonDict) -> Table:
    if kind == BERT:
        return name_table.bert(shape).under("", "bert/")
    if kind == KINDS["query"]:
        return name_table.tower(shape, model["embed_dim"])
    if kind == KINDS["reader"]:
        return name_table.span_reader(shape, model["span_hidden"])
    return name_table.knowledge_encoder(shape)


def _config(kind: str, model: JsonDict) -> JsonDict:
    activations = {ours: theirs for theirs, ours in bert_lib.ACTIVATIONS.items()}
    config: JsonDict = {
        "architectures": [kind],
        "model_type": "bert" if kind == BERT else "realm",
        "hidden_act": activations[model["activation"]],
        "layer_norm_eps": model["epsilon"],
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    for theirs, ours in bert_lib.SIZES.items():
        if ours in BERT_FIELDS:
            config[theirs] = model[ours]
    if kind != BERT:
        for theirs, (ours, default) in SIZES.items():
            config[theirs] = model.get(ours, default)
        config["reader_layer_norm_eps"] = READER_EPSILON
    return config
