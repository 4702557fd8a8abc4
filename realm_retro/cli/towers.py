"""What the commands of REALM share: passages, the model's shape, weights to start from.

Section ``init`` of a config says where weights come from:

    config.init.bert    ``minilm``, a folder of another BERT, or "" for random weights
    config.init.run     another run of the same workdir, whose last checkpoint is taken;
                        parts that it does not have come from `bert`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.interop import bert as bert_weights
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import model, search
from realm_retro.realm.config import RealmConfig
from realm_retro.retrieval import refresh
from realm_retro.retrieval.index.base import Index
from realm_retro.retrieval.refresh import RefreshConfig
from realm_retro.train import checkpoint
from realm_retro.typing import Config, HostArray, PyTree


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where weights come from (section ``init``); see the module docstring."""

    bert: str = "minilm"
    run: str = ""


def model_config(config: Config) -> RealmConfig:
    """The model's shape, section ``model``."""
    return config_lib.build(RealmConfig, config.model, name="config.model")


def open_store(config: Config, workdir: epath.Path) -> PassageStore:
    """The passages of a workdir.

    Raises:
      UserError: they are missing, or longer than the model reads.
    """
    realm = model_config(config)
    store = PassageStore.open(workdir / "passages")
    for name, there, read in (
        ("length", store.length, realm.body_length),
        ("title_length", store.title_length, realm.title_length),
    ):
        field = "body_length" if name == "length" else name
        if there > read:
            raise UserError(
                f"{workdir / 'passages'}: config.passages.{name}={there} is more than"
                f" config.model.{field}={read}; passages would be cut: make them equal"
            )
    return store


def start_params(
    config: Config, workdir: epath.Path, parts: Sequence[str] = model.PRETRAINING
) -> PyTree:
    """Parameters to start from, unboxed; see the module docstring.

    Raises:
      UserError: weights are missing, or of another shape than the config's.
    """
    realm = model_config(config)
    init = config_lib.build(
        InitConfig, config_lib.section(config, "init"), name="config.init"
    )
    key = jax.random.key(config.seed)
    params = _from_bert(realm, init.bert, key, parts)
    if init.run:
        params |= run_params(config, workdir, init.run)
    return {name: params[name] for name in params if name in parts}


def run_params(config: Config, workdir: epath.Path, name: str) -> PyTree:
    """All parts of the newest checkpoint of a run.

    Raises:
      UserError: there is none, or it is of another model than the config's.
    """
    directory = workdir / "runs" / name
    parts = checkpoint.parts(directory)
    realm = model_config(config)
    params, _ = checkpoint.restore_params(
        directory, lambda key: model.init(realm, key, parts), make_mesh()
    )
    return params


def passage_embedder(
    config: Config, workdir: epath.Path
) -> Callable[[Mapping[str, HostArray]], Callable[[int, int], HostArray]]:
    """What a refresh worker embeds with; see `search.passage_embedder`."""
    settings = config_lib.section(config, "embed")
    return search.passage_embedder(
        model_config(config),
        open_store(config, workdir),
        batch_tokens=settings.get("batch_tokens", 0),
    )


def current_index(
    config: Config,
    workdir: epath.Path,
    params: PyTree,
    root: epath.Path,
    *,
    backend: str = "auto",
    report: Callable[[str], Any] = print,
) -> tuple[ShardedArray, Index]:
    """Vectors of all passages by a document tower, and an index over them.

    They are made once, in `root`, and found there again as long as the parameters and
    the passages are the same.

    Args:
      config: the run's.
      workdir: holds the passages.
      params: with the document tower's part.
      root: a folder of their own.
      backend: see `search.build_index`.
      report: takes a line before the long work.
    """
    realm, store = model_config(config), open_store(config, workdir)
    settings = config_lib.build(
        RefreshConfig, config_lib.section(config, "refresh"), name="config.refresh"
    )
    arrays = {
        name: np.asarray(x) for name, x in search.tower_arrays(realm, params).items()
    }
    report(f"index: {len(store):,} passages by the document tower, in {root}")
    version = refresh.refresh_inline(
        root,
        0,
        arrays,
        passage_embedder(config, workdir),
        settings.target(len(store), {"passages": store.fingerprint}),
        report=lambda _: None,
    )
    vectors = refresh.load_vectors(version)
    whole = np.asarray(vectors[:], np.float32)
    return vectors, search.build_index(whole, backend=backend)


def _from_bert(
    realm: RealmConfig, name: str, key: jax.Array, parts: Sequence[str]
) -> dict[str, PyTree]:
    if not name:
        boxed = jax.jit(lambda: model.init(realm, key, parts))()
        return dict(nn.meta.unbox(boxed))
    folder = bert_weights.find_minilm() if name == "minilm" else epath.Path(name)
    _, weights = bert_weights.load_safetensors(folder)
    return dict(nn.meta.unbox(model.from_bert(realm, weights, key, parts)))
