"""Checkpoints by Orbax: written beside the training, restored onto any mesh.

A checkpoint is a folder named by its step with three items: ``params``, ``opt_state``
and ``meta`` (JSON). They are apart so that evaluation reads the weights alone. Orbax
writes a folder under another name, or without its mark of success, until it is whole,
and does not see such a folder again: a half-written checkpoint is never restored.

Beside what the training wants to know again, ``meta`` holds the sums of all arrays
(`realm_retro.train.sums`), the fingerprint of the run's settings, and its own checksum:
a changed number and another run's checkpoint are refused.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from realm_retro import artifacts, disk
from realm_retro.errors import UserError
from realm_retro.train import guard, sums
from realm_retro.train import state as states
from realm_retro.train.state import TrainState
from realm_retro.typing import Array, JsonDict, PyTree

FOLDER = "checkpoints"
# Of `meta`, beside what the training wants to know again. The state's few scalars lie
# there too.
_SUMS, _RUN, _HEALTH = "sums", "run", "health"


class Checkpoints:
    """The checkpoints of one run; a context manager that ends with all written."""

    def __init__(self, run_dir: epath.PathLike, *, keep: int | None = None):
        """Opens the folder.

        Args:
          run_dir: the folder of the run.
          keep: how many of the newest stay; None opens it for reading only.
        """
        _hush_threads()
        self._run = artifacts.request_of(run_dir)
        self.directory = epath.Path(run_dir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                create=keep is not None,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        with _disk_errors(self.directory):
            self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def prepare(self, state: TrainState) -> None:
        """Compiles what `save` computes, so that no later step waits for it."""
        _sums_of(state)

    def save(self, step: int, state: TrainState, meta: JsonDict) -> None:
        """Copies the state off the devices and writes it in the background.

        On return the state may be donated. An error of an earlier write is raised
        by a later call.

        Args:
          step: the state's step.
          state: what to save; each host writes its own shards.
          meta: what else a later run wants to know.
        """
        meta = {
            **meta,
            _SUMS: _sums_of(state),
            _RUN: self._run,
            _HEALTH: guard.as_meta(state.health),
        }
        with _disk_errors(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(artifacts.seal(meta)),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Returns when all is on the disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, JsonDict]:
        """Reads one checkpoint, whatever mesh it was written from.

        Args:
          step: one that exists.
          abstract: the shapes, dtypes and shardings wanted.

        Raises:
          UserError: it is damaged, or of another model or run.
        """
        with self._reading(step):
            self._check_model(step, abstract.params)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    opt_state=ocp.args.StandardRestore(abstract.opt_state),
                    meta=ocp.args.JsonRestore(),
                ),
            )
            meta = self._checked(step, found, ("params", "opt_state"))
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        health = guard.from_meta(meta.pop(_HEALTH, None), abstract.health)
        return TrainState(count, found["params"], found["opt_state"], health), meta

    def restore_params(self, step: int, abstract: PyTree) -> PyTree:
        """Reads the weights alone; see `restore`."""
        with self._reading(step):
            self._check_model(step, abstract)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract),
                    meta=ocp.args.JsonRestore(),
                ),
            )
            self._checked(step, found, ("params",))
        return found["params"]

    def parts(self, step: int) -> tuple[str, ...]:
        """Names of the first level of the weights."""
        with self._reading(step):
            return tuple(self._manager.item_metadata(step)["params"].tree)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        path = self.directory / str(step)
        try:
            with disk.named_errors(path):
                yield
        except UserError:
            raise
        except Exception as error:
            # Orbax wraps what the storage library raises in a bare Exception.
            found = error.__cause__ if type(error) is Exception else error
            if not disk.tells_damage(found or error):
                raise
            reason = " ".join(str(found).split())[:300]
            raise UserError(
                f"{path}: cannot be read, it is damaged; delete it to go on from the"
                f" checkpoint before it ({reason})"
            ) from error

    def _checked(self, step: int, found: Any, names: Sequence[str]) -> JsonDict:
        """The meta of what was read, if it is what was saved, and by this run."""
        meta = dict(found["meta"])
        if not artifacts.is_intact(meta):
            raise ValueError("the checksum of meta differs")
        # Checkpoints of earlier releases have none of these.
        meta.pop(artifacts.CHECKSUM, None)
        before, run = meta.pop(_SUMS, {}), meta.pop(_RUN, None)
        if None not in (run, self._run) and run != self._run:
            raise UserError(
                f"{self.directory / str(step)}: was saved by a run with other settings"
                " or data; delete it, or name its own run with --config.name"
            )
        for name in names:
            if wrong := sums.changed(before.get(name, {}), sums.of(found[name])):
                raise ValueError(f"the numbers of {name}{wrong[0]} differ")
        return meta

    def _check_model(self, step: int, abstract: PyTree) -> None:
        there = _shapes(self._manager.item_metadata(step)["params"].tree)
        here = _shapes(abstract)
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"{self.directory / str(step)}: is of another model: {name} has"
                    f" shape {there.get(name)} there, {here.get(name)} here; use the"
                    " config.model of its training, or another --config.name"
                )


def restore_params(
    run_dir: epath.PathLike,
    init: Callable[[Array], PyTree],
    mesh: Mesh,
    *,
    step: int | None = None,
) -> tuple[PyTree, int]:
    """The trained weights of a run, laid out over `mesh`.

    Args:
      run_dir: the folder of the run.
      init: key → boxed parameters, as `Recipe.init`; only traced.
      mesh: where they shall lie; not necessarily that of the training.
      step: which checkpoint; the newest where it is None.

    Returns:
      (weights, step).

    Raises:
      UserError: there is no such checkpoint, or it does not fit `init`.
    """
    directory = epath.Path(run_dir) / FOLDER
    again = "run: python -m realm_retro.cli.train"
    if not disk.there(directory):
        raise UserError(f"{directory}: there is no checkpoint; {again}")
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None or not disk.there(directory / str(step)):
            which = "no whole checkpoint" if step is None else f"no checkpoint {step}"
            raise UserError(f"{directory}: there is {which}; {again}")
        abstract = states.abstract_params(init, mesh)
        return checkpoints.restore_params(step, abstract), step


def parts(run_dir: epath.PathLike) -> tuple[str, ...]:
    """Names of the first level of a run's weights; none without a checkpoint."""
    if not disk.there(epath.Path(run_dir) / FOLDER):
        return ()
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.latest()
        return () if step is None else checkpoints.parts(step)


