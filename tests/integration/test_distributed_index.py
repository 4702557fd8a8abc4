"""An index spread over two processes on loopback finds what one index finds."""

import os
import socket
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import tiny_workdir
import toy_index as toy

from realm_retro.cli import build_index, find_neighbours
from realm_retro.parallel import hosts
from realm_retro.retrieval.neighbours import NeighbourTable

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

CONFIG = {
    "index": {"backend": "exact"},
    "neighbours": {"k": 3, "margin": 1, "batch_size": 32, "shard_size": 50},
}


def run_together(command, count=2):
    """Runs processes as one program; returns their outputs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        hosts.COORDINATOR: f"localhost:{port}",
        hosts.NUM_PROCESSES: str(count),
    }
    processes = [
        subprocess.Popen(
            command,
            env={**common, hosts.PROCESS_ID: str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("found")
    status, outputs = run_together([sys.executable, toy.__file__, str(folder)])
    assert status == [0, 0], outputs
    return [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


@pytest.mark.parametrize("name", toy.CASES)
def test_two_parts_are_one_index(found, name):
    whole = toy.index_of(name)
    *_, integers, k = toy.CASES[name]
    want = whole.search(toy.queries_of(name), k)
    assert {len(set(row)) for row in want.scores.tolist()} != {k} or not integers
    for process in found:
        np.testing.assert_array_equal(process[f"{name}/ids"], want.ids)
        scores = process[f"{name}/scores"]
        if integers:
            np.testing.assert_array_equal(scores, want.scores)
        else:
            np.testing.assert_allclose(scores, want.scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(process[f"{name}/all"], whole.ids)
    held = [process[f"{name}/held"] for process in found]
    assert sum(part for part, _ in held) == whole.size
    assert max(part for part, _ in held) <= whole.size // 2 + 1
    assert {total for _, total in held} == {whole.size}


@pytest.fixture
def workdir(tmp_path):
    tiny_workdir.write_chunks(tmp_path / "store", documents=40)
    workdir = tiny_workdir.link(tmp_path / "store", tmp_path)
    tiny_workdir.write_embeddings(workdir)
    return workdir


def test_neighbours_over_an_index_that_two_hold(workdir):
    config = ml_collections.ConfigDict(CONFIG)
    build_index.main(config, workdir)
    (workdir / "config.py").write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({CONFIG!r})\n"
    )
    command = [sys.executable, "-m", "realm_retro.cli.find_neighbours"]
    command += [f"--config={workdir}/config.py", f"--workdir={workdir}"]
    status, outputs = run_together(command)
    assert status == [0, 0], outputs
    assert "neighbours: " in outputs[0]
    assert "neighbours" not in outputs[1], "only the main process talks"
    together = NeighbourTable.open(workdir / "neighbours")
    # Each searched its part: none holds all.
    (workdir / "neighbours").rename(workdir / "together")
    find_neighbours.main(config, workdir)
    alone = NeighbourTable.open(workdir / "neighbours")
    np.testing.assert_array_equal(
        NeighbourTable.open(workdir / "together").ids[:], alone.ids[:]
    )
    np.testing.assert_allclose(
        NeighbourTable.open(workdir / "together").scores[:],
        alone.scores[:],
        atol=1e-4,
        rtol=0,
    )
    assert together.manifest.parents == alone.manifest.parents
    # What is finished is finished for all.
    status, outputs = run_together(command)
    assert status == [0, 0], outputs
    assert "finished already" in outputs[0]
