"""Where weights come from, and which vectors are theirs."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_qa
from etils import epath
from realm_examples import random_realm

from realm_retro.cli import qa_setup, towers
from realm_retro.errors import UserError
from realm_retro.realm import model
from realm_retro.realm.evidence import Retrieved, Seconds
from realm_retro.realm.search import query_vectors
from realm_retro.retrieval import refresh
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.train.checkpoint import Checkpoints
from realm_retro.train.state import TrainState


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("towers")
    tiny_qa.write_passages(workdir)
    return workdir


@pytest.fixture
def workdir(prepared, tmp_path):
    (tmp_path / "passages").symlink_to(prepared / "passages")
    return epath.Path(tmp_path)


def config_of(**changes):
    return tiny_qa.config("unused", **changes)


def save(workdir, name, params):
    with Checkpoints(workdir / "runs" / name, keep=1) as checkpoints:
        state = TrainState(np.int32(1), params, {"count": np.int32(1)})
        checkpoints.save(1, state, {})


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_reader_starts_from_the_encoder_of_pre_training(workdir):
    config = config_of(init__run="before")
    trained = random_realm(towers.model_config(config), model.PRETRAINING)
    save(workdir, "before", trained)
    parts = (*model.PRETRAINING, "reader")
    started = towers.start_params(config, workdir, parts)
    assert started.keys() == {*parts}
    for part in model.PRETRAINING:
        same(started[part], trained[part])
    same(started["reader"]["bert"], trained["encoder"]["bert"])
    assert started["reader"].keys() == {"bert", "span_ends", "span_norm", "span_score"}
    # No array is shared: a step gives each away once.
    pairs = zip(
        *(jax.tree.leaves(started[part]["bert"]) for part in ("encoder", "reader")),
        strict=True,
    )
    assert all(one is not other for one, other in pairs)


@pytest.mark.slow
def test_a_reader_that_was_trained_stays(workdir):
    config = config_of(init__run="before")
    trained = random_realm(towers.model_config(config))
    save(workdir, "before", trained)
    started = towers.start_params(config, workdir, model.FINETUNING)
    assert started.keys() == {*model.FINETUNING}
    same(started["reader"], trained["reader"])


def weights_of(config):
    shape = towers.model_config(config)
    return qa_setup.Weights(shape, random_realm(shape, model.TOWERS), None)


def test_the_model_decides_what_weights_mean(workdir):
    """The same weights under another pooling are another embedder."""
    weights = weights_of(config_of())

    def folder(**changes):
        shape = dataclasses.replace(weights.model, **changes)
        return qa_setup.index_folder(workdir, dataclasses.replace(weights, model=shape))

    one, *others = (folder(), folder(pooling="mean"), folder(normalise=True))
    assert len({one, *others}) == 3
    assert folder(candidates=3, span_width=2) == one
    plain, mean = config_of(), config_of(model__pooling="mean")
    assert towers.embedder_fingerprint(plain) != towers.embedder_fingerprint(mean)


def test_vectors_say_which_model_they_are_of(workdir):
    config = config_of()
    weights = weights_of(config)
    qa_setup.open_index(config, workdir, weights, 3)
    version = refresh.newest_version(qa_setup.index_folder(workdir, weights))
    assert version is not None
    found = version.manifest.parents["model"]
    assert found == towers.embedder_fingerprint(config)


def test_vectors_that_were_stored_otherwise(workdir):
    """Of another dtype they are refused; in other shards they are the same."""
    config = config_of()
    weights, said = weights_of(config), []
    vectors, _ = qa_setup.open_index(config, workdir, weights, 3)
    config.refresh = {"shard_rows": 3}
    again, _ = qa_setup.open_index(config, workdir, weights, 3, said.append)
    np.testing.assert_array_equal(again[:], vectors[:])
    assert any("config.refresh.shard_rows=3" in line for line in said)
    config.refresh = {"dtype": "float16"}
    with pytest.raises(UserError, match=r"holds float32 .*config\.refresh\.dtype"):
        qa_setup.open_index(config, workdir, weights, 3)


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """Exact search that never finds the best passage."""

    exact: ExactIndex
    backend: str = "scann"
    metric: str = "dot_product"

    @property
    def ids(self):
        return self.exact.ids

    def search(self, queries, k):
        found = self.exact.search(queries, k)
        return found.only(np.broadcast_to(np.arange(k) > 0, found.ids.shape), k)


def test_an_index_is_measured_on_the_questions(workdir):
    config = config_of()
    weights = weights_of(config)
    _, index = qa_setup.open_index(config, workdir, weights, 3)
    ids = np.random.default_rng(0).integers(104, 128, (6, 4)).astype(np.int32)
    lengths = np.full(6, 4, np.int32)
    vectors = np.asarray(query_vectors(weights.model, weights.params, ids, lengths))
    hits = index.search(vectors, 4)
    found = Retrieved(
        ids, lengths, np.zeros(6, bool), vectors, hits.ids, hits.scores, Seconds()
    )
    measured = qa_setup.index_recall(config, workdir, weights, found, index)
    assert measured == {"backend": "exact", "k": 4, "queries": 6, "recall": 1.0}
    measured = qa_setup.index_recall(config, workdir, weights, found, Forgetful(index))
    assert measured == {"backend": "scann", "k": 4, "queries": 6, "recall": 0.75}


def test_a_start_that_is_not_there(workdir):
    """It is named at once, and not looked for by a run that goes on."""
    nowhere = config_of(init__bert="/nowhere")
    for check in (towers.check_start, towers.start_params):
        with pytest.raises(
            UserError, match=r"config\.init\.bert='/nowhere': /nowhere/"
        ):
            check(nowhere, workdir)
        with pytest.raises(UserError, match=r"config\.init\.run='before': .*train it"):
            check(config_of(init__run="before"), workdir)
    params = random_realm(towers.model_config(nowhere), model.TOWERS)
    save(workdir, nowhere.name, params)
    towers.check_start(nowhere, workdir)


def states_of(folder):
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_finished_index_is_used_without_writing(workdir):
    config = config_of()
    weights = weights_of(config)
    vectors, _ = qa_setup.open_index(config, workdir, weights, 3)
    before = states_of(pathlib.Path(workdir / qa_setup.FOLDER))
    again, _ = qa_setup.open_index(config, workdir, weights, 3)
    np.testing.assert_array_equal(again[:], vectors[:])
    assert states_of(pathlib.Path(workdir / qa_setup.FOLDER)) == before


def test_a_damaged_index_is_to_be_deleted(workdir):
    config = config_of()
    weights = weights_of(config)
    qa_setup.open_index(config, workdir, weights, 3)
    root = qa_setup.index_folder(workdir, weights)
    [path] = pathlib.Path(root).glob("versions/*/vectors-00000-*.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated") as error:
        qa_setup.open_index(config, workdir, weights, 3)
    assert str(error.value).endswith(f"; delete {root} and run the same command again")
    shutil.rmtree(root)
    qa_setup.open_index(config, workdir, weights, 3)
