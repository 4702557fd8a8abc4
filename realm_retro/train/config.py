"""The ``train`` section of a config."""

from __future__ import annotations

import dataclasses

# What changes how a run is watched and how its work is cut, but not the weights that
# come out (beyond rounding): an unfinished run may be continued with other values.
_FREE = ("accumulation", "log_every", "checkpoint_every", "keep")


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
    """

    steps: int
    batch_size: int = 8
    sequence_chunks: int = 8
    neighbours: int = 2
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    accumulation: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "neighbours" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name}={value!r} must be at least {least}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut in accumulation="
                f"{self.accumulation} pieces; make it a multiple"
            )

    @property
    def decisive(self) -> dict[str, int]:
        """The settings that determine the weights: fixed for the life of a run."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _FREE}
