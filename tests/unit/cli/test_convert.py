"""The command as a user meets it: in, out, and one line for bad input."""

import functools
import json

import jax
import ml_collections
import numpy as np
import pytest
import tiny_realm
from absl import flags
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import convert
from realm_retro.errors import UserError
from realm_retro.interop import realm, weights
from realm_retro.parallel import axes
from realm_retro.realm import model as model_lib
from realm_retro.realm.config import RealmConfig
from realm_retro.train.checkpoint import Checkpoints
from realm_retro.train.state import TrainState

TEXTS = [f"Block {i}, Zürich" for i in range(tiny_realm.BLOCKS)]


def run(workdir, config=None, **settings):
    with flagsaver.flagsaver(**settings):
        convert.main(config, epath.Path(workdir))


@pytest.fixture
def published(tmp_path):
    """Folders of an embedder (PyTorch file) and of a RealmForOpenQA, and records."""
    one = tiny_realm.write(tmp_path / "a", tiny_realm.embedder(1), as_bin=True)
    two = tiny_realm.write(tmp_path / "b", tiny_realm.open_qa(2))
    records = tmp_path / "block_records.npy"
    array = np.empty(len(TEXTS), object)
    array[:] = [text.encode() for text in TEXTS]
    np.save(records, array, allow_pickle=True)
    return [str(one), str(two)], str(records)


def test_in_and_out_again(tmp_path, published, capsys):
    inputs, records = published
    run(tmp_path / "w", input=inputs, records=records)
    said = capsys.readouterr().out
    assert "weights: document, query, reader:" in said
    assert f"{tiny_realm.BLOCKS} vectors of blocks" in said
    assert "config.model must have vocab_size=15, width=16" in said
    found = weights.load(tmp_path / "w" / "weights")
    assert found.model["tied"] is False
    query = realm.load(inputs[1]).parts["query"]
    jax.tree.map(np.testing.assert_array_equal, found.parts["query"], query)
    np.testing.assert_array_equal(
        found.vectors[np.arange(len(TEXTS))], tiny_realm.open_qa(2)["block_emb"]
    )
    lines = (tmp_path / "w" / "weights" / weights.BLOCKS).read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS
    assert [json.loads(line)["id"] for line in lines] == [f"{i:08d}" for i in range(5)]

    run(tmp_path / "w", output=str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "document",
        "query",
        "reader",
    ]
    again = realm.load(tmp_path / "out" / "document").parts["query"]
    jax.tree.map(np.testing.assert_array_equal, again, found.parts["document"])
    run(tmp_path / "w", output=str(tmp_path / "bert"), format="bert")
    bert = realm.load(tmp_path / "bert" / "reader").parts["bert"]
    wanted = found.parts["reader"]["bert"]
    jax.tree.map(np.testing.assert_array_equal, bert, wanted)


def test_it_is_finished_once_and_notices_another_checkpoint(
    tmp_path, published, capsys
):
    inputs, _ = published
    run(tmp_path / "w", input=inputs)
    assert "run again with --records=FILE" in capsys.readouterr().out
    run(tmp_path / "w", input=inputs)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with other settings"):
        run(tmp_path / "w", input=inputs[:1])


def test_a_killed_conversion_resumes(tmp_path, published, monkeypatch):
    inputs, records = published
    monkeypatch.setattr(weights, "_SHARD", 2)
    write = weights.artifacts.Stage.write
    calls = []

    def die(stage, name):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(stage, name)

    monkeypatch.setattr(weights.artifacts.Stage, "write", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "w", input=inputs, records=records)
    with pytest.raises(UserError, match="weights unfinished; run: python -m"):
        weights.load(tmp_path / "w" / "weights")
    run(tmp_path / "w", input=inputs, records=records)
    assert len(calls) == len(set(calls)) + 1  # only what was cut off is done again
    found = weights.load(tmp_path / "w" / "weights")
    np.testing.assert_array_equal(
        found.vectors[np.arange(len(TEXTS))], tiny_realm.open_qa(2)["block_emb"]
    )


@pytest.mark.parametrize("change", [TEXTS[1:], [*TEXTS, "one more"]])
def test_records_of_another_checkpoint(tmp_path, published, change):
    (tmp_path / "r.txt").write_text("".join(f"{text}\n" for text in change))
    with pytest.raises(UserError, match=rf"{len(change)} block records for 5 block"):
        run(tmp_path / "w", input=published[0], records=str(tmp_path / "r.txt"))
    run(tmp_path / "w", input=published[0], records=published[1])  # the right ones


def test_bad_flags(tmp_path, published):
    inputs, records = published
    with pytest.raises(UserError, match="one of the two"):
        run(tmp_path)
    with pytest.raises(UserError, match="one of the two"):
        run(tmp_path, input=inputs, output="x")
    with pytest.raises(UserError, match="no --input has block vectors"):
        run(tmp_path, input=inputs[:1], records=records)
    with pytest.raises(UserError, match=r"weights missing; .*convert .*--input=FOLDER"):
        run(tmp_path, output=str(tmp_path / "x"))


def test_a_run_s_newest_checkpoint_goes_out(tmp_path, capsys):
    sizes = dict(
        vocab_size=120, width=16, num_layers=2, num_heads=2, hidden=24,
        max_positions=32, title_length=4, body_length=8, query_length=6, embed_dim=8,
    )  # fmt: skip
    model = RealmConfig(**sizes)
    init = functools.partial(model_lib.init, model, parts=model_lib.FINETUNING)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        axes.unbox(jax.eval_shape(init, jax.random.key(0))),
    )
    with Checkpoints(tmp_path / "runs" / "tiny", keep=1) as checkpoints:
        checkpoints.save(7, TrainState(np.int32(7), params, {"n": np.int32(7)}), {})
    config = ml_collections.ConfigDict({"name": "tiny", "model": sizes})
    run(tmp_path, config, output=str(tmp_path / "out"), format="bert")
    assert "document as BertModel in" in capsys.readouterr().out
    found = realm.load(tmp_path / "out" / "document").parts["bert"]
    wanted = params["document"]["bert"]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(UserError, match=r"lacks pooler/bias.*--format=bert"):
        run(tmp_path, config, output=str(tmp_path / "realm"))


def test_flags_are_known():
    assert {"input", "records", "output", "format"} <= set(flags.FLAGS)
