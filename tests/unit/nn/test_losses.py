import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.nn.losses import cross_entropy, token_losses


def reference(logits, targets):
    logits = logits.astype(np.float64)
    out = np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        row = logits[index]
        out[index] = np.log(np.exp(row - row.max()).sum()) + row.max()
        out[index] -= row[targets[index]]
    return out


def make(seed=0, scale=5.0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(3, 4, 7))).astype(np.float32)
    return logits, rng.integers(7, size=(3, 4)), rng.integers(2, size=(3, 4)) > 0


def test_against_the_formula():
    logits, targets, mask = make()
    expected = reference(logits, targets)
    np.testing.assert_allclose(token_losses(logits, targets), expected, atol=2e-6)
    total, weight = cross_entropy(jnp.asarray(logits), targets, mask)
    np.testing.assert_allclose(total, expected[mask].sum(), rtol=1e-5)
    assert weight == mask.sum()


def test_float_weights():
    logits, targets, _ = make()
    weights = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    total, weight = cross_entropy(jnp.asarray(logits), targets, weights)
    expected = (reference(logits, targets) * weights).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


def test_masked_targets_may_be_anything():
    logits, targets, mask = make()
    wild = np.where(mask, targets, -1)
    wilder = np.where(mask, targets, 10**6)
    results = []
    for t in (targets, wild, wilder):
        value, grad = jax.value_and_grad(lambda x, t=t: cross_entropy(x, t, mask)[0])(
            jnp.asarray(logits)
        )
        results.append((value, grad))
        assert np.all(np.asarray(grad)[~mask] == 0)
    for value, grad in results[1:]:
        assert value == results[0][0]
        np.testing.assert_array_equal(grad, results[0][1])


def test_bfloat16_logits_are_summed_in_float32():
    # 1,000 equal losses of log 7: bfloat16 sums would stick at a power of two.
    logits = jnp.zeros((1000, 7), jnp.bfloat16)
    total, _ = cross_entropy(logits, jnp.zeros(1000, jnp.int32), jnp.ones(1000, bool))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 1000 * np.log(7), rtol=1e-5)


def test_large_logits_are_finite():
    logits = jnp.asarray([[1e30, 0.0], [-1e30, 0.0]])
    losses = token_losses(logits, jnp.asarray([0, 1]))
    np.testing.assert_array_equal(losses, [0.0, 0.0])
