"""The ``train`` section of a config."""

from __future__ import annotations

import dataclasses

from realm_retro.typing import JsonDict

# What changes how a run is watched and how its work is cut, but not the weights that
# come out (beyond rounding): an unfinished run may be continued with other values. What
# becomes of bad steps is free too: one that stopped may go on without them.
_FREE = ("accumulation", "log_every", "checkpoint_every", "keep")
_ON_BAD_STEPS = ("on_bad_step", "max_loss_ratio", "max_bad_steps")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, on what batches, and how often it is logged and saved.

    Attributes:
      steps: updates in the whole run; the learning rate ends here.
      batch_size: sequences of the global batch, over all devices and hosts.
      sequence_chunks: chunks of a sequence; read by the recipe.
      neighbours: retrieved neighbours of each chunk; read by the recipe.
      log_every: steps between two records of the metrics.
      checkpoint_every: steps between two checkpoints; the last step has one too.
      keep: how many checkpoints stay on disk.
      accumulation: pieces that each batch is computed in, one after the other, to
        save memory; the update is the same.
      on_bad_step: a bad step is one whose loss or gradient is not finite, or whose loss
        is beyond `max_loss_ratio`. Its update is never done. ``stop``: training ends
        with an error and the last good checkpoint; ``skip``: it goes on with the next
        batch. The batch is named in ``bad_steps.jsonl`` of the run.
      max_loss_ratio: how many times the running mean of the losses before it (but at
        least 1 nat) a loss may be; 0: any that is finite.
      max_bad_steps: with ``skip`` training ends too after so many bad steps in a row.
    """

    steps: int
    batch_size: int = 8
    sequence_chunks: int = 8
    neighbours: int = 2
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    accumulation: int = 1
    on_bad_step: str = "stop"
    max_loss_ratio: float = 100.0
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "neighbours" else 1
            if field.type == "int" and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{field.name}={value!r} must be at least {least}")
        if self.on_bad_step not in ("stop", "skip"):
            raise ValueError(f"on_bad_step={self.on_bad_step!r}; choose stop, skip")
        ratio = self.max_loss_ratio
        if ratio and not ratio > 1:
            raise ValueError(f"max_loss_ratio={ratio!r} must be above 1, or 0 for none")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut in accumulation="
                f"{self.accumulation} pieces; make it a multiple"
            )

    @property
    def decisive(self) -> JsonDict:
        """The settings that determine the weights: fixed for the life of a run."""
        free = (*_FREE, *_ON_BAD_STEPS)
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in free}
