"""Norms, projections and embeddings against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_retro.nn.layers import Projection, RMSNorm, TokenEmbedding, linear
from realm_retro.parallel import axes


def normal(*shape, scale=1.0):
    x = np.random.default_rng(0).normal(scale=scale, size=shape)
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size):
    # At 1e-3 the epsilon of 1e-6 is as large as the mean square itself.
    x, scale = normal(4, 6, scale=size), normal(6)
    found = RMSNorm().apply({"params": {"scale": scale}}, x)
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rms_norm_is_computed_in_float32():
    x = normal(4, 300).astype(jnp.bfloat16)
    params = {"params": {"scale": normal(300)}}
    found = RMSNorm(jnp.bfloat16).apply(params, x)
    assert found.dtype == jnp.bfloat16
    expected = RMSNorm().apply(params, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, expected)


def test_projections_keep_the_variance():
    # Two contracted axes: the fan-in is their product.
    x = normal(500, 8, 32)
    module = Projection((4, 16), ("heads", "head_dim", "heads", None), contract=2)
    params = axes.unbox(module.init(jax.random.key(0), x))
    assert params["params"]["kernel"].shape == (8, 32, 4, 16)
    found = np.asarray(module.apply(params, x))
    assert found.shape == (500, 4, 16)
    assert found.std() == pytest.approx(1, rel=0.05)
    quiet = Projection((4, 16), (None,) * 4, scale=0.0, contract=2)
    assert not np.asarray(quiet.init_with_output(jax.random.key(0), x)[0]).any()


def test_embeddings_and_logits_share_their_weights():
    module, tokens = TokenEmbedding(50, 64), jnp.arange(50)
    params = axes.unbox(module.init(jax.random.key(0), tokens))
    (table,) = jax.tree.leaves(params)
    embedded = np.asarray(module.apply(params, tokens))
    np.testing.assert_allclose(embedded, 8 * np.asarray(table), rtol=1e-6)
    assert embedded.std() == pytest.approx(1, rel=0.05)
    x = normal(3, 64)
    logits = np.asarray(module.apply(params, x, method="logits"))
    np.testing.assert_allclose(logits, np.asarray(x) @ np.asarray(table).T, atol=1e-5)


def test_weights_stay_in_float32():
    module = Projection((4,), ("embed", None), jnp.bfloat16)
    found, params = module.init_with_output(jax.random.key(0), normal(2, 3))
    assert found.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("x", "weight", "contract"),
    [
        ((2, 3, 4), (4, 9), 1),
        ((2, 3, 9), (9, 4), 1),
        ((5, 2, 3), (2, 3, 7), 2),
        ((2, 5, 3, 4), (3, 4, 2), 2),
        ((4,), (4, 2, 3), 1),
    ],
)
def test_linear_is_a_product_with_its_gradients(x, weight, contract):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x, weight))
    y, pull = jax.vjp(lambda x, w: linear(x, w, contract), x, weight)
    expected, pull_expected = jax.vjp(
        lambda x, w: jnp.tensordot(x, w, axes=contract), x, weight
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for found, wanted in zip(pull(dy), pull_expected(dy), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
