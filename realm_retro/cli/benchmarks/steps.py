"""A real training under conditions that alternate, block by block of steps.

It is the loop of `realm_retro.train` with the recipe of the config; hooks look at the
clock and change the conditions, and end the training when they have seen enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli import common, train
from realm_retro.cli.benchmarks.workdirs import NAME
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.train import loop
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import LoopState, Recipe
from realm_retro.typing import Config

T = TypeVar("T")


class Enough(Exception):
    """Ends a training when all is measured."""


class Alternation:
    """A hook that times blocks of steps, each block under one of several conditions.

    One round holds a block of each condition in turn. The first round is not timed: it
    compiles, and fills what is empty at first. Between two blocks the device is waited
    for, so that no block pays for another's work.

    Attributes:
      seconds: condition → seconds of a step, a number for each round.
      single: condition → seconds of each step of a block, a list for each round; of
        the whole block where single steps are not waited for.
    """

    def __init__(
        self,
        conditions: Sequence[str],
        *,
        steps: int,
        rounds: int,
        untimed: int = 0,
        after: int = 0,
        each_step: bool = False,
        switch: Callable[[str, LoopState], None] = lambda condition, loop: None,
    ):
        """The first block, of the first condition, begins with the training.

        Args:
          conditions: their names, in order.
          steps: that are timed, of a block.
          rounds: that are timed.
          untimed: steps before them, in which the condition takes hold.
          after: steps that are taken when all blocks are over.
          each_step: wait for the device after each step and keep its seconds.
          switch: called between two blocks with the condition that comes.
        """
        self._conditions, self._steps, self._rounds = conditions, steps, rounds
        self._untimed, self._after, self._switch = untimed, after, switch
        self._each_step = each_step
        self.seconds: dict[str, list[float]] = {name: [] for name in conditions}
        self.single: dict[str, list[list[float]]] = {name: [] for name in conditions}
        self._marks: list[float] = []

    @property
    def block(self) -> int:
        """Steps of a block."""
        return self._steps + self._untimed

    @property
    def total(self) -> int:
        """Steps of all blocks."""
        return self.block * len(self._conditions) * (self._rounds + 1)

    @property
    def last(self) -> int:
        """The step that the training ends with."""
        return self.total + self._after

    def condition(self, step: int) -> str:
        """The condition that a step, from 0, is taken under."""
        return self._conditions[step // self.block % len(self._conditions)]

    def is_timed(self, step: int) -> bool:
        """Whether a step, from 0, is of a round that counts."""
        return step >= self.block * len(self._conditions)

    def __call__(self, loop: LoopState) -> None:
        """Called after each step was dispatched."""
        place = loop.step % self.block
        if loop.step <= self.total:
            if self._each_step or place in (0, self._untimed):
                jax.block_until_ready(loop.state)
                self._marks.append(time.perf_counter())
            if place == 0:
                self._end_block(loop)
            if place == self._untimed:
                self._marks = [time.perf_counter()]
        if loop.step == self.last:
            raise Enough

    def _end_block(self, loop: LoopState) -> None:
        condition, marks = self.condition(loop.step - 1), self._marks
        if self.is_timed(loop.step - 1):
            seconds = (marks[-1] - marks[0]) / self._steps
            self.seconds[condition].append(seconds)
            pairs = zip(marks[1:], marks[:-1], strict=True)
            self.single[condition].append([after - before for after, before in pairs])
            which = f"{len(self.seconds[condition])} of {self._rounds}"
            common.say(f"round {which}, {condition}: {seconds:.3f} s a step")
        if loop.step < self.total:
            self._switch(self.condition(loop.step), loop)


def settings(config: Config, last: int, **train_section: object) -> dict[str, object]:
    """A ``train`` section for a training of at least `last` steps.

    It logs rarely and, unless told, saves nothing.
    """
    steps = max(int(config.train.get("steps", 0)), last + 1)
    rarely = {"log_every": steps, "checkpoint_every": steps + 1}
    return {"steps": steps, **rarely, **train_section}


def run(
    config: Config, workdir: epath.Path, wrap: Callable[[Recipe, Mesh], Recipe]
) -> epath.Path:
    """Trains a run of `workdir` until a hook raises `Enough`; returns its folder.

    Args:
      config: of the run.
      workdir: see `workdirs.scratch`.
      wrap: puts hooks into the recipe, or other batches.

    Raises:
      UserError: an artefact is missing or does not fit; or the training failed.
      KeyboardInterrupt: the training was told to stop.
    """
    mesh = make_mesh(_build(config, "mesh", MeshConfig))
    run_dir = workdir / "runs" / NAME
    try:
        loop.train(
            wrap(train.make_recipe(config, workdir, mesh), mesh),
            run_dir,
            config=_build(config, "train", TrainConfig),
            optimizer=_build(config, "optimizer", OptimizerConfig),
            mesh=mesh,
            seed=config.seed,
            settings=train.decisive(config),
            report=lambda line: None,
        )
    except Enough:
        return run_dir
    raise KeyboardInterrupt  # by SIGTERM, which the loop takes as the end of its time


def _build(config: Config, name: str, cls: type[T]) -> T:
    section = config_lib.section(config, name)
    return config_lib.build(cls, section, name=f"config.{name}")
