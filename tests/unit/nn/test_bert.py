"""BERT against a slow reference in float64, and its invariances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_retro.nn.bert import Bert, BertConfig
from realm_retro.parallel import axes, mesh

CONFIG = BertConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=4, hidden=24, max_positions=12
)
LENGTHS = np.array([7, 3, 1])
MASK = np.arange(7)[None, :] < LENGTHS[:, None]
IDS = np.random.default_rng(0).integers(0, 23, MASK.shape).astype(np.int32)
TYPES = np.random.default_rng(1).integers(0, 2, MASK.shape).astype(np.int32)


def random_params(config=CONFIG, seed=0):
    """Parameters that are nowhere trivial: biases and norms too."""
    boxed = jax.eval_shape(Bert(config).init, jax.random.key(0), IDS, MASK)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
        axes.unbox(boxed)["params"],
    )


PARAMS = random_params()


@jax.jit
def encode(ids, mask, types=None):
    return Bert(CONFIG).apply({"params": PARAMS}, ids, mask, types)


def reference(config, params, ids, mask, types):
    """One row at a time, one head at a time, real tokens only."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, weights):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)
        return x * weights["scale"] + weights["bias"]

    act = {
        "gelu": np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
        "relu": lambda v: np.maximum(v, 0),
    }[config.activation]
    rows = []
    for row, segment, keep in zip(ids, types, mask, strict=True):
        e = p["embeddings"]
        n = int(keep.sum())
        x = e["tokens"][row[:n]] + e["positions"][:n] + e["segments"][segment[:n]]
        x = norm(x, e["norm"])
        for i in range(config.num_layers):
            w = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
            y = w["attention"]["output"]["bias"]
            for h in range(config.num_heads):
                q, k, v = (
                    x @ w["attention"]["qkv"]["kernel"][:, j, h]
                    + w["attention"]["qkv"]["bias"][j, h]
                    for j in range(3)
                )
                weights = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
                weights /= weights.sum(-1, keepdims=True)
                y = y + weights @ v @ w["attention"]["output"]["kernel"][h]
            x = norm(x + y, w["attention_norm"])
            y = act(x @ w["up"]["kernel"] + w["up"]["bias"])
            x = norm(x + y @ w["down"]["kernel"] + w["down"]["bias"], w["output_norm"])
        rows.append(x)
    return rows


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_agrees_with_reference(activation):
    config = dataclasses.replace(CONFIG, activation=activation)
    found = jax.jit(Bert(config).apply)({"params": PARAMS}, IDS, MASK, TYPES)
    wanted = reference(config, PARAMS, IDS, MASK, TYPES)
    for row, n, want in zip(np.asarray(found), LENGTHS, wanted, strict=True):
        np.testing.assert_allclose(row[:n], want, atol=2e-5)


def test_no_token_types_are_type_zero():
    found = encode(IDS, MASK)
    np.testing.assert_allclose(found, encode(IDS, MASK, 0 * TYPES), atol=1e-6)
    assert not np.allclose(found, encode(IDS, MASK, 0 * TYPES + 1), atol=1e-3)


def test_padding_and_its_ids_change_nothing():
    wanted = np.asarray(encode(IDS, MASK))
    ids = np.pad(np.where(MASK, IDS, 5), ((0, 0), (0, 4)), constant_values=9)
    found = np.asarray(encode(ids, np.pad(MASK, ((0, 0), (0, 4)))))
    for row, n, want in zip(found, LENGTHS, wanted, strict=True):
        np.testing.assert_allclose(row[:n], want[:n], atol=1e-5)


def test_row_without_tokens_is_finite_with_finite_gradient():
    mask = MASK.copy()
    mask[1] = False

    def total(params):
        return Bert(CONFIG).apply({"params": params}, IDS, mask).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(PARAMS)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_computes_in_it_and_stays_near():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    found = Bert(config).apply({"params": PARAMS}, IDS, MASK)
    assert found.dtype == jnp.bfloat16
    wanted = np.asarray(encode(IDS, MASK))[MASK]
    got = np.asarray(found, np.float32)[MASK]
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)


def test_recomputing_activations_changes_memory_alone():
    config = BertConfig(
        vocab_size=23, width=32, num_layers=4, num_heads=4, hidden=128, max_positions=64
    )
    params = random_params(config)
    ids = np.random.default_rng(2).integers(1, 23, (8, 64)).astype(np.int32)
    mask = np.arange(64) < np.arange(64, 0, -8)[:, None]

    def step(remat):
        bert = Bert(dataclasses.replace(config, remat=remat))

        def total(params):
            hidden = bert.apply({"params": params}, ids, mask)
            return jnp.mean(jnp.sin(hidden), where=mask[..., None])

        compiled = jax.jit(jax.value_and_grad(total)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(params)

    kept, wanted = step(False)
    recomputed, found = step(True)
    # Of the four layers' activations only those of one are there at a time.
    assert recomputed < kept / 2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted
    )


def test_exact_gelu_far_from_zero():
    # 1 + erf(x) cancels for negative x: the error must stay absolute and tiny.
    from realm_retro.nn import bert

    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    wanted = np.asarray([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    np.testing.assert_allclose(
        bert._activate(jnp.asarray(x), "gelu"), wanted, atol=1e-6
    )


def test_sharded_over_data_fsdp_and_tensor():
    devices = mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), IDS, MASK)
    where = axes.shardings(boxed, devices)["params"]
    params = jax.device_put(PARAMS, where)
    heads = params["layers"]["attention"]["qkv"]["kernel"]
    assert heads.sharding.spec == jax.sharding.PartitionSpec(
        None, "fsdp", None, "tensor", None
    )
    ids, mask = np.tile(IDS[:2], (2, 1)), np.tile(MASK[:2], (2, 1))

    @jax.jit
    def run(params, ids, mask):
        with mesh.active(devices):
            return Bert(CONFIG).apply({"params": params}, ids, mask)

    found = run(params, ids, mask)
    np.testing.assert_allclose(found, encode(ids, mask), atol=1e-5)


def test_refuses_what_does_not_fit():
    ids = np.zeros((1, 13), np.int32)
    with pytest.raises(ValueError, match="13 tokens, but 12 positions"):
        Bert(CONFIG).apply({"params": PARAMS}, ids, ids == 0)
    with pytest.raises(ValueError, match="5 heads do not divide"):
        dataclasses.replace(CONFIG, num_heads=5)
    with pytest.raises(ValueError, match="'swish' is not one of gelu"):
        dataclasses.replace(CONFIG, activation="swish")
