"""Disk and host memory of a run's artefacts, by the formats that they are stored in.

What depends on the text itself (strings, spans, answers) is left out or, where a config
says how much text there is, taken from there.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from realm_retro import config as config_lib
from realm_retro.cli.build_index import IndexConfig
from realm_retro.cli.encoders import EncoderConfig
from realm_retro.cli.plan_task import PlanConfig, Task
from realm_retro.data import chunk_store, passages
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig
from realm_retro.retrieval.embed import EmbedConfig
from realm_retro.retrieval.index.scann import DIMS_PER_BLOCK
from realm_retro.retrieval.neighbours import NeighboursConfig
from realm_retro.retrieval.refresh import RefreshConfig
from realm_retro.retro import recipe as retro_recipe
from realm_retro.typing import Config, JsonDict, PyTree

T = TypeVar("T")
# Width of all-MiniLM-L6-v2, the only encoder with a name.
_MINILM = 384
_IDS, _SCORES = 8, 4
# ScaNN has so many times its vectors in memory while it builds.
_BUILDS = 3


class Item(NamedTuple):
    """An artefact.

    Attributes:
      name: of its folder, or what it is.
      disk: bytes.
      memory: bytes that a process holds; what is memory-mapped is not counted.
      who: which process.
    """

    name: str
    disk: float
    memory: float
    who: str


def storage(config: Config, settings: PlanConfig, task: Task) -> JsonDict:
    """Disk and memory of the artefacts of a run.

    Args:
      config: the run's.
      settings: with the size of the corpus.
      task: what is trained.

    Returns:
      ``items``, ``disk`` of all and ``training``, the memory of one training process
      on its host; ``unknown`` says what is not in it.
    """
    items: list[Item] = []
    unknown = "the parts that depend on the words: titles, ids, spans, answers"
    if not settings.rows:
        unknown = "all of the corpus: config.plan.rows is 0"
    elif task.name == "retro":
        items = _retro(config, settings)
        if not settings.documents:
            unknown += "; the table of documents: config.plan.documents is 0"
    else:
        items = _realm(config, settings, task)
    saved = _bytes(task.state)
    # One more while it is written.
    items.append(Item("checkpoints", (task.train.keep + 1) * saved, 0, "train"))
    return {
        "items": [item._asdict() for item in items],
        "disk": sum(item.disk for item in items),
        "training": sum(item.memory for item in items if item.who == "train"),
        "largest_memory": max(item.memory for item in items),
        "unknown": unknown,
    }


def _retro(config: Config, settings: PlanConfig) -> list[Item]:
    model, n = retro_recipe.model_config(config), settings.rows
    token = 2 if model.vocab_size <= 1 << 16 else 4
    chunk = model.chunk_length * token + chunk_store.CHUNK.itemsize
    documents = settings.documents * chunk_store.DOCUMENT.itemsize
    # Places of the windows: id, piece and whether it counts.
    items = [Item("chunks", n * chunk + documents, n * (8 + 4 + 1), "train")]
    if not model.retrieves:
        return items
    encoder = config_lib.read(config, "encoder", EncoderConfig)
    stored = np.dtype(config_lib.read(config, "embed", EmbedConfig).dtype).itemsize
    index = config_lib.read(config, "index", IndexConfig)
    k = config_lib.read(config, "neighbours", NeighboursConfig).k
    d = _MINILM if not encoder.path else _width_of(encoder)
    width = d + (index.metric == "squared_l2" and index.backend == "scann")
    searched = n * _index_row(width, index.backend)
    # An exact index is memory-mapped; ScaNN copies a part's vectors while it builds.
    part = min(n, index.part_rows)
    held = 0.0 if index.backend == "exact" else part * _index_row(width, index.backend)
    return [
        *items,
        Item("embeddings", n * d * stored, 0, "embed"),
        Item("index", searched, held and _BUILDS * part * 4.0 * width, "build_index"),
        Item("neighbours", n * k * (_IDS + _SCORES), held, "find_neighbours"),
    ]


def _realm(config: Config, settings: PlanConfig, task: Task) -> list[Item]:
    model, n = config_lib.read(config, "model", RealmConfig), settings.rows
    refresh = config_lib.read(config, "refresh", RefreshConfig)
    piece = 2 if model.vocab_size <= 1 << 16 else 4
    passage = model.body_length * piece + passages.PASSAGE.itemsize
    document = model.title_length * piece + passages.DOCUMENT.itemsize
    disk = n * passage + settings.documents * document + settings.text_bytes
    vectors = n * model.vector_dim * np.dtype(refresh.dtype).itemsize
    searched, versions, snapshots = 0.0, 0, 0
    if task.name == "realm_finetune":
        backend = config_lib.read(config, "retrieval", RetrievalConfig).index
        beam = config_lib.read(config, "qa", QaConfig).beam
        searched = n * _index_row(model.vector_dim, backend)
        searched += task.train.batch_size * beam * model.vector_dim * 4.0
        versions = 1
    elif task.name == "realm_pretrain":
        search = config_lib.read(config, "pretrain", PretrainConfig)
        # One is in use while the next is built.
        searched = 2 * n * _index_row(model.vector_dim, search.index)
        if search.placement == "device":
            # All titles; vectors and bodies are read share by share.
            searched = n * model.title_length * piece
        # Those kept, those of the checkpoints, and one in the making.
        versions = refresh.keep + task.train.keep + 2
        tower = task.state.params["query" if model.tied else "document"]
        snapshots = refresh.keep * _bytes(tower)
    return [
        Item("passages", disk, n * (4 + 4 + 8), "train"),
        Item("index versions", versions * vectors, searched, "train"),
        Item("snapshots", snapshots, 0, "train"),
    ]


def _index_row(width: int, backend: str) -> float:
    """Bytes of a vector in an index on a host: itself in float32, its id, its codes.

    ScaNN has 4 bits for a block of dimensions, and with SOAR each row in two leaves.
    """
    codes = 0.0
    if backend != "exact":
        codes = 2 * (-(-width // DIMS_PER_BLOCK) / 2 + 4)
    return 4.0 * width + _IDS + codes


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _width_of(encoder: EncoderConfig) -> int:
    values: Any = json.loads((encoder.folder() / "config.json").read_text())
    return int(values["hidden_size"])
