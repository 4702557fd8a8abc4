"""What the commands of REALM share: passages, the model's shape, weights to start from.

Section ``init`` of a config says where weights come from:

    config.init.bert    ``minilm``, a folder of another BERT, or "" for random weights
    config.init.run     another run of the same workdir, whose last checkpoint is taken;
                        parts that it does not have come from `bert`, but a reader's
                        BERT from the run's knowledge-augmented encoder (section 3.2)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.interop import bert as bert_weights
from realm_retro.parallel import hosts
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import model, search
from realm_retro.realm.config import RealmConfig
from realm_retro.retrieval import refresh
from realm_retro.retrieval.embed import EmbedConfig
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


def embedder_fingerprint(config: Config) -> str:
    """Of the model's settings that decide what the document tower's weights mean.

    It is the parent ``model`` of snapshots and of vectors.
    """
    return model_config(config).embedder_fingerprint


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
    realm, init = model_config(config), _init(config)
    _check_init(init, workdir)
    key = jax.random.key(config.seed)
    params = _from_bert(realm, init.bert, key, parts)
    if init.run:
        trained = run_params(config, workdir, init.run)
        if "reader" in params and "encoder" in trained:
            # A copy: a train step donates every buffer once.
            bert = jax.tree.map(jnp.copy, trained["encoder"]["bert"])
            params["reader"] = {**params["reader"], "bert": bert}
        params |= trained
    return {name: params[name] for name in params if name in parts}


def check_start(config: Config, workdir: epath.Path) -> None:
    """Refuses what `start_params` will refuse, before the long work that precedes it.

    A run that has a checkpoint goes on from it, whatever became of its start.

    Raises:
      UserError: section ``init`` names weights that are not there.
    """
    if not (workdir / "runs" / config.name / checkpoint.FOLDER).exists():
        _check_init(_init(config), workdir)


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
    section = config_lib.section(config, "embed")
    settings = config_lib.build(EmbedConfig, section, name="config.embed")
    return search.passage_embedder(
        model_config(config),
        open_store(config, workdir),
        batch_tokens=settings.batch_tokens,
        mesh=settings.mesh(),
    )


def current_vectors(
    config: Config,
    workdir: epath.Path,
    params: PyTree,
    root: epath.Path,
    *,
    report: Callable[[str], Any] = print,
) -> ShardedArray:
    """Vectors of all passages by a document tower, float [N, d].

    They are made once, in `root`, and found there again as long as the parameters, the
    passages and the model's settings are the same.

    Args:
      config: the run's.
      workdir: holds the passages.
      params: with the document tower's part.
      root: a folder of their own.
      report: takes a line before the long work.

    Raises:
      UserError: those in `root` are damaged, or of another dtype than the config's.
    """
    realm, store = model_config(config), open_store(config, workdir)
    settings = config_lib.build(
        RefreshConfig, config_lib.section(config, "refresh"), name="config.refresh"
    )
    arrays = {
        name: np.asarray(x) for name, x in search.tower_arrays(realm, params).items()
    }
    parents = {
        "passages": store.fingerprint,
        "model": embedder_fingerprint(config),
    }
    report(f"index: {len(store):,} passages by the document tower, in {root}")
    # A finished one may lie on a read-only disk.
    with hosts.main_first(f"vectors in {root}"):
        version = refresh.finished_version(root, 0, arrays, parents=parents)
        if version is None:
            version = refresh.refresh_inline(
                root,
                0,
                arrays,
                passage_embedder(config, workdir),
                settings.target(len(store), parents),
                report=lambda _: None,
            )
    made = version.manifest.config
    dtype, shard_rows = made["dtype"], made["shard_rows"]
    if dtype != settings.dtype:
        raise UserError(
            f"{root}: holds {dtype} vectors, but config.refresh.dtype={settings.dtype};"
            " make them equal, or delete the folder: it is made again"
        )
    if shard_rows != settings.shard_rows:
        report(
            f"index: shards of {shard_rows:,} passages are there already;"
            f" config.refresh.shard_rows={settings.shard_rows} is for those yet to come"
        )
    return refresh.load_vectors(version)


def current_index(
    config: Config,
    workdir: epath.Path,
    params: PyTree,
    root: epath.Path,
    *,
    backend: str = "auto",
    k: int = 100,
    report: Callable[[str], Any] = print,
) -> tuple[ShardedArray, Index]:
    """`current_vectors`, and an index over them.

    Args:
      config: the run's.
      workdir: holds the passages.
      params: with the document tower's part.
      root: a folder of the vectors' own.
      backend: see `search.build_index`.
      k: how many will be asked for at most.
      report: takes lines before the long work and about the index.

    Raises:
      UserError: see `current_vectors` and `search.build_index`.
    """
    vectors = current_vectors(config, workdir, params, root, report=report)
    whole = np.asarray(vectors[:], np.float32)
    return vectors, search.build_index(whole, backend=backend, k=k, report=report)


def _init(config: Config) -> InitConfig:
    section = config_lib.section(config, "init")
    return config_lib.build(InitConfig, section, name="config.init")


def _check_init(init: InitConfig, workdir: epath.Path) -> None:
    if init.run and not checkpoint.parts(workdir / "runs" / init.run):
        raise UserError(
            f"config.init.run={init.run!r}: {workdir} has no trained run of that name;"
            " train it first (the same --config without :finetune), or take :zero_shot"
        )
    for name in (bert_weights.CONFIG, bert_weights.WEIGHTS):
        path = epath.Path(init.bert) / name
        if init.bert not in ("", "minilm") and not path.exists():
            raise UserError(
                f"config.init.bert={init.bert!r}: {path} is missing; name a folder with"
                f' {bert_weights.CONFIG} and {bert_weights.WEIGHTS}, minilm, or ""'
            )


def _from_bert(
    realm: RealmConfig, name: str, key: jax.Array, parts: Sequence[str]
) -> dict[str, PyTree]:
    if not name:
        boxed = jax.jit(lambda: model.init(realm, key, parts))()
        return dict(nn.meta.unbox(boxed))
    folder = bert_weights.find_minilm() if name == "minilm" else epath.Path(name)
    _, weights = bert_weights.load_safetensors(folder)
    return dict(nn.meta.unbox(model.from_bert(realm, weights, key, parts)))
