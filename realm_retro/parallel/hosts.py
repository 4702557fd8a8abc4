"""Several processes as one program: start-up, who writes, and agreement."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from realm_retro.errors import UserError
from realm_retro.typing import Array, HostArray, PyTree

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
NUM_PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_ID = "JAX_PROCESS_ID"


def initialise(
    *, detect: bool = False, environ: Mapping[str, str] | None = None
) -> None:
    """Joins the other processes of a run; call it before anything touches a device.

    A no-op for a single process, that is where neither asks for more:

    * ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
      ``JAX_PROCESS_ID`` in the environment, all three; or
    * `detect`: JAX finds them itself on TPU pods (GKE's too), Slurm and Open MPI.

    Args:
      detect: let JAX ask the cluster.
      environ: variables to read instead of the process's own.

    Raises:
      UserError: only some of the variables are set, or they are not numbers; or there
        is no cluster to ask.
    """
    environ = os.environ if environ is None else environ
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    missing = [name for name in names if not environ.get(name)]
    if not missing:
        try:
            count, index = int(environ[NUM_PROCESSES]), int(environ[PROCESS_ID])
        except ValueError:
            raise UserError(
                f"{NUM_PROCESSES}={environ[NUM_PROCESSES]!r},"
                f" {PROCESS_ID}={environ[PROCESS_ID]!r}: set both to whole numbers"
            ) from None
        jax.distributed.initialize(environ[COORDINATOR], count, index)
    elif detect:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                f"--distributed: JAX finds no cluster here ({error}); set"
                f" {', '.join(names)} instead, or leave it out for a single process"
            ) from None
    elif len(missing) < len(names):
        raise UserError(
            f"{', '.join(missing)} not set in the environment; set {', '.join(names)}"
            " together, or none of them for a single process"
        )


def together() -> bool:
    """Whether this process joined others; unlike the rest, it touches no device."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that writes logs and manifests."""
    return jax.process_index() == 0


def main_only(report: Callable[[str], Any]) -> Callable[[str], Any]:
    """`report` in the main process; what says nothing in the others."""
    return report if is_main() else lambda line: None


def barrier(name: str) -> None:
    """Waits until all processes have reached the point called `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The block runs in process 0, then in the others, which find what it made.

    Args:
      name: as of `barrier`, of which this is one.
    """
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def broadcast(value: PyTree) -> PyTree:
    """Process 0's value, on every process.

    Args:
      value: a tree of numbers or numpy arrays, of the same structure, shapes and
        dtypes everywhere.
    """
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(value)


def gather(value: HostArray) -> HostArray:
    """Every process's value, bit for bit, ``[processes, *shape]``, on every process.

    Args:
      value: of any dtype; of the same shape and dtype everywhere.
    """
    if jax.process_count() == 1:
        return value[None]
    # As bytes: JAX would cut 64-bit numbers. Few lengths: each is a program of its own.
    data = np.frombuffer(value.tobytes(), np.uint8)
    padded = np.zeros(1 << max(len(data) - 1, 0).bit_length(), np.uint8)
    padded[: len(data)] = data
    parts = multihost_utils.process_allgather(padded)
    whole = np.ascontiguousarray(np.asarray(parts)[:, : len(data)])
    return whole.view(value.dtype).reshape(len(parts), *value.shape)


def to_global(value: HostArray, sharding: NamedSharding) -> Array:
    """Moves a global host array to the devices, each process its own rows only.

    Args:
      value: the whole array, equal on every process; its first axis is cut as
        `sharding` says, the others are whole.
      sharding: where the rows go.
    """
    rows = local_rows(sharding, value.shape)
    return jax.make_array_from_process_local_data(sharding, value[rows], value.shape)


def readable(x: Array | HostArray) -> Array | HostArray:
    """What `np.asarray` takes on every process, which all call this; maybe no copy.

    Dispatched like any other work of the devices, and not waited for.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))


def share_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether some row (first axis) lies on devices of several processes."""
    owners: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        first = index[0].indices(shape[0])[0] if index else 0
        owners.setdefault(first, set()).add(device.process_index)
    return any(len(processes) > 1 for processes in owners.values())


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> HostArray | slice:
    """The rows (first axis) that this process's devices hold, ascending."""
    if jax.process_count() == 1:
        return slice(None)
    everywhere = sharding.addressable_devices_indices_map(shape)
    rows = [np.arange(shape[0])[index[0]] for index in everywhere.values() if index]
    return np.unique(np.concatenate(rows))


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields ``asked_to_stop(step)``: whether SIGTERM came, the same on every host.

    One process looks at its own signal. Several must agree on the step at which they
    stop, or some would wait in a collective for ever: JAX's coordinator does that.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    # Python takes signals in the main thread only; elsewhere there is none to catch.
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
