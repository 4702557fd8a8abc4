"""What a plan is made of: the step that `cli.train` would jit, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from realm_retro import config as config_lib
from realm_retro.errors import UserError
from realm_retro.realm import finetune, ict_recipe, pretrain, shapes
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.realm.question_sets import QaConfig
from realm_retro.retro import recipe as retro_recipe
from realm_retro.train import feed, loop, step
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Recipe
from realm_retro.train.state import TrainState
from realm_retro.typing import Config, JsonDict, PyTree

T = TypeVar("T")
_TASKS = ("retro", "realm_pretrain", "realm_ict", "realm_finetune")
_MESSAGE = "config.plan.rows={rows}: say how many {what} the corpus has"


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The machine that a config is made for, and its corpus (section ``plan``).

    Attributes:
      topology: of TPU chips, such as ``v5e:8x8``.
      rows: chunks (RETRO) or passages (REALM) of the corpus; 0 where unknown.
      documents: of the corpus.
      text_bytes: of the corpus's text in UTF-8.
    """

    topology: str = ""
    rows: int = 0
    documents: int = 0
    text_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "documents", "text_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class Task:
    """A train step and what it takes, as shapes with shardings.

    Attributes:
      name: of the task, as in ``config.task``.
      recipe: without data.
      train: steps and batch size.
      state: before a step.
      batch: of a step; with an index and passages where the devices search.
      step: jitted, the very one that training runs.
    """

    name: str
    recipe: Recipe
    train: TrainConfig
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: jax.stages.Wrapped


def make(config: Config, settings: PlanConfig, mesh: Mesh | AbstractMesh) -> Task:
    """The train step of a config on a mesh, without data and without its devices.

    Raises:
      UserError: the config does not say enough, or is wrong.
    """
    name = config_lib.as_dict(config).get("task", "retro")
    train = config_lib.read(config, "train", TrainConfig)
    made: Any = mesh  # an abstract mesh has all that a step without data asks of one
    if name not in _TASKS:
        raise UserError(f"config.task={name!r} is not known; use {', '.join(_TASKS)}")
    if name == "retro":
        recipe = retro_recipe.outline(config, made)
        batch = retro_recipe.abstract_batch(retro_recipe.model_config(config), train)
    else:
        recipe, batch = _realm(config, settings, train, made, name)
    optimizer = config_lib.read(config, "optimizer", OptimizerConfig)
    rule, state = loop.plan(recipe, train, optimizer, made)
    return Task(
        name=name,
        recipe=recipe,
        train=train,
        state=state,
        batch=feed.abstract_batch(recipe, batch, mesh),
        step=step.make_train_step(
            recipe,
            rule,
            state,
            made,
            seed=config.seed,
            accumulation=train.accumulation,
            max_loss_ratio=train.max_loss_ratio,
        ),
    )


def _realm(
    config: Config, settings: PlanConfig, train: TrainConfig, mesh: Mesh, name: str
) -> tuple[Recipe, shapes.Shapes]:
    model, rows = config_lib.read(config, "model", RealmConfig), train.batch_size
    if name == "realm_pretrain":
        search = config_lib.read(config, "pretrain", PretrainConfig)
        size = settings.rows
        if search.placement == "device" and not size:
            raise UserError(_MESSAGE.format(rows=size, what="passages"))
        recipe = pretrain.outline(model, search, train, size=size, mesh=mesh)
        return recipe, shapes.pretrain_batch(model, search, rows, size=size, mesh=mesh)
    if name == "realm_ict":
        return ict_recipe.outline(model, train, mesh), shapes.ict_batch(model, rows)
    qa = config_lib.read(config, "qa", QaConfig)
    model = finetune.model_for(model, qa)
    recipe = finetune.outline(model, qa, train, mesh)
    return recipe, shapes.finetune_batch(model, qa, rows)


def state_bytes(task: Task) -> JsonDict:
    """Bytes on one device of what a step takes, and what of it lies there whole.

    Returns:
      ``parameters``, ``optimizer``, ``batch`` and ``index`` (with the passages that
      the devices search) in bytes; ``whole``, the weights of over 1 MiB, and their
      moments, that every device holds whole, with their bytes; ``weights``, how many
      numbers all parameters are.
    """
    batch = {n: x for n, x in task.batch.items() if n in task.recipe.batch_spec}
    tables = {n: x for n, x in task.batch.items() if n not in batch}
    kept = {"parameters": task.state.params, "moments": task.state.opt_state}
    whole = {
        f"{part}{jax.tree_util.keystr(path)}": _bytes(leaf)
        for part, tree in kept.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated and _bytes(leaf) > 1 << 20
    }
    weights = jax.tree.leaves(task.state.params)
    return {
        "parameters": _total(task.state.params),
        "optimizer": _total(task.state.opt_state),
        "batch": _total(batch),
        "index": _total(tables),
        "whole": whole if weights[0].sharding.mesh.size > 1 else {},
        "weights": sum(leaf.size for leaf in weights),
    }


def _total(tree: PyTree) -> int:
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """On one device."""
    assert leaf.sharding is not None
    share = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(share) * leaf.dtype.itemsize
