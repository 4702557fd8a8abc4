"""Which token attends to which neighbours, and that a token without any stays as it is.

Values are compared with the paper's equations in tests/golden; here are the properties
that other implementations got wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retro_examples import jit

from realm_retro.nn.attention import RelativeAttention
from realm_retro.retro.cca import (
    ChunkedCrossAttention,
    from_attending_chunks,
    to_attending_chunks,
)

M, CHUNKS, K = 4, 3, 2
R, N = 2 * M, M * CHUNKS
WIDTH, ENCODER = 6, 5

# Chunk whose neighbours each token of 3 chunks of 4 attends to; −1 is none.
ATTENDS = [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_attending_chunks_are_shifted_by_all_but_one_token():
    x = jnp.arange(1, N + 1)[None, :, None]
    found = to_attending_chunks(x, M)[0, :, :, 0].tolist()
    assert found == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 0, 0, 0]]


def test_tokens_get_what_their_attending_chunk_computes():
    chunks = jnp.broadcast_to(jnp.arange(1, CHUNKS + 1)[:, None], (CHUNKS, M))
    found = from_attending_chunks(chunks[None, :, :, None])[0, :, 0]
    assert (found - 1).tolist() == ATTENDS


@pytest.mark.parametrize(("m", "chunks"), [(1, 3), (4, 1), (3, 4)])
def test_shifting_back_undoes_the_shift(m, chunks):
    x = np.arange(1, m * chunks + 1)[None, :, None]
    found = np.asarray(from_attending_chunks(to_attending_chunks(x, m)))[0, :, 0]
    expected = np.where(np.arange(m * chunks) < m - 1, 0, x[0, :, 0])
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def operator():
    """The operator with random parameters and one head: (h, E, mask) → [n, d]."""
    attention = RelativeAttention(num_heads=1, head_dim=4, width=WIDTH)
    module = ChunkedCrossAttention(attention, M)
    shapes = {
        "query": (WIDTH, 1, 4),
        "key": (ENCODER, 1, 4),
        "value": (ENCODER, 1, 4),
        "position": (WIDTH, 1, 4),
        "output": (1, 4, WIDTH),
    }
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(scale=0.4, size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    for name in ("content_bias", "position_bias"):
        params[name] = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32)

    def apply(h, encoded, mask):
        variables = {"params": {"attention": params}}
        return module.apply(variables, h[None], encoded[None], mask[None])[0]

    return apply


@pytest.fixture(scope="module")
def cca(operator):
    return jit(operator)


@pytest.fixture(scope="module")
def jacobians(operator):
    """By h, [n, d, n, d], and by E, [n, d, l, k, r, d']."""
    return jit(jax.jacrev(operator, argnums=(0, 1)))


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(N, WIDTH)), jnp.float32)
    encoded = jnp.asarray(rng.normal(size=(CHUNKS, K, R, ENCODER)), jnp.float32)
    return h, encoded, jnp.ones((CHUNKS, K, R), bool)


def test_the_first_tokens_get_exactly_zero(cca, inputs):
    found = np.asarray(cca(*inputs))
    assert not found[: M - 1].any()
    assert np.abs(found[M - 1 :]).min() > 0


def test_each_token_depends_on_the_neighbours_of_its_chunk_and_no_others(
    jacobians, inputs
):
    by_activation, by_encoding = jacobians(*inputs)
    depends = np.abs(by_encoding).sum(axis=(1, 4, 5)) > 0  # [n, l, k]
    expected = np.array(ATTENDS)[:, None] == np.arange(CHUNKS)
    np.testing.assert_array_equal(depends, expected[:, :, None] & np.ones(K, bool))
    depends = np.abs(by_activation).sum(axis=(1, 3)) > 0  # [n, n]
    np.testing.assert_array_equal(depends, np.diag(np.array(ATTENDS) >= 0))


def test_the_order_of_neighbours_does_not_matter(cca, inputs):
    h, encoded, mask = inputs
    mask = mask.at[:, 0, 5:].set(False)
    found = cca(h, encoded[:, ::-1], mask[:, ::-1])
    np.testing.assert_allclose(found, cca(h, encoded, mask), atol=1e-5)


def test_the_order_of_a_neighbours_tokens_matters(cca, inputs):
    h, encoded, mask = inputs
    difference = cca(h, encoded[:, :, ::-1], mask) - cca(h, encoded, mask)
    assert np.abs(difference)[M - 1 :].max(axis=-1).min() > 1e-3


def test_the_softmax_is_joint_over_neighbours(cca, inputs):
    # One token of each neighbour: what a query reads from both is a mixture of what it
    # reads from each, in proportions of its own. A softmax for each neighbour would
    # weigh them all alike.
    h, encoded, mask = inputs
    none = jnp.zeros_like(mask)
    one, two = none.at[:, 0, 2].set(True), none.at[:, 1, 6].set(True)
    each = np.stack([cca(h, encoded, one), cca(h, encoded, two)], axis=-1)
    both = np.asarray(cca(h, encoded, one | two))
    weights = []
    for t in range(M - 1, N):
        solution, residual, *_ = np.linalg.lstsq(each[t], both[t])
        assert residual[0] < 1e-9
        weights.append(solution)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-4)
    assert np.std(weights, axis=0).min() > 0.05


def test_a_neighbour_given_twice_counts_as_once(cca, inputs):
    h, encoded, mask = inputs
    twice = encoded.at[:, 1].set(encoded[:, 0])
    once = mask.at[:, 1].set(False)
    np.testing.assert_allclose(cca(h, twice, mask), cca(h, encoded, once), atol=1e-5)


def test_k_may_be_anything(cca, inputs):
    h, encoded, mask = inputs
    more = jnp.concatenate([encoded, 9 * encoded], axis=1)
    more_mask = jnp.concatenate([mask, jnp.zeros_like(mask)], axis=1)
    found = cca(h, more, more_mask)
    np.testing.assert_allclose(found, cca(h, encoded, mask), atol=1e-5)


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 1, 2)])
def test_missing_neighbours_give_exactly_zero_and_no_gradient(
    cca, jacobians, inputs, missing
):
    h, encoded, mask = inputs
    mask = mask.at[jnp.array(missing)].set(False)
    found = np.asarray(cca(h, encoded, mask))
    without = np.isin(ATTENDS, [-1, *missing])
    assert not found[without].any()
    assert np.abs(found[~without]).min(initial=1) > 0
    by_activation, by_encoding = map(np.asarray, jacobians(h, encoded, mask))
    assert np.isfinite(by_activation).all()
    assert np.isfinite(by_encoding).all()
    assert not by_activation[without].any()
    assert not by_activation[:, :, without].any()
    assert not by_encoding[:, :, np.array(missing)].any()


def test_masked_tokens_of_a_neighbour_do_not_matter(cca, jacobians, inputs):
    h, encoded, mask = inputs
    mask = mask.at[:, :, 3:].set(False)
    spoilt = encoded.at[:, :, 3:].set(1e6)
    np.testing.assert_array_equal(cca(h, spoilt, mask), cca(h, encoded, mask))
    _, by_encoding = map(np.asarray, jacobians(h, encoded, mask))
    assert not by_encoding[..., 3:, :].any()
    assert by_encoding[..., :3, :].any()
