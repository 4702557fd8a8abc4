"""The mesh decides where the work is done, and nothing else."""

import json

import numpy as np
import pytest
import toy_systems
import toy_training as toy

from realm_retro.cli import encoders
from realm_retro.cli.encoders import EncoderConfig
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.train.metrics import FILE

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


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
        *(pytest.param(sizes, 1, marks=pytest.mark.slow) for sizes in MESHES[:-1]),
        (MESHES[-1], 1),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("systems")


@pytest.fixture(scope="module")
def alone(folder):
    """What a system logs on one device; each trains once."""
    found = {}

    def records(system):
        if system not in found:
            name = f"{system}_alone"
            found[system] = toy_systems.trained(folder, system, (1, 1, 1), name=name)
        return found[system]

    return records


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("system", toy_systems.NAMES)
def test_every_system_trains_the_same_on_every_mesh(folder, alone, system, sizes):
    name = "_".join(map(str, (system, *sizes)))
    found = toy_systems.trained(folder, system, sizes, name=name)
    assert [record["step"] for record in found] == list(range(1, 21))
    pairs = zip(found, alone(system), strict=True)
    values = np.array([[x["loss"] for x in pair] for pair in pairs])
    np.testing.assert_allclose(values[:, 0], values[:, 1], atol=1e-5, rtol=0)
    assert np.ptp(values[:, 1]) > 1e-3  # something is learnt


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_the_embedding_job_gives_the_same_on_every_mesh(folder, sizes):
    workdir = toy_systems.workdir_of(folder, "retro")
    store = ChunkStore.open(workdir / "chunks")
    config = EncoderConfig(path=str(workdir.parent / "encoder"), max_tokens=12)
    texts = store.texts(np.arange(len(store)))
    found, wanted = (
        encoders.build_embedder(config, batch_tokens=64, mesh=toy.mesh_of(*mesh))
        .text_encoder()
        .encode(texts)
        for mesh in (sizes, (1, 1, 1))
    )
    assert len(found) > 200
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
