"""A NaN in the middle of RETRO's and of REALM's training, and what becomes of it."""

import functools
import json

import chex
import jax
import ml_collections
import numpy as np
import pytest
import tiny_workdir
import toy_faults
import toy_pretraining
import toy_training
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import build_index, find_neighbours, towers
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import make_mesh
from realm_retro.retro import recipe as retro_recipe
from realm_retro.train import checkpoint, loop
from realm_retro.train.bad_steps import FILE as BAD_STEPS
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import FILE
from realm_retro.train.optim import OptimizerConfig

BAD, STEPS, ROWS = 5, 8, 4
POISON = {BAD: np.nan}
TRAIN = {"steps": STEPS, "batch_size": ROWS, "log_every": 1, "checkpoint_every": 3}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy_training.quick_compiles(tmp_path_factory):
        yield


class Crash(Exception):
    pass


def crash_at(step):
    def hook(at):
        if at.step == step:
            raise Crash

    return hook


def notes(run_dir):
    lines = (run_dir / BAD_STEPS).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """A workdir with everything that RETRO's training reads."""
    workdir = epath.Path(tmp_path_factory.mktemp("retro"))
    tiny_workdir.write_chunks(workdir / "chunks", documents=40)
    tiny_workdir.write_embeddings(workdir)
    config = ml_collections.ConfigDict(
        {"index": {"backend": "exact"}, "neighbours": {"k": 2}}
    )
    build_index.main(config, workdir)
    find_neighbours.main(config, workdir)
    return workdir


RETRO = {
    "seed": 0,
    "model": {
        "vocab_size": 300,
        "chunk_length": 16,
        "num_layers": 2,
        "model_dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "ffw_dim": 32,
        "cca_layers": (2,),
        "encoder_layers": 1,
        "encoder_dim": 16,
        "encoder_num_heads": 2,
        "encoder_head_dim": 8,
        "encoder_ffw_dim": 32,
        "compute_dtype": "float32",
    },
    "train": {**TRAIN, "sequence_chunks": 4, "neighbours": 2, "accumulation": 2},
}


def train_retro(workdir, run_dir, policy):
    config = ml_collections.ConfigDict(RETRO)
    mesh = make_mesh(devices=jax.devices()[:1])
    recipe = retro_recipe.make(config, workdir, mesh)
    train = {**config.train.to_dict(), "on_bad_step": policy}
    loop.train(
        toy_faults.poisoned(recipe, POISON),
        run_dir,
        config=config_lib.build(TrainConfig, train, name="config.train"),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
        mesh=mesh,
        report=lambda line: None,
    )
    return checkpoint.restore_params(run_dir, recipe.init, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_retro(chunks, tmp_path, policy):
    run_dir = epath.Path(tmp_path)
    if policy == "stop":
        with pytest.raises(UserError, match=f"step {BAD}: loss is nan.*is kept"):
            train_retro(chunks, run_dir, policy)
        newest = sorted(path.name for path in (run_dir / checkpoint.FOLDER).iterdir())
        assert newest == ["3"]
    else:
        params, step = train_retro(chunks, run_dir, policy)
        assert step == STEPS
        chex.assert_tree_all_finite(params)
        lines = (run_dir / FILE).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 6, 7, 8]
    (note,) = notes(run_dir)
    assert (note["step"], note["reason"]) == (BAD, "loss is nan")
    # The chunks that it names are those that the batch was made of.
    store = ChunkStore.open(chunks / "chunks")
    named = np.asarray(note["examples"]["chunks"])
    assert named.shape == (ROWS, 4)
    mesh = make_mesh(devices=jax.devices()[:1])
    recipe = retro_recipe.make(ml_collections.ConfigDict(RETRO), chunks, mesh)
    tokens = recipe.batch_at(BAD - 1)["tokens"].reshape(ROWS, 4, 16)
    there = named >= 0
    np.testing.assert_array_equal(
        tokens[there], np.asarray(store.tokens[named[there]], np.int32)
    )


@pytest.fixture(scope="module")
def rivers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivers")
    toy_pretraining.write_rivers(folder)
    config = toy_pretraining.make_config(folder)
    return folder, toy_pretraining.prepared(config, epath.Path(folder / "work"))


def realm_config(rivers, name, policy, **pretrain):
    return toy_pretraining.make_config(
        rivers[0],
        name=name,
        pretrain=pretrain,
        train={**TRAIN, "on_bad_step": policy},
    )


train_realm = functools.partial(
    toy_pretraining.train, change=lambda recipe: toy_faults.poisoned(recipe, POISON)
)


@pytest.mark.slow
def test_realm_skips_and_a_crash_changes_nothing(rivers):
    _, workdir = rivers
    found = {}
    for name in ("straight", "crashed"):
        config = realm_config(rivers, name, "skip")
        if name == "crashed":
            with pytest.raises(Crash):
                train_realm(config, workdir, crash_at(7))
        assert train_realm(config, workdir).finished
        params = jax.device_get(towers.run_params(config, workdir, name))
        run_dir = toy_pretraining.run_dir(config, workdir)
        found[name] = params, toy_pretraining.records(config, workdir), notes(run_dir)
    chex.assert_trees_all_equal(found["crashed"][0], found["straight"][0])
    assert found["crashed"][1:] == found["straight"][1:]
    chex.assert_tree_all_finite(found["straight"][0])
    records, (note,) = found["straight"][1:]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 6, 7, 8]
    # The index is refreshed all the same: after steps 3 and 6.
    assert [record["index_step"] for record in records] == [0, 0, 0, 0, 3, 3, 6]
    assert note["step"] == BAD
    store = PassageStore.open(workdir / "passages")
    assert len(note["examples"]["passage"]) == ROWS
    assert max(note["examples"]["passage"]) < len(store)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["host", "device"])
def test_realm_stops_before_an_index_is_spoilt(rivers, placement):
    _, workdir = rivers
    config = realm_config(rivers, f"stop-{placement}", "stop", placement=placement)
    with pytest.raises(UserError, match=f"step {BAD}: loss is nan.*is kept"):
        train_realm(config, workdir)
    run_dir = toy_pretraining.run_dir(config, workdir)
    newest = sorted(path.name for path in (run_dir / checkpoint.FOLDER).iterdir())
    assert newest == ["3"]
    (note,) = notes(run_dir)
    assert note["then"] == "stopped"
    params = towers.run_params(config, workdir, config.name)
    chex.assert_tree_all_finite(params)
    assert train_realm(
        toy_pretraining.changed(config, train={"on_bad_step": "skip"}), workdir
    ).finished
