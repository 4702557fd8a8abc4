"""What training, evaluation and questions of a user share: weights, index, questions.

An index lies in ``WORKDIR/indexes/HASH``, by the document tower that it was made with
and the settings that decide what the tower's weights mean: runs with the same tower
(all query-side fine-tunings of one start) have one index.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from etils import epath
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.cli import common, find_answers, towers
from realm_retro.data.passages import PassageStore
from realm_retro.parallel import hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.realm import finetune, model, question_sets, search
from realm_retro.realm.answer import Answerer
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.evidence import Retrieved
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig
from realm_retro.retrieval.index.base import MISSING_ID, Index
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.tuning import Trial
from realm_retro.train import checkpoint
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Recipe
from realm_retro.typing import Config, JsonDict, Params

FOLDER = "indexes"
# Questions that an index is compared with exact search on.
_TRIALS = 256

Say = Callable[[str], Any]
T = TypeVar("T")


def recipe(config: Config, workdir: epath.Path, mesh: Mesh) -> Recipe:
    """The recipe of fine-tuning; finds answers and makes the index where needed.

    Raises:
      UserError: an artefact or a question file is missing or does not fit the config.
    """
    towers.check_start(config, workdir)
    settings = qa_config(config)
    questions = question_sets.training_questions(settings)
    store = towers.open_store(config, workdir)
    answers = find_answers.find(workdir, questions, store)
    # A run that goes on has the frozen tower in its checkpoint, whatever became of
    # the weights that it started from.
    weights = None
    if not settings.train_documents:
        # A whole copy on each device: every process reads the document tower's.
        weights = trained_weights(config, workdir, make_mesh())
    weights = weights or start_weights(config, workdir, model.FINETUNING)
    batch_size = config_lib.read(config, "train", TrainConfig).batch_size
    vectors, index = open_index(
        config,
        workdir,
        weights,
        settings.beam,
        hosts.main_only(common.say),
        backend=search.backend_on(mesh, retrieval_config(config).index, batch_size),
    )
    return finetune.make(
        config,
        store,
        questions,
        answers,
        vectors,
        index,
        mesh,
        lambda: weights.params,
        parents=[weights.document_hash],
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, and the shape that they are of.

    Attributes:
      model: with tied towers parted where the parameters have two.
      params: parts, unboxed.
      step: of the run; None for what a run would start from.
    """

    model: RealmConfig
    params: Params
    step: int | None

    @property
    def document_hash(self) -> str:
        """Of the document tower's names, shapes and values, and what they mean."""
        digest = hashlib.sha256(self.model.embedder_fingerprint.encode())
        arrays = search.tower_arrays(self.model, self.params)
        for name, value in sorted(arrays.items()):
            array = np.ascontiguousarray(value)
            digest.update(artifacts.fingerprint_of([name, array.shape]).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def start_weights(
    config: Config, workdir: epath.Path, parts: tuple[str, ...] = model.TOWERS
) -> Weights:
    """What a run of this config starts from.

    Raises:
      UserError: weights are missing, or of another shape than the config's.
    """
    shape = finetune.model_for(towers.model_config(config), qa_config(config))
    params = towers.start_params(config, workdir, parts)
    return Weights(shape, finetune.with_document(shape, params), None)


def trained_weights(
    config: Config, workdir: epath.Path, mesh: Mesh | None = None
) -> Weights | None:
    """The newest checkpoint of the config's run; None where there is no run.

    Args:
      config: the run's.
      workdir: holds the run.
      mesh: where they shall lie; None for `mesh_of` the config.

    Raises:
      UserError: it is damaged, or of another model.
    """
    run_dir = run_folder(config, workdir)
    parts = checkpoint.parts(run_dir)
    if not parts:
        return None
    shape = towers.model_config(config)
    if "document" in parts:
        shape = dataclasses.replace(shape, tied=False)
    params, step = checkpoint.restore_params(
        run_dir, lambda key: model.init(shape, key, parts), mesh or mesh_of(config)
    )
    return Weights(shape, params, step)


def open_index(
    config: Config,
    workdir: epath.Path,
    weights: Weights,
    k: int,
    say: Say = common.say,
    *,
    backend: str = "",
) -> tuple[ShardedArray, Index]:
    """Vectors of all passages by a document tower, made once, and an index over them.

    Args:
      config: the run's.
      workdir: holds the passages.
      weights: with the document tower.
      k: how many passages will be asked for at most.
      say: takes lines about the work.
      backend: see `search.build_index`; "" for that of the config.

    Raises:
      UserError: the passages are missing or do not fit the config.
    """
    return towers.current_index(
        _parted(config, weights),
        workdir,
        weights.params,
        index_folder(workdir, weights),
        backend=backend or retrieval_config(config).index,
        k=k,
        report=say,
    )


def index_recall(
    config: Config,
    workdir: epath.Path,
    weights: Weights,
    found: Retrieved,
    index: Index,
) -> JsonDict:
    """What an index found of the passages that exact search finds.

    Returns:
      ``backend``, ``k`` passages of each of so many ``queries``, and the ``recall``:
      the share of the truly best k that are found.
    """
    ids, queries = found.ids[:_TRIALS], found.vectors[:_TRIALS]
    measured = {"backend": index.backend, "k": ids.shape[1], "queries": len(ids)}
    if index.backend == "exact":
        return {**measured, "recall": 1.0}
    vectors = towers.current_vectors(
        _parted(config, weights),
        workdir,
        weights.params,
        index_folder(workdir, weights),
        report=lambda line: None,
    )
    exact = ExactIndex.build(vectors[:], index.ids, metric=index.metric)
    nobody = np.full(len(ids), MISSING_ID)
    trial = Trial.make(exact, queries, nobody, ids.shape[1])
    return {**measured, "recall": trial.recall(index)}


def index_folder(workdir: epath.Path, weights: Weights) -> epath.Path:
    """Where the index of a document tower lies."""
    return workdir / FOLDER / weights.document_hash[:16]


def open_answerer(
    config: Config,
    workdir: epath.Path,
    weights: Weights,
    store: PassageStore,
    say: Say = common.say,
    *,
    k: int = 0,
) -> Answerer:
    """What answers questions with some weights; makes their index where needed.

    Args:
      config: the run's.
      workdir: holds the passages.
      weights: with or without a reader.
      store: the passages.
      say: takes lines about the work.
      k: how many passages will be asked for, if more than are read.

    Raises:
      UserError: passages, weights and config do not fit together.
    """
    settings = qa_config(config)
    _, index = open_index(config, workdir, weights, max(k, settings.read), say)
    return Answerer(
        weights.model,
        weights.params,
        store,
        index,
        read=settings.read,
        batch_size=settings.eval_batch_size,
        mesh=mesh_of(config),
    )


def run_folder(config: Config, workdir: epath.Path) -> epath.Path:
    """The folder of the config's run."""
    return workdir / "runs" / config.name


def qa_config(config: Config) -> QaConfig:
    """Section ``qa``."""
    return config_lib.read(config, "qa", QaConfig)


def retrieval_config(config: Config) -> RetrievalConfig:
    """Section ``retrieval``."""
    return config_lib.read(config, "retrieval", RetrievalConfig)


def mesh_of(config: Config) -> Mesh:
    """The devices, as section ``mesh`` lays them out."""
    return make_mesh(config_lib.read(config, "mesh", MeshConfig))


def _parted(config: Config, weights: Weights) -> Config:
    """The config with the towers of some weights."""
    parted = config.copy_and_resolve_references()
    with parted.unlocked():
        parted.model.tied = weights.model.tied
    return parted
