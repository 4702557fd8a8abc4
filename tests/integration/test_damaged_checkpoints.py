"""Every file of a checkpoint and of a run's folder, spoilt: refused, or of no account.

A checkpoint holds files that a restore does not need. So what is asked is that a spoilt
checkpoint is refused by name or restores to the very numbers that were saved: never to
others, and never to a traceback.

As a program it spoils one file after the other and tells what became of it; in a
process of its own, because the storage library leaves the reads beside a failed one
behind:

  python tests/integration/test_damaged_checkpoints.py RUN OTHER_RUN
"""

import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import tempfile

import chex
import jax
import pytest
import toy_training as toy

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.train import optim, state
from realm_retro.train.checkpoint import FOLDER, Checkpoints, restore_params
from realm_retro.train.metrics import FILE

pytestmark = pytest.mark.slow

STEPS = 4
LAST = pathlib.Path(FOLDER) / str(STEPS)


def train(folder, **changes):
    """A run with checkpoints of steps 2 and 4."""
    return toy.run(folder, steps=STEPS, checkpoint_every=2, **changes)


def abstract(mesh):
    params = state.abstract_params(toy.make_recipe().init, mesh)
    everything = jax.tree.map(lambda _: True, params)
    rule = optim.make_optimizer(
        toy.OPTIMIZER, steps=STEPS, trainable=everything, decayed=everything
    )
    return state.abstract_state(params, rule)


def restored(run):
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(STEPS, abstract(toy.mesh_of(1, 1, 1)))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def spoilt(content, twin, trace):
    """(how, what is there instead); None for nothing at all."""
    rng = random.Random(len(content))
    yield "deleted", None
    yield "emptied", b""
    yield "truncated", content[:-1]
    yield "halved", content[: len(content) // 2]
    yield "a pickle", pickle.dumps(Call(os.mkdir, trace))
    if twin not in (None, content):
        yield "from another run", twin
    for place in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in "abcd")}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        yield f"bit of byte {place}", bytes(flipped)


def outcome(run, whole):
    """What became of a restore: ``same``, ``other numbers``, or what was raised."""
    try:
        found, meta = restored(run)
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    try:
        chex.assert_trees_all_equal(found, whole[0])
    except AssertionError:
        return "other numbers"
    return "same" if meta == whole[1] else f"other meta {meta}"


def main(run, other):
    """Prints a line of JSON for each way in which each file is spoilt."""
    run, other = pathlib.Path(run), pathlib.Path(other)
    whole = restored(run)
    files = sorted(path for path in (run / LAST).rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as scratch:
        trace = f"{scratch}/it ran"
        for path in files:
            content, twin = path.read_bytes(), other / path.relative_to(run)
            theirs = twin.read_bytes() if twin.exists() else None
            if not content:
                continue
            for how, instead in spoilt(content, theirs, trace):
                path.unlink()
                if instead is not None:
                    path.write_bytes(instead)
                said = outcome(run, whole)
                path.unlink(missing_ok=True)
                path.write_bytes(content)
                name = str(path.relative_to(run / LAST))
                print(json.dumps([name, how, said]), flush=True)
        assert not os.path.exists(trace)
    assert outcome(run, whole) == "same"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their settings, and in nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    # All tests compile alike: what goes on has to end at the very same weights.
    with toy.quick_compiles(tmp_path_factory):
        train(folder / "a", settings={"run": "a"})
        train(folder / "b", settings={"run": "b"}, recipe=toy.make_recipe(dropout=0.2))
        yield folder / "a", folder / "b"


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs[0], tmp_path / "run")


def test_every_spoilt_file_of_a_checkpoint(run, runs):
    process = subprocess.run(
        [sys.executable, __file__, str(run), str(runs[1])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0, process.stderr[-2000:]
    assert len({name for name, _, _ in found}) > 5
    for name, how, said in found:
        reason = "cannot be read, it is damaged; delete it"
        if name.startswith("meta/") and how == "from another run":
            reason = "was saved by a run with other settings or data; delete it"
        assert said == "same" or f"{run / LAST}: {reason}" in said, (name, how, said)
    # The numbers themselves cannot be spoilt unnoticed, nor what is kept beside them.
    for part in ("params/d", "opt_state/d", "meta/metadata"):
        of_part = [one for one in found if one[0].startswith(part)]
        assert of_part
        refused = [one for one in of_part if one[2] != "same"]
        assert len(refused) > len(of_part) / 2


def test_a_checkpoint_of_another_run_is_refused(run, runs):
    for part in ("params", "opt_state", "meta", "."):
        shutil.rmtree(run / LAST / part)
        shutil.copytree(runs[1] / LAST / part, run / LAST / part)
        message = (
            "was saved by a run with other settings"
            if part in ("meta", ".")
            else rf"cannot be read, it is damaged; .* \(the numbers of {part}\["
        )
        with pytest.raises(UserError, match=rf"checkpoints/{STEPS}: {message}"):
            restored(run)
        if part in ("params", "meta", "."):
            with pytest.raises(UserError, match=rf"checkpoints/{STEPS}: "):
                restore_params(run, toy.make_recipe().init, toy.mesh_of(1, 1, 1))
        shutil.rmtree(run / LAST)
        shutil.copytree(runs[0] / LAST, run / LAST)
    assert restored(run)


def test_a_checkpoint_of_an_earlier_release_is_read(run, monkeypatch):
    """It has neither sums nor the run's name."""
    path = run / LAST / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({"seconds": meta["seconds"], "carried": None}))
    _, found = restored(run)
    assert found == {"seconds": meta["seconds"], "carried": None}


def test_training_goes_on_from_the_checkpoint_before(run, runs):
    """The remedy of the message works, and ends at the same weights."""
    path = run / LAST / "params" / "manifest.ocdbt"
    assert path.exists()
    shutil.rmtree(run / LAST)
    (run / artifacts.MANIFEST).unlink()
    train(run, settings={"run": "a"})
    chex.assert_trees_all_equal(restored(run)[0], restored(runs[0])[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "run"}'])
def test_a_spoilt_manifest_of_a_run(run, content):
    path = run / artifacts.MANIFEST
    whole = path.read_bytes()
    for spoilt_content in (content, whole.replace(b'"steps": 4', b'"steps": 5')):
        path.write_bytes(spoilt_content)
        with pytest.raises(UserError) as error:
            train(run, settings={"run": "a"})
        assert str(path) in str(error.value)
        # The remedy keeps the training.
        assert f"delete {path} and run the same command again" in str(error.value)
    path.unlink()
    assert train(run, settings={"run": "a"}).finished
    assert json.loads(path.read_bytes())["meta"]["steps"] == STEPS


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [lines[0], b'{"step": \xff}\n', *lines[2:]],
        lambda lines: [*lines[:-1], lines[-1][:-9]],
        lambda lines: [*lines, b"[" * 5000 + b"\n"],
        lambda lines: [],
    ],
)
def test_spoilt_metrics_do_not_stop_a_training(run, spoil):
    path = run / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(spoil(lines)))
    shutil.rmtree(run / LAST)
    (run / artifacts.MANIFEST).unlink()
    assert train(run, settings={"run": "a"}).finished
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-2:] == [3, 4]


if __name__ == "__main__":
    main(*sys.argv[1:])
