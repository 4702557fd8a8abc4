"""The embeddings artefact is read as written, or refused."""

import json

import numpy as np
import pytest

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.retrieval import embeddings
from realm_retro.retrieval.embed import EmbedConfig
from realm_retro.retrieval.embeddings import Embeddings

ROWS = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float16)


@pytest.fixture
def directory(tmp_path):
    config = EmbedConfig(dtype="float16", shard_size=4)
    stage = embeddings.open_stage(
        tmp_path,
        config=config,
        compute_dtype="float32",
        chunks_fingerprint="chunks!",
        encoder_fingerprint="encoder!",
    )
    for i, name in enumerate(embeddings.shard_names(11, 4)):
        with stage.write(name) as path, path.open("wb") as file:
            np.save(file, ROWS[4 * i : 4 * i + 4])
    stage.commit({"texts": 11, "dim": 4})
    return tmp_path


def test_reads_what_was_written(directory):
    parents = {"chunks": "chunks!", "encoder": "encoder!"}
    found = Embeddings.open(directory, parents=parents)
    assert [len(shard) for shard in found.vectors.shards] == [4, 4, 3]
    assert (len(found), found.dim) == (11, 4)
    assert found.encoder_fingerprint == "encoder!"
    assert found.fingerprint == found.manifest.fingerprint
    np.testing.assert_array_equal(found.vectors[:], ROWS)


def test_other_parents_are_refused(directory):
    with pytest.raises(UserError, match=r"made from chunks chunks!.* is other"):
        Embeddings.open(directory, parents={"chunks": "other"})


def test_damage_is_refused(directory):
    path = directory / "vectors-00001-of-00003.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"truncated.*realm_retro.cli.embed"):
        Embeddings.open(directory)


def test_missing(tmp_path):
    with pytest.raises(
        UserError, match=r"missing; run: python -m realm_retro.cli.embed"
    ):
        Embeddings.open(tmp_path / "none")


def test_shape_must_be_the_manifest_s(directory):
    path = directory / "manifest.json"
    body = json.loads(path.read_text())
    body["meta"]["dim"] = 5
    del body[artifacts.CHECKSUM]
    path.write_text(json.dumps(artifacts.seal(body)))
    with pytest.raises(UserError, match=r"holds \(11, 4\) vectors .* says \(11, 5\)"):
        Embeddings.open(directory)


def test_shard_names():
    assert embeddings.shard_names(8, 4) == [
        "vectors-00000-of-00002.npy",
        "vectors-00001-of-00002.npy",
    ]
    assert len(embeddings.shard_names(9, 4)) == 3
