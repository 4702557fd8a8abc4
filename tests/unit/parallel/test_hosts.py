import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from realm_retro.errors import UserError
from realm_retro.parallel import axes, hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh


def test_a_single_process_needs_nothing():
    hosts.initialise(environ={})
    assert hosts.is_main()
    hosts.barrier("here")
    assert hosts.broadcast({"a": 1}) == {"a": 1}


def test_half_an_environment_is_refused():
    environ = {hosts.COORDINATOR: "a:1", hosts.PROCESS_ID: "0"}
    with pytest.raises(UserError, match=r"^JAX_NUM_PROCESSES not set"):
        hosts.initialise(environ=environ)


def test_numbers_are_checked():
    environ = {
        hosts.COORDINATOR: "a:1",
        hosts.NUM_PROCESSES: "two",
        hosts.PROCESS_ID: "0",
    }
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two'"):
        hosts.initialise(environ=environ)


def test_to_global():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    value = np.arange(24, dtype=np.int32).reshape(8, 3)
    sharding = axes.sharding(("batch", None), value.shape, mesh)
    x = hosts.to_global(value, sharding)
    assert x.sharding == sharding
    assert x.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(x, value)


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.preemption() as asked_to_stop:
        assert not asked_to_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked_to_stop(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_preemption_in_another_thread_leaves_signals_alone():
    answers = []

    def work():
        with hosts.preemption() as asked_to_stop:
            answers.append(asked_to_stop(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_no_cluster_to_ask():
    # In a process of its own: this one has its devices already.
    script = (
        "from realm_retro.errors import UserError\n"
        "from realm_retro.parallel import hosts\n"
        "try:\n"
        "    hosts.initialise(detect=True)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    clusters = ("JAX_", "SLURM", "OMPI", "TPU", "PMI")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("--distributed: JAX finds no cluster here (")
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in (
        done.stdout
    )
