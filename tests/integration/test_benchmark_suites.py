"""Each suite on a tiny model: it ends, says what it found, leaves nothing behind."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import ml_collections
import pytest
import tiny_workdir
import toy_pretraining as toy
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import benchmark
from realm_retro.cli.benchmarks import machine

pytestmark = pytest.mark.slow


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Processes that compile fast rather than well, on one device."""
    for name, value in toy.quick(tmp_path).items():
        if name != "JAX_COMPILATION_CACHE_DIR":
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")


def run(suite, config, workdir, capsys, **given):
    """Runs a suite as the command does; its JSON, with series by name."""
    before = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    children = processes()
    with flagsaver.flagsaver(suite=suite, rounds=2, **given):
        benchmark.main(config, workdir)
    said = capsys.readouterr().out
    body = json.loads((workdir / "benchmarks" / f"{suite}.json").read_text())
    for series in body["series"]:
        assert series["name"] in said
        assert series["min"] <= series["median"] <= series["max"]
    for note in body["notes"]:
        assert note in said
    assert body["machine"]["versions"]["jax"] in said
    left = {path.name for path in workdir.iterdir()} - before
    assert not {name for name in left if name.startswith(".benchmark")}
    assert processes() <= children, "a process was left behind"
    return {series["name"]: series for series in body["series"]}, body


def processes(parent=None):
    """Living children of a process, of this one if None."""
    parent = str(parent or os.getpid())
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, of = path.read_text().rpartition(")")[2].split()[:2]
            if of == parent and state not in "ZX":
                found.add(path.parent.name)
    return found


@pytest.fixture
def realm(tmp_path, quick):
    toy.write_rivers(tmp_path, documents=60)
    config = toy.make_config(tmp_path, refresh={"lease_seconds": 5.0})
    return config, toy.prepared(config, epath.Path(tmp_path / "work"))


@pytest.fixture
def decoder(tmp_path, quick):
    """A plain decoder, which needs chunks alone."""
    workdir = epath.Path(tmp_path / "work")
    workdir.mkdir()
    tiny_workdir.write_chunks(workdir / "chunks", documents=60)
    sizes = {"vocab_size": 300, "chunk_length": 16, "num_layers": 1, "model_dim": 16}
    heads = {"num_heads": 2, "head_dim": 8, "ffw_dim": 32, "cca_layers": ()}
    config = {
        "name": "plain",
        "seed": 0,
        "model": {**sizes, **heads, "compute_dtype": "float32"},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 100},
        "train": {"steps": 6, "batch_size": 8, "sequence_chunks": 4, "neighbours": 0},
    }
    return ml_collections.ConfigDict(config), workdir


def test_retrieval(realm, capsys):
    config, workdir = realm
    found, body = run("retrieval", config, workdir, capsys, steps=2)
    share = found["retrieval's share of the step"]
    given = found["step, candidates given"]
    looked_up = found["step, candidates looked up one step ahead"]
    assert share["at_most"] == 0.1
    assert share["met"] == (share["median"] <= 0.1)
    for value, a, b in zip(
        share["values"], given["values"], looked_up["values"], strict=True
    ):
        assert value == pytest.approx((b - a) / b)
    parts = [name for name in found if name.split(":")[0] in ("mask", "embed")]
    assert len(parts) == 2
    assert all(len(series["values"]) == 2 for series in found.values())
    assert not (workdir / "refresh").exists()
    assert not (workdir / "runs").exists()
    assert body["settings"]["pretrain"]["refresh"] == "never"


def test_refresh(realm, capsys):
    config, workdir = realm
    # Long blocks: steps take milliseconds, a worker's version a second.
    found, body = run("refresh", config, workdir, capsys, steps=150)
    over = found["with over without"]
    assert over["at_most"] == 1.05
    assert body["settings"]["swaps"] > 0, "nothing was refreshed"
    if len(machine.cores()) > 1:
        assert over["met"] is not None
        mine, theirs = (body["settings"][f"{w}_cpus"] for w in ("training", "worker"))
        assert not set(mine) & set(theirs)
    log = (workdir / "benchmarks" / "refresh.log").read_text()
    assert "refresh: index of step" in log
    assert not (workdir / "refresh").exists()


