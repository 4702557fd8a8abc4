"""Suite ``refresh``: what refresh workers cost the training beside them.

A training takes blocks of steps in turn. In one kind nothing is refreshed and the
workers stand still (SIGSTOP); in the other the training publishes a snapshot at each
block's beginning and takes over what is ready, and the workers embed all the while.

The training keeps to some cores and the workers to others, in both kinds of block, so
that what is compared is the refreshing and not the number of cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli import refresh_index
from realm_retro.cli.benchmarks import (
    children,
    machine,
    report,
    retrieval,
    steps,
    workdirs,
)
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.cli.benchmarks.steps import Alternation
from realm_retro.errors import UserError
from realm_retro.train.recipe import Live, LoopState, Recipe
from realm_retro.typing import Config, JsonDict

TARGET = 1.05
_ALONE, _BESIDE = "without refresh workers", "with refresh workers"
_MODULE = "realm_retro.cli.refresh_index"
_READY_SECONDS = 600.0
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Beside:
    """The processes beside the training.

    Attributes:
      workers: how many.
      cores: that they have together; 0 for half of all.
      environment: variables that they get, such as the devices that are theirs.
    """

    workers: int = 1
    cores: int = 0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def measure(
    config: Config,
    workdir: epath.Path,
    *,
    num_steps: int,
    rounds: int,
    beside: Beside,
) -> Report:
    """Runs the suite.

    Args:
      config: of a REALM pre-training.
      workdir: its passages and spans are used, or made.
      num_steps: steps of a timed block.
      rounds: pairs of blocks.
      beside: the workers.

    Raises:
      UserError: the config is of another kind, or a process failed.
    """
    retrieval.check(config, "refresh")
    workdirs.complete(config, workdir)
    log = workdirs.log_file(workdir, "refresh")
    cores = machine.cores()
    mine, theirs = machine.split(cores, beside.cores) or ([], [])
    with contextlib.ExitStack() as stack:
        stack.enter_context(machine.pinned(mine))
        scratch = stack.enter_context(workdirs.scratch(workdir))
        workers = stack.enter_context(_Workers(scratch, log, theirs, beside))
        alternation = Alternation(
            (_ALONE, _BESIDE),
            steps=num_steps,
            rounds=rounds,
            switch=workers.switch,
        )
        config = _changed(config, alternation)
        workers.prepare(config)
        used: dict[int, int] = {}
        wrap = functools.partial(_wrap, alternation=alternation, used=used)
        steps.run(config, scratch, wrap)
    timed = {index for step, index in used.items() if alternation.is_timed(step)}
    return _report(
        config,
        alternation,
        swaps=len(timed) - 1,
        cpus=(mine, theirs),
        settings={
            "steps_of_a_block": num_steps,
            "workers": beside.workers,
            "worker_environment": workers.environment,
        },
    )


def _changed(config: Config, alternation: Alternation) -> Config:
    return workdirs.changed(
        config,
        name=workdirs.NAME,
        pretrain={"refresh": "workers"},
        refresh={
            # At each block's beginning, and never to be waited for.
            "every": alternation.block,
            "max_staleness": 0,
            "target_overlap": 0.0,
            "poll_seconds": _POLL_SECONDS,
        },
        train=steps.settings(config, alternation.last),
    )


def _wrap(
    recipe: Recipe, mesh: Mesh, alternation: Alternation, used: dict[int, int]
) -> Recipe:
    """The recipe whose index is refreshed in every other block only.

    Args:
      recipe: the config's.
      mesh: the devices.
      alternation: which block is which.
      used: gets the index that each step has asked, by the step of its snapshot.
    """
    live = recipe.batch_at
    assert isinstance(live, Live)

    def find(step: int, asked: Any) -> JsonDict:
        found = live.find(step, asked)
        used[step] = found["index_step"]
        return found

    def gated(hook: Callable[[LoopState], None]) -> Callable[[LoopState], None]:
        def run(loop: LoopState) -> None:
            if alternation.condition(loop.step - 1) == _BESIDE:
                hook(loop)

        return run

    hooks = (*map(gated, recipe.hooks), alternation)
    noting = dataclasses.replace(live, find=find)
    return dataclasses.replace(recipe, hooks=hooks, batch_at=noting)


class _Workers:
    """Processes of `refresh_index` that run and stand still as they are told."""

    def __init__(
        self,
        scratch: epath.Path,
        log: epath.Path,
        cpus: Sequence[int],
        beside: Beside,
    ):
        self._scratch, self._log, self._cpus = scratch, log, cpus
        self._beside = beside
        self._stack = contextlib.ExitStack()
        self._running: list[subprocess.Popen[str]] = []
        self._ready = False
        self._folder = scratch
        self.environment = dict(beside.environment)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def prepare(self, config: Config) -> None:
        """Writes the workers' config; they are started later."""
        if not self.environment and jax.default_backend() != "cpu":
            # The training has taken the memory of the device.
            self.environment = {"JAX_PLATFORMS": "cpu"}
        self._config = workdirs.config_file(config, self._scratch)
        self._folder = refresh_index.folder(config, self._scratch)

    def switch(self, condition: str, loop: LoopState) -> None:
        """Starts the workers or lets them go on, or makes them stand still.

        Raises:
          UserError: one has ended.
        """
        if condition == _BESIDE and not self._running:
            self._start()
        elif condition == _BESIDE:
            self._signal(signal.SIGCONT)
        else:
            self._wait_until_ready()
            self._signal(signal.SIGSTOP)

    def _start(self) -> None:
        flags = [f"--config={self._config}", f"--workdir={self._scratch}"]
        env = children.environment(self._scratch / ".cache" / "jax", self.environment)
        for _ in range(self._beside.workers):
            process = children.started(
                [_MODULE, *flags], log=self._log, env=env, cpus=self._cpus
            )
            self._running.append(self._stack.enter_context(process))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running:
            if process.poll() is not None:
                children.check([_MODULE], process, self._log)
                raise UserError(f"a worker has ended: see {self._log}")
            process.send_signal(number)

    def _wait_until_ready(self) -> None:
        """Returns when a first shard was embedded: all is compiled by then."""
        until = time.monotonic() + _READY_SECONDS
        while not self._ready:
            self._signal(signal.SIGCONT)
            vectors = [*self._folder.glob("building/*/vectors-*.npy")]
            steps_made = [p.name for p in self._folder.glob("versions/step-*")]
            self._ready = bool(vectors) or max(steps_made, default="") > "step-00000000"
            if time.monotonic() > until:
                raise UserError(
                    f"no worker has embedded a shard in {_READY_SECONDS:g} s; see"
                    f" {self._log}, or lower config.refresh.shard_rows"
                )
            time.sleep(_POLL_SECONDS)


