"""What a run tells of itself: a line, a JSON record and TensorBoard at once."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tensorboardX import SummaryWriter

from realm_retro import disk
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Recipe
from realm_retro.train.step import Metrics
from realm_retro.typing import HostArray, JsonDict

FILE = "metrics.jsonl"
# Metrics of one step on the host: name → float64 [sum, weight].
Values: TypeAlias = dict[str, HostArray]

# Dense bfloat16 peak of one device, FLOP/s, by the start of JAX's device_kind. From the
# makers' data sheets: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's A100,
# H100 and H200 data sheets (without sparsity). First match wins.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one device; None where the table does not know it (CPUs)."""
    for prefix, peak in PEAK_FLOPS.items():
        if device_kind.startswith(prefix):
            return peak
    return None


class Meter:
    """Adds the metrics of steps up and reports them every so often.

    Sums and weights are added over the steps of a record before they are divided,
    so a record is the mean over tokens. A step that was left out has no part in it;
    where no step of a record counts, it waits for the next one.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        config: TrainConfig,
        *,
        judge: Callable[[int, Values], Values],
        report: Callable[[JsonDict], None],
    ):
        """Prepares the first record.

        Args:
          recipe: for its tokens and operations of a step.
          mesh: the devices that the work is spread over.
          config: how many steps there are and how often a record ends; the last step
            ends one too.
          judge: step and its metrics → those that count, none of a step that is left
            out; raises what ends the training.
          report: takes each record.
        """
        self._recipe = recipe
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * mesh.devices.size
        self._config = config
        self._judge = judge
        self._report = report
        self._sums: Values = {}
        self._count = 0
        self._since = 0.0

    def start(self) -> None:
        """Starts the clock, unless it runs: call it when the step was compiled."""
        self._since = self._since or time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Fetches the metrics of one step, waiting for it if need be.

        Args:
          step: number of the step, from 1.
          metrics: name → (sum, weight) on the devices.
        """
        values = {
            k: np.array(v, np.float64) for k, v in jax.device_get(metrics).items()
        }
        skipped = int(values.pop("skipped")[0])
        for name, pair in self._judge(step, values).items():
            self._sums[name] = self._sums.get(name, 0.0) + pair
        self._count += 1
        ends = step % self._config.log_every == 0 or step == self._config.steps
        if ends and self._sums:
            self._report(self._record(step, skipped))

    def _record(self, step: int, skipped: int) -> JsonDict:
        now = time.perf_counter()
        seconds = (now - self._since) / self._count
        means = {k: float(s / w) if w else 0.0 for k, (s, w) in self._sums.items()}
        record = {
            "step": step,
            **means,
            "tokens": step * self._recipe.tokens_per_step,
            "tokens_per_second": self._recipe.tokens_per_step / seconds,
            "seconds_per_step": seconds,
            "skipped": skipped,  # since the start of the run
        }
        if self._peak and self._recipe.flops_per_step:
            record["mfu"] = self._recipe.flops_per_step / seconds / self._peak
        self._sums, self._count, self._since = {}, 0, now
        return record


class MetricsLog:
    """``metrics.jsonl`` and ``tensorboard/`` of a run; a context manager."""

    def __init__(self, run_dir: epath.Path, *, resumed_at: int):
        """Opens both, and forgets what an interrupted run logged beyond its checkpoint.

        Args:
          run_dir: the folder of the run.
          resumed_at: the step of the checkpoint; records after it will come again.
        """
        self._path = run_dir / FILE
        cut_after(self._path, resumed_at)
        self._file = self._path.open("a")
        self._board_dir = str(run_dir / "tensorboard")
        self._board = self._open_board(resumed_at + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        with disk.named_errors(self._path):
            try:
                self._file.close()
            finally:
                self._board.close()

    def _open_board(self, step: int) -> SummaryWriter:
        """A new file for TensorBoard, which forgets what it has of `step` and later."""
        before = set(threading.enumerate())
        # An endless queue: where the disk is full its thread dies, and a full one
        # would be waited for for ever. `write` meets the same error.
        board = SummaryWriter(
            self._board_dir,
            purge_step=step,
            max_queue=0,
            # Else files that are opened within a second have the same name.
            filename_suffix=f".{step}",
        )
        self._board_threads = set(threading.enumerate()) - before
        return board

    def write(self, record: Mapping[str, float]) -> None:
        """Writes one record, at once, so that a killed run keeps it.

        Raises:
          OSError: the disk is full.
        """
        with disk.named_errors(self._path):
            if not all(thread.is_alive() for thread in self._board_threads):
                # It died of the disk. What it was handed since is in the file alone.
                self._board.close()
                self._board = self._open_board(int(record["step"]))
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))
            self._board.flush()


def format_line(record: Mapping[str, float], steps: int) -> str:
    """One line for a person: where the run is, how good, how fast, how long still."""
    shown = {"step", "loss", "grad_norm", "learning_rate", "tokens"}
    shown |= {"tokens_per_second", "seconds_per_step", "mfu", "weight_norm"}
    if not record.get("skipped"):
        shown.add("skipped")
    seconds = record["seconds_per_step"]
    mfu = f"{record['mfu']:.1%}" if "mfu" in record else "–"
    parts = [
        f"step {int(record['step'])}/{steps}",
        f"loss {record['loss']:.3f}",
        *(f"{k} {v:.4g}" for k, v in record.items() if k not in shown),
        f"lr {record['learning_rate']:.1e}",
        f"grad {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{seconds * 1000:,.0f} ms/step",
        f"MFU {mfu}",
        f"left {format_seconds((steps - record['step']) * seconds)}",
    ]
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """``1h02m``, ``1m15s`` or ``9s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def cut_after(path: epath.Path, step: int) -> None:
    """Forgets the records of steps after `step` in a file of JSON lines.

    A kill can leave half a line at the end; like any later record, it goes.
    """
    if not disk.there(path):
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        with disk.replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return math.inf
