"""The flag of commands whose processes are one program."""

from __future__ import annotations

from absl import flags

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Let JAX find the other processes of this run by itself."
)