def _report(
    config: Config,
    alternation: Alternation,
    *,
    swaps: int,
    cpus: tuple[Sequence[int], Sequence[int]],
    settings: JsonDict,
) -> Report:
    alone, both = (alternation.seconds[name] for name in (_ALONE, _BESIDE))
    unjudged = ""
    if not cpus[0]:
        unjudged = "there is one core alone, which training and workers share"
    elif not swaps:
        unjudged = "no refreshed index came into use; raise --steps or lower the corpus"
    where = [", ".join(map(str, part)) or "all" for part in cpus]
    return Report(
        title="A REALM step with refresh workers beside it",
        series=[
            Series(f"step, {_ALONE}", "s", alone),
            Series(f"step, {_BESIDE}", "s", both),
            Series(
                "with over without",
                "ratio",
                report.ratio(both, alone),
                at_most=TARGET,
                unjudged=unjudged,
            ),
        ],
        settings={
            **settings,
            "swaps": swaps,
            "training_cpus": list(cpus[0]),
            "worker_cpus": list(cpus[1]),
            "batch_size": config.train.batch_size,
            "model": config_lib.as_dict(config.model),
            "refresh": config_lib.as_dict(config.refresh),
        },
        notes=[
            f"the training on CPUs {where[0]}; workers ({settings['workers']}) on CPUs"
            f" {where[1]}{_words(settings['worker_environment'])}; a refreshed index"
            f" came into use {swaps} times"
        ],
    )


def _words(environment: Mapping[str, str]) -> str:
    return "".join(f" {name}={value}" for name, value in environment.items())
