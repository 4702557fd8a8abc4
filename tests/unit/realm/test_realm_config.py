"""Which shapes of a REALM are refused, and the lengths that follow from one."""

import dataclasses

import pytest
from realm_examples import small_realm

from realm_retro import config as config_lib
from realm_retro.errors import UserError
from realm_retro.realm.config import RealmConfig


def test_lengths_hold_all_parts_and_their_special_tokens():
    config = small_realm()
    assert config.query_tokens == 8 + 2
    assert config.document_tokens == 3 + 7 + 3
    assert config.joint_tokens == 8 + 7 + 3
    assert config.bert.max_positions == 20


def test_vector_dim_is_the_width_without_projection():
    assert small_realm().vector_dim == 9
    assert small_realm(embed_dim=0).vector_dim == 16


def test_bert_has_the_configs_shape():
    bert = small_realm(activation="gelu_tanh", compute_dtype="bfloat16").bert
    assert (bert.vocab_size, bert.width, bert.num_layers) == (111, 16, 2)
    assert (bert.num_heads, bert.hidden) == (4, 24)
    assert (bert.activation, bert.compute_dtype) == ("gelu_tanh", "bfloat16")
    assert small_realm(remat=True).bert.remat
    assert not bert.remat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide width=16"),
        ({"candidates": 0}, "candidates=0 must be at least 1"),
        ({"embed_dim": -1}, "embed_dim=-1 must be at least 0"),
        ({"pooling": "max"}, "pooling='max' must be one of cls, mean"),
        ({"marginal": "sum"}, "marginal='sum' must be one of joint, per_token"),
        ({"activation": "swish"}, "activation='swish' must be one of gelu"),
        ({"compute_dtype": "float16"}, "must be one of float32, bfloat16"),
        ({"dropout": 1.0}, "dropout=1.0 must be below 1"),
        ({"score_scale": 0.0}, "score_scale=0.0 must be positive"),
        ({"max_positions": 17}, "inputs of 18 tokens, but max_positions=17"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small_realm(**changes)


def test_a_fingerprint_of_what_makes_a_vector():
    changes = {
        "vocab_size": 112,
        "width": 32,
        "num_layers": 3,
        "num_heads": 2,
        "hidden": 25,
        "max_positions": 21,
        "activation": "relu",
        "epsilon": 1e-6,
        "embed_dim": 0,
        "pooling": "mean",
        "pooler": True,
        "projection_norm": False,
        "normalise": True,
        "document_types": True,
        "tied": True,
        "compute_dtype": "bfloat16",
    }
    others = {
        "title_length": 4,
        "body_length": 6,
        "score_scale": 2.0,
        "dropout": 0.1,
        "marginal": "per_token",
        "candidates": 5,
        "query_length": 7,
        "max_masks": 4,
        "span_width": 3,
        "span_hidden": 9,
        "remat": True,
    }
    fields = {field.name for field in dataclasses.fields(RealmConfig)}
    assert fields == changes.keys() | others.keys()
    usual = small_realm().embedder_fingerprint
    for name, value in changes.items():
        assert small_realm(**{name: value}).embedder_fingerprint != usual, name
    for name, value in others.items():
        assert small_realm(**{name: value}).embedder_fingerprint == usual, name


def test_a_config_section_names_what_is_missing():
    with pytest.raises(UserError, match=r"config\.model\.width is missing"):
        config_lib.build(RealmConfig, {"num_layers": 2}, name="config.model")
