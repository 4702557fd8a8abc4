"""Trains the model of a config on what a workdir holds.

Reads:   RETRO: WORKDIR/chunks, WORKDIR/neighbours (a plain decoder: chunks only)
         REALM: WORKDIR/passages, WORKDIR/spans; config.task says what is trained:
         realm_ict, realm_pretrain or realm_finetune
Writes:  WORKDIR/runs/NAME/ with checkpoints/, metrics.jsonl and tensorboard/, where
         NAME is config.name; bad_steps.jsonl where a step went wrong (see
         config.train.on_bad_step); manifest.json when all steps are done.

  python -m realm_retro.cli.train --config=configs/retro/quickstart.py --workdir=work

The same command goes on from the newest checkpoint after an interruption, on the same
or on another number of devices. SIGTERM saves a checkpoint and ends with status 143.
Several processes (one a host) start with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID set; on TPUs (of GKE too) and under Slurm --distributed finds them.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TypeVar

import ml_collections
from absl import flags
from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli import common, program
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig
from realm_retro.retrieval.refresh.config import RefreshConfig
from realm_retro.retro import recipe as retro_recipe
from realm_retro.train import loop
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import format_seconds
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Recipe
from realm_retro.typing import JsonDict

flags.adopt_module_key_flags(program)
SIGTERM_STATUS = 143
T = TypeVar("T")


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Trains one run to its end, or until SIGTERM."""
    hosts.initialise(detect=program.DISTRIBUTED.value)
    run(config, workdir, make_mesh(_build(config, "mesh", MeshConfig)))


def run(config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh) -> None:
    """`main` on some devices, in a program that has begun already."""
    values, say = config_lib.as_dict(config), hosts.main_only(common.say)
    outcome = loop.train(
        make_recipe(config, workdir, mesh),
        workdir / "runs" / values["name"],
        config=_build(config, "train", TrainConfig),
        optimizer=_build(config, "optimizer", OptimizerConfig),
        mesh=mesh,
        seed=values["seed"],
        settings=decisive(config),
        report=say,
    )
    if not outcome.finished:
        say(
            f"train: stopped at step {outcome.step}, which is saved; run the same"
            " command again to go on"
        )
        # Not 0: a script must not go on to evaluate an unfinished run.
        sys.exit(SIGTERM_STATUS)
    if outcome.seconds:
        say(
            f"train: {outcome.step} steps in {format_seconds(outcome.seconds)},"
            f" {outcome.step / outcome.seconds:.2f} steps/s"
        )


def decisive(config: ml_collections.ConfigDict) -> JsonDict:
    """The sections of a config that decide the weights of its task.

    They are fixed for the life of a run; the loop adds its own. What other tasks and
    the evaluation read may change.
    """
    values = config_lib.as_dict(config)
    names = {
        "retro": ("init",),
        "realm_pretrain": ("init", "pretrain"),
        "realm_ict": ("init", "ict"),
        "realm_finetune": ("init",),
    }.get(values.get("task", "retro"), ())
    found = {name: values[name] for name in ("task", "model", *names) if name in values}
    if values.get("task") == "realm_finetune":
        found["qa"] = _build(config, "qa", QaConfig).decisive
        found["retrieval"] = dataclasses.asdict(
            _build(config, "retrieval", RetrievalConfig)
        )
        # The beam is ranked by the stored vectors.
        dtype = _build(config, "refresh", RefreshConfig).dtype
        found["refresh"] = {"dtype": dtype}
    return found


def make_recipe(
    config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh
) -> Recipe:
    """The recipe of ``config.task``.

    Raises:
      UserError: there is no such task, or an artefact does not fit the config.
    """
    task = config_lib.as_dict(config).get("task", "retro")
    if task == "retro":
        return retro_recipe.make(config, workdir, mesh)
    from realm_retro.cli import realm_recipes

    makers = {
        "realm_pretrain": realm_recipes.pretrain,
        "realm_ict": realm_recipes.ict,
        "realm_finetune": realm_recipes.finetune,
    }
    if task not in makers:
        raise UserError(
            f"config.task={task!r} is not known; use retro, {', '.join(makers)}"
        )
    return makers[task](config, workdir, mesh)


def entry() -> None:
    """The console script."""
    common.run(main, name="train")


def _build(config: ml_collections.ConfigDict, name: str, cls: type[T]) -> T:
    section = config_lib.section(config, name)
    return config_lib.build(cls, section, name=f"config.{name}")


if __name__ == "__main__":
    entry()