def _sums_of(state: TrainState) -> dict[str, dict[str, str]]:
    arrays = {"params": state.params, "opt_state": state.opt_state}
    return {name: sums.of(tree) for name, tree in arrays.items()}


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in leaves}


@contextlib.contextmanager
def _disk_errors(directory: epath.Path) -> Iterator[None]:
    # A full disk comes out of the storage library as an error of another kind.
    try:
        with disk.named_errors(directory):
            yield
    except Exception as error:
        if not _tells_full_disk(str(error)):
            raise
        raise UserError(
            f"{directory}: the disk is full; free space and run the same command again,"
            " it goes on from the last whole checkpoint"
        ) from error


def _tells_full_disk(text: str) -> bool:
    return "No space left" in text or "RESOURCE_EXHAUSTED" in text


@functools.cache
def _hush_threads() -> None:
    """Keeps the storage library's threads from telling of the disk's errors as well.

    Each of them writes a traceback, hundreds of lines in all, before `_disk_errors`
    says it in one. Files that were still being written then find the loop closed that
    waited for them.
    """

    def is_new(text: str, error: BaseException | None) -> bool:
        while error is not None:
            text = f"{text} {error}"
            error = error.__cause__ or error.__context__
        told = disk.error_code(Exception(text)) is not None
        told = told or _tells_full_disk(text)
        return not told and "Event loop is closed" not in text

    def from_log(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return is_new(record.getMessage(), error)

    def wrapped(hook: Callable[[Any], object]) -> Callable[[Any], None]:
        def tell(args: Any) -> None:
            if is_new("", args.exc_value):
                hook(args)

        return tell

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(from_log)
    threading.excepthook = wrapped(threading.excepthook)
    sys.unraisablehook = wrapped(sys.unraisablehook)
