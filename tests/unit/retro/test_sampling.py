import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_retro.retro.sampling import sample

LOGITS = np.log(np.array([[0.05, 0.5, 0.15, 0.3]], np.float32))


def draws(number=2000, **settings):
    keys = jax.random.split(jax.random.key(0), number)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (number, 4))
    return np.bincount(sample(logits, keys, **settings), minlength=4) / number


def test_frequencies_follow_the_probabilities():
    np.testing.assert_allclose(draws(), np.exp(LOGITS[0]), atol=0.04)


def test_temperature_sharpens():
    expected = np.exp(2 * LOGITS[0]) / np.exp(2 * LOGITS[0]).sum()
    np.testing.assert_allclose(draws(temperature=0.5), expected, atol=0.04)


def test_temperature_zero_takes_the_best():
    assert draws(temperature=0).tolist() == [0, 1, 0, 0]


def test_top_k_keeps_the_k_best():
    assert np.flatnonzero(draws(top_k=2)).tolist() == [1, 3]
    np.testing.assert_allclose(draws(top_k=2)[1], 0.5 / 0.8, atol=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.9, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    assert np.flatnonzero(draws(top_p=top_p)).tolist() == kept
