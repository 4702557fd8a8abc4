import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import chex
import jax
import pytest
import toy_training as toy

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.train import optim, state
from realm_retro.train.checkpoint import FOLDER, Checkpoints, restore_params


def plan(mesh, init=None):
    init = init or toy.make_recipe().init
    params = state.abstract_params(init, mesh)
    rule = optim.make_optimizer(
        toy.OPTIMIZER,
        steps=20,
        trainable=jax.tree.map(lambda _: True, params),
        decayed=jax.tree.map(lambda _: True, params),
    )
    return init, rule, state.abstract_state(params, rule)


@pytest.fixture(scope="module")
def born():
    return state.init_state(*plan(toy.mesh_of(2, 2, 2)), seed=1)


@pytest.fixture(scope="module")
def written(born, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, born, {"seconds": step / 2})
    return folder


@pytest.fixture
def run_dir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def test_only_the_newest_are_kept(run_dir):
    assert {p.name for p in (run_dir / FOLDER).iterdir()} == {"2", "3"}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_restores_onto_any_mesh(run_dir, born, sizes):
    _, _, abstract = plan(toy.mesh_of(*sizes))
    with Checkpoints(run_dir, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        found, meta = checkpoints.restore(3, abstract)
    assert meta == {"seconds": 1.5}
    assert found.step == 3
    assert state.shardings_of(found) == state.shardings_of(abstract)
    chex.assert_trees_all_equal(found.params, born.params)
    chex.assert_trees_all_equal(found.opt_state, born.opt_state)


def test_params_alone(run_dir, born):
    # The moments are not read: they could even be gone.
    shutil.rmtree(run_dir / FOLDER / "3" / "opt_state")
    mesh = toy.mesh_of(1, 2, 1)
    params, step = restore_params(run_dir, toy.make_recipe().init, mesh)
    assert step == 3
    chex.assert_trees_all_equal(params, born.params)
    assert params["up"]["kernel"].sharding.mesh == mesh
    assert restore_params(run_dir, toy.make_recipe().init, mesh, step=2)[1] == 2


def test_no_checkpoint(run_dir, tmp_path):
    init, mesh = toy.make_recipe().init, toy.mesh_of(1, 1, 1)
    with pytest.raises(UserError, match=r"there is no checkpoint; run: .*cli\.train"):
        restore_params(tmp_path / "nowhere", init, mesh)
    with pytest.raises(UserError, match="there is no checkpoint 1;"):
        restore_params(run_dir, init, mesh, step=1)
    shutil.rmtree(run_dir / FOLDER)
    (run_dir / FOLDER).mkdir()
    with pytest.raises(UserError, match="no whole checkpoint"):
        restore_params(run_dir, init, mesh)


def test_a_half_written_checkpoint_is_ignored(run_dir):
    folder = run_dir / FOLDER
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    with Checkpoints(run_dir, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
    _, step = restore_params(run_dir, toy.make_recipe().init, toy.mesh_of(1, 1, 1))
    assert step == 3


@pytest.mark.parametrize(
    ("seal", "reason"),
    [
        (artifacts.seal, r"the numbers of opt_state.* differ"),
        (lambda meta: meta, "the checksum of meta differs"),
    ],
)
def test_other_numbers_than_were_saved_are_an_error(run_dir, seal, reason):
    path = run_dir / FOLDER / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    if seal is artifacts.seal:
        del meta[artifacts.CHECKSUM]
    name = sorted(meta["sums"]["opt_state"])[-1]
    meta["sums"]["opt_state"][name] = meta["sums"]["opt_state"][name][:-8] + "0123abcd"
    path.write_text(json.dumps(seal(meta)))
    mesh = toy.mesh_of(1, 1, 1)
    with (
        Checkpoints(run_dir) as checkpoints,
        pytest.raises(UserError, match=rf"checkpoints/3: .* damaged; .*{reason}"),
    ):
        checkpoints.restore(3, plan(mesh)[2])


def test_a_checkpoint_without_weights_is_an_error_and_not_skipped(run_dir):
    shutil.rmtree(run_dir / FOLDER / "3" / "params")
    with pytest.raises(
        UserError, match=r"checkpoints/3: cannot be read, it is damaged"
    ):
        restore_params(run_dir, toy.make_recipe().init, toy.mesh_of(1, 1, 1))


# In a process of its own: Orbax leaves the reads beside the failed one behind, and
# their complaints would fall on some later test.
RESTORE = """
import sys, toy_training as toy
from realm_retro.errors import UserError
from realm_retro.train.checkpoint import restore_params
try:
    restore_params(sys.argv[1], toy.make_recipe().init, toy.mesh_of(1, 1, 1))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("pattern", "bytes_left"), [("d/*", -40), ("manifest.ocdbt", 0)]
)
def test_truncated_files_are_an_error(run_dir, pattern, bytes_left):
    paths = list((run_dir / FOLDER / "3" / "params").rglob(pattern))
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[:bytes_left])
    process = subprocess.run(
        [sys.executable, "-c", RESTORE, str(run_dir)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(toy.__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert re.search(r"checkpoints/3: cannot be read, it is damaged", process.stdout)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "x"),
        OSError(errno.EMFILE, "x"),
        ValueError("Error reading 'd/x': Input/output error"),
    ],
)
def test_a_disk_that_fails_is_no_damage(run_dir, monkeypatch, error):
    def fail(*_, **__):
        raise error

    _, _, abstract = plan(toy.mesh_of(1, 1, 1))
    with Checkpoints(run_dir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(OSError, match=re.escape(str(run_dir))) as raised:
            checkpoints.restore(3, abstract)
    assert raised.value.errno == (error.errno if isinstance(error, OSError) else 5)
    assert "delete" not in str(raised.value)


def test_another_model_is_an_error(run_dir, monkeypatch):
    monkeypatch.setattr(toy, "HIDDEN", 2 * toy.HIDDEN)
    init = toy.make_recipe().init
    with pytest.raises(
        UserError,
        match=r"checkpoints/3: is of another model: .*64, 16.* there, .*128, 16.* here",
    ):
        restore_params(run_dir, init, toy.mesh_of(1, 1, 1))


# As a command: what other threads print is a matter of the whole process.
ON_A_FULL_DISK = """
import sys, toy_training as toy
from realm_retro.cli import common
def main(config, workdir):
    toy.run(workdir, steps=20)
common.run(main, name="train", required=("workdir",))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A run folder whose checkpoints find room for a few files."""
    folder = tmp_path / "small" / FOLDER
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("no disk can be mounted here")
    yield folder.parent
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_once(small_disk):
    process = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, f"--workdir={small_disk}"],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(toy.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr == (
        f"train: error: {small_disk / FOLDER}: the disk is full; free space and run the"
        " same command again, it goes on from the last whole checkpoint\n"
    )


def test_other_errors_of_threads_are_still_told(capfd):
    script = (
        "import tempfile, threading\n"
        "from absl import logging\n"
        "from realm_retro.train.checkpoint import Checkpoints\n"
        "Checkpoints(tempfile.mkdtemp(), keep=1)\n"
        "def fail(error):\n"
        "    raise error\n"
        "for text in ('[Errno 28] No space left on device', 'another error'):\n"
        "    thread = threading.Thread(target=fail, args=(OSError(text),))\n"
        "    thread.start(); thread.join()\n"
        "    logging.error('the log: %s', text)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    told = capfd.readouterr().err
    assert "OSError: another error" in told
    assert "the log: another error" in told
    assert "No space left" not in told
