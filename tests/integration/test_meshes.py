"""The mesh decides where the work is done, and nothing else."""

import json

import numpy as np
import pytest
import toy_training as toy

from realm_retro.train.metrics import FILE


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy.quick_compiles(tmp_path_factory):
        yield


def losses(run_dir, mesh, **changes):
    toy.run(run_dir, mesh=mesh, steps=20, checkpoint_every=100, **changes)
    records = [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21))
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("single"), toy.mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [
        ((8, 1, 1), 1),
        ((1, 8, 1), 1),
        ((1, 1, 8), 1),
        ((2, 2, 2), 1),
        ((2, 1, 2), 4),
    ],
)
def test_every_mesh_gives_the_losses_of_one_device(
    tmp_path, single, sizes, accumulation
):
    recipe = {}
    if accumulation > 1:  # each piece has dropout of its own
        recipe = {"recipe": toy.make_recipe(dropout=0.0)}
        single = losses(tmp_path / "single", toy.mesh_of(1, 1, 1), **recipe)
    mesh = toy.mesh_of(*sizes)
    found = losses(tmp_path / "mesh", mesh, accumulation=accumulation, **recipe)
    np.testing.assert_allclose(found, single, atol=1e-5, rtol=0)
    assert single[-1] < single[0] - 0.1
