"""What becomes of a step that went wrong: it is skipped, or the training stops.

Either way it is written down in ``bad_steps.jsonl``, with the batch that it took. The
device has left its update out by then (see `guard`), so nothing has to be undone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

from realm_retro import disk
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import Values, cut_after
from realm_retro.typing import HostArray, JsonDict

FILE = "bad_steps.jsonl"

_REMEDY = (
    "lower config.optimizer.peak_learning_rate or lengthen"
    " config.optimizer.warmup_steps under another --config.name"
)
# What the step tells of itself that is no metric.
_NOTES = ("bad_in_a_row", "loss_limit")


class BadSteps:
    """Looks at the metrics of each step, in order, as soon as the host has them."""

    def __init__(
        self,
        run_dir: epath.Path,
        config: TrainConfig,
        examples: Callable[[int], Mapping[str, HostArray]] | None,
        *,
        resumed_at: int,
        report: Callable[[str], None],
    ):
        """Forgets what an interrupted run noted beyond its checkpoint.

        Args:
          run_dir: the folder of the run.
          config: what is done about them.
          examples: as `Recipe.examples`.
          resumed_at: the step of the checkpoint; steps after it will come again.
          report: takes one line for each step that is skipped.
        """
        self._path = run_dir / FILE
        self._config = config
        self._examples = examples
        self._report = report
        if hosts.is_main():
            cut_after(self._path, resumed_at)

    def judge(self, step: int, values: Values) -> Values:
        """What counts of a step: its metrics, or nothing if it was skipped.

        Args:
          step: number of the step, from 1.
          values: name → [sum, weight], as `make_train_step` says.

        Raises:
          UserError: training has to stop. All processes find the same.
        """
        in_a_row = int(values["bad_in_a_row"][0])
        whole = math.isfinite(values["weight_norm"][0])
        if whole and not in_a_row:
            return {name: x for name, x in values.items() if name not in _NOTES}
        what = _what(values)
        most = self._config.max_bad_steps
        skips = self._config.on_bad_step == "skip" and whole and in_a_row < most
        self._note(step, what, values, "skipped" if skips else "stopped")
        if skips:
            self._report(
                f"step {step}: {what}: skipped, nothing was learnt from it; its batch"
                f" is in {self._path}"
            )
            return {}
        raise UserError(
            f"step {step}: {what}, so training stopped; the last good checkpoint is"
            f" kept, the batch is in {self._path}; {self._remedy(whole, in_a_row)}"
        )

    def _remedy(self, whole: bool, in_a_row: int) -> str:
        if not whole:
            return _REMEDY
        if self._config.on_bad_step == "stop":
            return (
                f"{_REMEDY}, or set config.train.on_bad_step=skip to go on without it"
            )
        return (
            f"no step of the last {in_a_row} was good"
            f" (config.train.max_bad_steps={self._config.max_bad_steps}): {_REMEDY}"
        )

    def _note(self, step: int, what: str, values: Values, then: str) -> None:
        if not hosts.is_main():
            return
        examples = self._examples(step - 1) if self._examples else {}
        record: JsonDict = {
            "step": step,
            "reason": what,
            "then": then,
            "loss": _number(_mean(values["loss"])),
            "loss_limit": _number(values["loss_limit"][0]),
            "grad_norm": _number(values["grad_norm"][0]),
            "weight_norm": _number(values["weight_norm"][0]),
            "examples": {name: np.asarray(x).tolist() for name, x in examples.items()},
        }
        with disk.named_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _what(values: Values) -> str:
    norm = values["weight_norm"][0]
    if not math.isfinite(norm):
        return f"the weights have exploded (weight_norm is {norm})"
    loss, limit = _mean(values["loss"]), values["loss_limit"][0]
    found = {"loss": loss, "grad_norm": values["grad_norm"][0]}
    found["the weight of the loss"] = values["loss"][1]
    for name, value in found.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    return f"loss is {loss:.4g}, above {limit:.4g} (config.train.max_loss_ratio)"


def _mean(pair: HostArray) -> float:
    total, weight = pair.tolist()
    return total / weight if weight > 0 else total


def _number(value: float) -> float | str:
    # JSON has no name for what is not finite.
    return float(value) if math.isfinite(value) else str(float(value))
