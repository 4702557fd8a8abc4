"""What a model hands to the training loop: a record of functions, no base class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from etils import epath

from realm_retro.parallel.axes import Names
from realm_retro.train.state import TrainState
from realm_retro.typing import Array, Batch, HostArray, JsonDict, PyTree

# (sum, weight), float32 scalars; a mean is taken once, over all that was summed.
Mean: TypeAlias = tuple[Array, Array]
LossFn: TypeAlias = Callable[
    [PyTree, Batch, Array], tuple[Array, Array, Mapping[str, Mean]]
]


@dataclasses.dataclass(frozen=True)
class LoopState:
    """What a hook sees after a step was dispatched, and where a run goes on.

    Attributes:
      step: how many steps were dispatched since the start of the run.
      state: their result, which the device may still be computing. The next step
        takes its memory: a hook copies what it wants to keep before it returns.
      run_dir: the folder of the run.
      should_stop: whether SIGTERM came. A hook that waits for something asks while it
        waits, and returns when it is so. Every process has to ask equally often.
    """

    step: int
    state: TrainState
    run_dir: epath.Path
    should_stop: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Live:
    """Batches that depend on the weights: retrieval in the loop.

    A batch is made in three parts, so that the slow one can run beside a step and its
    result, which is small, can be saved with a checkpoint.

    Attributes:
      depth: 0: a batch is looked up with the weights of its own step, and the device
        waits meanwhile. 1: with the weights of the step before, while the device takes
        that step. Both are functions of (seed, step) alone.
      ask: (step from 0, parameters) → what `find` takes. Dispatches device work and
        returns at once; the parameters are gone after the next step.
      find: (step, asked) → what was found, as JSON values. Waits for the device; called
        in another thread where `depth` is 1.
      batch: (step, found) → the global batch as host arrays, as `Recipe.batch_at`.
      carry: → JSON values to be saved with a checkpoint (which index is in use).
      resume: takes what `carry` gave, before the first `ask`.
    """

    depth: int
    ask: Callable[[int, PyTree], Any]
    find: Callable[[int, Any], JsonDict]
    batch: Callable[[int, JsonDict], Mapping[str, HostArray]]
    carry: Callable[[], JsonDict]
    resume: Callable[[JsonDict], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train one model.

    Attributes:
      description: one line for the log: which model, how many parameters.
      init: key → parameters boxed with their axis names. Traced.
      loss: (parameters, batch, key) → (summed loss, weight, further metrics as
        name → (sum, weight)). Traced, differentiated, and called on any piece of a
        batch: it must not divide by counts of its own.
      batch_at: step (from 0) → the global batch as host arrays. A pure function of
        the step, called ahead of time in another thread. Or a `Live`.
      batch_spec: name → logical axes of each array of the batch.
      tokens_per_step: tokens of a global batch, for the rates.
      flops_per_step: floating point operations of a step by formula (forward and
        backward), for the utilisation; 0 where unknown.
      fingerprint: of the artefacts that batches are made of; a run is continued only
        on the same.
      trainable: parameters → tree of bools; all are trained where it is None.
      hooks: called in turn after each step, in the loop's own thread; once more where a
        run goes on, with the step of its checkpoint and before the next one.
      weights: → parameters to start from in place of `init`'s, unboxed host or device
        arrays; not traced, so that a checkpoint is not written into the program.
      shared: (step from 0, parameters) → arrays on the devices that every batch has
        besides its own, such as the index.
      examples: step (from 0) → what tells the rows of its batch from each other, arrays
        ``[rows, …]``: windows, passages, questions. For the record of a bad step.
    """

    description: str
    init: Callable[[Array], PyTree]
    loss: LossFn
    batch_at: Callable[[int], Mapping[str, HostArray]] | Live
    batch_spec: Mapping[str, Names]
    tokens_per_step: int
    flops_per_step: float
    fingerprint: str
    trainable: Callable[[PyTree], PyTree] | None = None
    hooks: tuple[Callable[[LoopState], None], ...] = ()
    weights: Callable[[], PyTree] | None = None
    shared: Callable[[int, PyTree], Mapping[str, Array]] | None = None
    examples: Callable[[int], Mapping[str, HostArray]] | None = None


def no_batches(step: int) -> Mapping[str, HostArray]:
    """Stands for `Recipe.batch_at` in a recipe that is only planned, not trained.

    Raises:
      ValueError: always.
    """
    raise ValueError(f"step {step}: this recipe was made without data")