def test_checkpoint(decoder, capsys):
    config, workdir = decoder
    found, _ = run("checkpoint", config, workdir, capsys, steps=40)
    assert found["save: the loop stands still"]["median"] > 0
    restored, stepped = (
        found[f"resume: until {what}"]["values"]
        for what in ("the state is restored", "the next step is taken")
    )
    assert all(a < b for a, b in zip(restored, stepped, strict=True))
    # Weights and two moments each, in float32.
    assert found["state on the devices"]["median"] > 3 * 300 * 16 * 4 / 1e6
    assert found["checkpoint on disk"]["median"] > 0
    assert not (workdir / "runs").exists()


def test_startup(decoder, capsys):
    config, workdir = decoder
    found, _ = run("startup", config, workdir, capsys)
    for name in ("cold", "warm"):
        whole = found[f"{name}: from the command to the first step"]["values"]
        start = found[f"{name}: start, imports, artefacts checked"]["values"]
        assert len(whole) == 2
        assert all(0 < a < b for a, b in zip(start, whole, strict=True))
    assert found["warm over cold"]["median"] > 0
    assert found["compilation cache"]["median"] > 0
    log = (workdir / "benchmarks" / "startup.log").read_text()
    assert log.count("step 1/1") == 5  # one that fills the cache, two rounds of two


def test_memory(tmp_path, quick, capsys):
    config = ml_collections.ConfigDict(
        {
            "name": "retro",
            "seed": 0,
            "corpus": {"source": "vital_articles", "language": "en"},
            "chunks": {"length": 64, "validation_fraction": 0.02},
            "encoder": {"name": "minilm", "max_tokens": 128},
            "index": {"backend": "exact"},
            "neighbours": {"k": 2},
            "model": {"cca_layers": (1,)},
        }
    )
    workdir = epath.Path(tmp_path / "new" / "work")
    found, body = run(
        "memory", config, workdir, capsys, documents=10, scales=["1", "3"]
    )
    few, more = body["settings"]["chunks"]
    assert 2.5 < more / few < 3.5
    for stage in ("prepare", "embed", "find_neighbours"):
        over = found[f"{stage}, 3× over 1×"]
        peaks = [found[f"{stage}, {n:,} chunks"]["values"] for n in (few, more)]
        assert over["values"] == [b / a for a, b in zip(*peaks, strict=True)]
        assert over["at_most"] == 1.1
        assert over["met"], "so small a corpus does not show"
        assert 50 < min(peaks[0]) < 2000
        grown = found[f"{stage}, for each further chunk, in all"]
        assert grown["values"][0] == pytest.approx(
            (peaks[1][0] - peaks[0][0]) * 1e6 / (more - few)
        )


def test_search(tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    found, _ = run("search", None, workdir, capsys, rows=["500", "6000"], dim=16, k=5)
    assert found["exact, one query: 6,000 over 500 vectors"]["median"] > 0


def test_ctrl_c_ends_the_workers(realm, tmp_path):
    config, workdir = realm
    path = toy.write_config(tmp_path / "config.py", config)
    command = [sys.executable, "-m", benchmark.__name__, "--suite=refresh"]
    # Workers start with the second block.
    blocks = ["--steps=3", "--rounds=100000"]
    with subprocess.Popen(
        [*command, *blocks, f"--config={path}", f"--workdir={workdir}"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            ends_its_workers(process, workdir)
        finally:
            process.kill()


def ends_its_workers(process, workdir):
    log = workdir / "benchmarks" / "refresh.log"
    until = time.monotonic() + 200
    while not (log.exists() and "worker " in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    before = processes(process.pid)
    assert before
    process.terminate()
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130, said
    assert not any(os.path.exists(f"/proc/{pid}") for pid in before)
    assert not list(workdir.glob(".benchmark-*"))
