"""What a model hands to the training loop: a record of functions, no base class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from etils import epath

from realm_retro.parallel.axes import Names
from realm_retro.train.state import TrainState
from realm_retro.typing import Array, Batch, HostArray, PyTree

# (sum, weight), float32 scalars; a mean is taken once, over all that was summed.
Mean: TypeAlias = tuple[Array, Array]
LossFn: TypeAlias = Callable[
    [PyTree, Batch, Array], tuple[Array, Array, Mapping[str, Mean]]
]


@dataclasses.dataclass(frozen=True)
class LoopState:
    """What a hook sees after a step was dispatched.

    Attributes:
      step: how many steps were dispatched since the start of the run.
      state: their result, which the device may still be computing. The next step
        takes its memory: a hook copies what it wants to keep before it returns.
      run_dir: the folder of the run.
    """

    step: int
    state: TrainState
    run_dir: epath.Path


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
        the step, called ahead of time in another thread.
      batch_spec: name → logical axes of each array of the batch.
      tokens_per_step: tokens of a global batch, for the rates.
      flops_per_step: floating point operations of a step by formula (forward and
        backward), for the utilisation; 0 where unknown.
      fingerprint: of the artefacts that batches are made of; a run is continued only
        on the same.
      trainable: parameters → tree of bools; all are trained where it is None.
      hooks: called in turn after each step, in the loop's own thread.
    """

    description: str
    init: Callable[[Array], PyTree]
    loss: LossFn
    batch_at: Callable[[int], Mapping[str, HostArray]]
    batch_spec: Mapping[str, Names]
    tokens_per_step: int
    flops_per_step: float
    fingerprint: str
    trainable: Callable[[PyTree], PyTree] | None = None
    hooks: tuple[Callable[[LoopState], None], ...] = ()
