"""RETROfit on the whole road: the decoder stays, what retrieves is learnt."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy_retro
import toy_systems
import toy_training

from realm_retro.cli import evaluate, train
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import make_mesh
from realm_retro.retro import recipe, retrofit
from realm_retro.train import checkpoint, optim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy_training.quick_compiles(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose workdir holds a trained plain decoder."""
    folder = tmp_path_factory.mktemp("systems")
    return toy_systems.workdir_of(folder, "retrofit").parent


def fit(place, *, name, **sections):
    config = toy_retro.make_config(place, "retrofit", name=name, **sections)
    train.run(config, place / "work", make_mesh(devices=jax.devices()[:1]))
    return config


def weights(config, workdir):
    init = recipe.init_fn(recipe.model_config(config))
    run_dir = workdir / "runs" / config.name
    return checkpoint.restore_params(run_dir, init, make_mesh())[0]


def report(config, workdir):
    evaluate.main(config, workdir)
    path = workdir / "runs" / config.name / "evaluation.json"
    return {row["label"]: row for row in json.loads(path.read_text())["results"]}


def test_the_decoder_stays_and_the_rest_is_trained(place):
    workdir = place / "work"
    base = toy_retro.make_config(place, "plain")
    config = fit(place, name="fitted")
    start = recipe.start_params(config, workdir, make_mesh())
    trained = weights(config, workdir)
    mask = retrofit.trainable(trained)
    for chosen, before, after in zip(
        *map(jax.tree.leaves, (mask, start, trained)), strict=True
    ):
        assert np.array_equal(before, after) != chosen
    moments = optim.select(trained, mask)
    assert len(jax.tree.leaves(moments)) == sum(jax.tree.leaves(mask))
    assert not all(jax.tree.leaves(mask))

    fitted, plain = report(config, workdir), report(base, workdir)
    assert fitted["OFF"] == plain["OFF"]
    assert fitted["ON"]["bits_per_byte"] != plain["OFF"]["bits_per_byte"]


def test_all_of_it_may_be_trained(place):
    config = fit(place, name="all", init={"frozen": False}, train={"steps": 2})
    start = recipe.start_params(config, place / "work", make_mesh())
    trained = weights(config, place / "work")
    assert not np.array_equal(
        start["params"]["embed"]["table"], trained["params"]["embed"]["table"]
    )


def test_a_run_that_has_begun_needs_its_start_no_more(place, tmp_path):
    shutil.copytree(place, tmp_path / "retro", symlinks=True)
    place, short = tmp_path / "retro", {"steps": 4, "checkpoint_every": 2}
    config = fit(place, name="cut", train=short)
    shutil.rmtree(place / "work" / "runs" / "plain")
    run_dir = place / "work" / "runs" / "cut"
    (run_dir / "manifest.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "4")
    fit(place, name="cut", train=short)
    assert (run_dir / "manifest.json").exists()
    with pytest.raises(UserError, match=r"init.run='plain' must be a trained plain"):
        fit(place, name="late", train=short)
    with pytest.raises(UserError, match=r"other settings \(config.init.frozen"):
        fit(place, name="cut", init={"frozen": False}, train=short)
    assert config.init.run == "plain"
