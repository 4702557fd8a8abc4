import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import toy_processes

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


# Each of two processes on two devices says what it sees.
TOGETHER = """
import pathlib, sys, time
import jax, numpy as np
from realm_retro.errors import UserError
from realm_retro.parallel import axes, hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.realm import search

hosts.initialise()
me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
with hosts.main_first("a folder"):
    if hosts.is_main():
        time.sleep(0.5)
        (folder / "made").touch()
    print("made", (folder / "made").exists())
print("told", int(hosts.broadcast(np.int32(7 + me))))
hosts.main_only(print)("main")

def rows_on(count, *sizes):
    return axes.sharding(("batch",), (count,), make_mesh(MeshConfig(*sizes)))

here = np.arange(8, dtype=np.float32)
whole = hosts.to_global(here, rows_on(8, 4, 1, 1))
print("local", hosts.local_rows(whole.sharding, (8,)).tolist())
print("read", np.asarray(hosts.readable(whole)).tolist() == here.tolist())
for count, *sizes in ((8, 4, 1, 1), (8, 1, 2, 2), (8, 1, 1, 4), (3, 4, 1, 1)):
    print(sizes, hosts.share_rows(rows_on(count, *sizes), (count,)))
for sizes in ((2, 1, 2), (1, 1, 4)):
    mesh = make_mesh(MeshConfig(*sizes))
    print(sizes, search.backend_on(mesh, "auto", 8))
try:
    search.backend_on(mesh, "scann", 8)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_two_processes_see(tmp_path):
    every = toy_processes.environments(tmp_path, processes=2, devices=4)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in every
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    first, second = (
        [line for line in text.splitlines() if not line.startswith("[Gloo]")]
        for text in said
    )
    assert first.pop(2) == "main"
    assert first.pop(2) == "local [0, 1, 2, 3]"
    assert second.pop(2) == "local [4, 5, 6, 7]"
    assert first == second
    assert first[:-1] == [
        "made True",
        "told 7",
        "read True",
        "[4, 1, 1] False",
        "[1, 2, 2] False",
        "[1, 1, 4] True",
        "[4, 1, 1] True",  # three rows on four devices: each holds all
        "(2, 1, 2) auto",
        "(1, 1, 4) exact",
    ]
    assert first[-1].startswith("index=scann: with this config.mesh")
