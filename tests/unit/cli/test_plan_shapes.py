"""What plans take for batches is what trainings take."""

import jax
import numpy as np
import pytest
import tiny_qa
import tiny_workdir
import toy_pretraining
from etils import epath

from realm_retro.cli import realm_recipes, towers
from realm_retro.data import answer_store
from realm_retro.data.questions import load_questions
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import device_search, question_batches, shapes
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.realm.question_sets import QaConfig
from realm_retro.retrieval.neighbours import NeighbourTable
from realm_retro.retro import batches, recipe
from realm_retro.retro.config import RetroConfig
from realm_retro.train.config import TrainConfig


def of(batch):
    return {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in batch.items()}


def own(batch):
    return {name: x for name, x in batch.items() if x.sharding is None}


@pytest.fixture(scope="module")
def rivers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivers")
    toy_pretraining.write_rivers(folder, documents=8)
    config = toy_pretraining.make_config(folder)
    return config, toy_pretraining.prepared(config, epath.Path(folder / "work"))


@pytest.mark.parametrize("placement", ["host", "device"])
def test_pretraining(rivers, placement):
    config, workdir = rivers
    config = toy_pretraining.changed(config, pretrain={"placement": placement})
    mesh = make_mesh(devices=jax.devices()[:2])
    made = realm_recipes.pretrain(config, workdir, mesh)
    found = {"index_step": 0}
    if placement == "host":
        found |= {"ids": [[0, 1, -1]] * 4, "own": [0] * 4, "copies": [0] * 4}
    model, settings = towers.model_config(config), PretrainConfig(placement=placement)
    abstract = shapes.pretrain_batch(model, settings, 4, size=20, mesh=mesh)
    assert of(own(abstract)) == of(made.batch_at.batch(0, found))
    assert own(abstract).keys() == made.batch_spec.keys()


def test_the_tables_of_the_devices(rivers):
    config, workdir = rivers
    model, store = towers.model_config(config), towers.open_store(config, workdir)
    mesh = make_mesh(devices=jax.devices()[:2])

    class OneIndex:
        def current(self, step, params):
            vectors = np.zeros((len(store), model.vector_dim))
            found = device_search.sharded.place(vectors, mesh, dtype=jax.numpy.bfloat16)
            return type("InUse", (), {"index": found})

    real = device_search.tables(OneIndex(), store, mesh)(0, None)
    settings = PretrainConfig(placement="device", vectors="bfloat16")
    abstract = device_search.abstract_tables(model, settings, len(store), mesh)
    assert of(abstract) == of(real)
    assert {n: x.sharding for n, x in abstract.items()} == {
        n: x.sharding for n, x in real.items()
    }


def test_the_warm_start(rivers):
    config, workdir = rivers
    made = realm_recipes.ict(config, workdir, make_mesh(devices=jax.devices()[:1]))
    abstract = shapes.ict_batch(towers.model_config(config), 4)
    assert of(abstract) == of(made.batch_at(0))


@pytest.mark.parametrize("train_documents", [False, True])
def test_questions(tmp_path, train_documents):
    model = RealmConfig(**tiny_qa.SIZES)
    settings = QaConfig(beam=6, read=3, train_documents=train_documents)
    store = tiny_qa.write_passages(tmp_path)
    questions = load_questions(tiny_qa.write_questions(tmp_path / "q.jsonl"))
    stage = answer_store.open_stage(tmp_path / "answers", questions, store)
    stage.commit(answer_store.build(questions, store, stage))
    answers = answer_store.AnswerStore.open(tmp_path / "answers", questions=questions)
    vectors = np.zeros((len(store), model.vector_dim), np.float32)
    made = question_batches.Examples(
        model, settings, store, questions, answers, vectors
    )
    batch = made.batch(np.array([0, 2]), np.array([[0, 1, 2, 3, 4, 5]] * 2))
    assert of(shapes.finetune_batch(model, settings, 2)) == of(batch)


def test_windows(tmp_path):
    tiny_workdir.write_chunks(tmp_path / "chunks", documents=12)
    model = RetroConfig(300, 2, 8, 1, 8, 8, chunk_length=16, cca_layers=(1,))
    train = TrainConfig(steps=1, batch_size=2, sequence_chunks=3, neighbours=2)
    store = recipe.open_store(model, tmp_path)
    near = np.zeros((len(store), 2), np.int64)
    table = NeighbourTable(near, near, None)
    windows = batches.training_windows(store, 0, train.sequence_chunks, 0)
    source = batches.WindowSource(windows, store, table, train.neighbours)
    batch = {name: np.stack([x] * 2) for name, x in source[0].items()}
    assert of(recipe.abstract_batch(model, train)) == of(batch)
    plain = RetroConfig(300, 2, 8, 1, 8, 8, chunk_length=16)
    assert recipe.abstract_batch(plain, train).keys() == recipe.BATCH_SPEC.keys()
