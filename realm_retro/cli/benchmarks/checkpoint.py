"""Suite ``checkpoint``: how long a save holds the training up, and a resume takes.

A training saves after every other block of steps. The block that begins with a save is
compared with the one after it: its first step shows how long the loop stood still, the
whole block what the writing in the background costs as well.

Then the command ``train`` is started again and again on what was saved, each time in a
process and on a copy of its own, and listened to until it has taken the next step.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli import common
from realm_retro.cli.benchmarks import children, steps, workdirs
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.cli.benchmarks.steps import Alternation
from realm_retro.train import checkpoint
from realm_retro.train.recipe import LoopState, Recipe
from realm_retro.typing import Config

_SAVING, _NOT_SAVING = "after a save", "no save"
SUITE = "checkpoint"


def measure(
    config: Config, workdir: epath.Path, *, num_steps: int, rounds: int
) -> Report:
    """Runs the suite.

    Args:
      config: of any training.
      workdir: its artefacts are used, or made.
      num_steps: steps of a block; more than are taken while a checkpoint is written.
      rounds: saves, and as many resumes.

    Raises:
      UserError: a stage, the training or a resume failed.
    """
    workdirs.complete(config, workdir)
    log = workdirs.log_file(workdir, SUITE)
    saved = _Saved(num_steps)
    alternation = Alternation(
        (_SAVING, _NOT_SAVING),
        steps=num_steps,
        rounds=rounds,
        # The last save; then what each resume has to do again.
        after=1,
        each_step=True,
        switch=saved.look,
    )
    config = _changed(config, alternation)
    with workdirs.scratch(workdir) as scratch:
        wrap = functools.partial(_wrap, alternation=alternation)
        run_dir = steps.run(config, scratch, wrap)
        saved.on_disk = workdirs.size(
            run_dir / checkpoint.FOLDER / str(alternation.total)
        )
        workdirs.config_file(config, scratch)
        resumes = [
            _resume(scratch, workdir, alternation.last, log)
            # The first one compiles.
            for _ in range(rounds + 1)
        ][1:]
    return _report(config, alternation, saved, resumes)


def _changed(config: Config, alternation: Alternation) -> Config:
    last = alternation.last
    warmup = int(config.optimizer.get("warmup_steps", last))
    saving = {"steps": last, "checkpoint_every": 2 * alternation.block}
    return workdirs.changed(
        config,
        name=workdirs.NAME,
        train=steps.settings(config, last, **saving),
        optimizer={"warmup_steps": min(warmup, last)},
    )


def _wrap(recipe: Recipe, mesh: Mesh, alternation: Alternation) -> Recipe:
    return dataclasses.replace(recipe, hooks=(*recipe.hooks, alternation))


@dataclasses.dataclass
class _Saved:
    """What is saved, and whether it was whole in time.

    Attributes:
      block: steps of a block.
      on_devices: bytes of the state.
      on_disk: bytes of a checkpoint.
      late: saves that were still being written when their block was over.
    """

    block: int
    on_devices: int = 0
    on_disk: int = 0
    late: int = 0

    def look(self, condition: str, loop: LoopState) -> None:
        """Called between two blocks."""
        self.on_devices = sum(leaf.nbytes for leaf in jax.tree.leaves(loop.state))
        step = loop.step - self.block
        if condition == _NOT_SAVING and step:
            # A checkpoint has its name when it is whole.
            self.late += not (loop.run_dir / checkpoint.FOLDER / str(step)).exists()


def _resume(
    scratch: epath.Path, workdir: epath.Path, last: int, log: epath.Path
) -> tuple[float, float]:
    """Seconds from the command to the restored state, and to the next step's end."""
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=workdir) as folder:
        copy = epath.Path(folder) / "copy"
        workdirs.clone(scratch, copy)
        lines = children.timeline(
            [
                "realm_retro.cli.train",
                f"--config={copy / 'config.py'}",
                f"--workdir={copy}",
            ],
            log=log,
            env=children.environment(scratch / ".cache" / "jax"),
        )
    restored = children.first(lines, "going on from step")
    stepped = children.first(lines, f"step {last}/{last}")
    common.say(f"resumed in {stepped:.1f} s, {restored:.1f} s of it to the state")
    return restored, stepped


def _report(
    config: Config,
    alternation: Alternation,
    saved: _Saved,
    resumes: Sequence[tuple[float, float]],
) -> Report:
    single = alternation.single
    pairs = list(zip(single[_SAVING], single[_NOT_SAVING], strict=True))
    restored, stepped = zip(*resumes, strict=True)
    notes = []
    if saved.late:
        notes.append(
            f"{saved.late} saves were still being written when their block was over:"
            " their cost is too small here; raise --steps"
        )
    return Report(
        title="Saving and resuming",
        series=[
            Series(f"step, {_NOT_SAVING}", "s", alternation.seconds[_NOT_SAVING]),
            Series(
                "save: the loop stands still",
                "s",
                [with_save[0] - statistics.median(rest) for with_save, rest in pairs],
            ),
            Series(
                "save: with its writing in the background",
                "s",
                [sum(with_save) - sum(rest) for with_save, rest in pairs],
            ),
            Series("resume: until the state is restored", "s", restored),
            Series("resume: until the next step is taken", "s", stepped),
            Series("state on the devices", "MB", [saved.on_devices / 1e6]),
            Series("checkpoint on disk", "MB", [saved.on_disk / 1e6]),
        ],
        settings={
            "steps_of_a_block": alternation.block,
            "late_saves": saved.late,
            "batch_size": config.train.batch_size,
            "model": config_lib.as_dict(config.model),
        },
        notes=[
            *notes,
            "a resume is a new process: start, imports, checks, programs from the"
            " compilation cache, state from a disk whose cache is warm",
        ],
    )
