"""The parts of relative attention, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.nn.attention import (
    RelativeAttention,
    distance_features,
    skew,
    softmax_terms,
)

HEADS, HEAD_DIM, WIDTH = 2, 3, 8  # 2 heads of 3 are not 8


@settings(deadline=None)
@given(
    batch=st.sampled_from([(), (2,), (2, 3)]),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    spare=st.integers(0, 3),
)
def test_skew_looks_each_distance_up(batch, queries, keys, spare):
    # Columns are distances from that of the last query to the first key, falling;
    # all that any query needs are there. One query needs no spare column.
    columns = queries - 1 + keys + (queries > 1) + spare
    by_distance = np.arange(np.prod(batch, dtype=int) * queries * columns)
    by_distance = by_distance.reshape(*batch, queries, columns)
    found = skew(by_distance, keys)
    assert found.shape == (*batch, queries, keys)
    for i in range(queries):
        for j in range(keys):
            farthest, distance = queries - 1, i - j
            expected = by_distance[..., i, farthest - distance]
            np.testing.assert_array_equal(found[..., i, j], expected)


@settings(deadline=None)
@given(n=st.integers(1, 12))
def test_skew_of_causal_attention_needs_no_negative_distances(n):
    by_distance = np.broadcast_to(np.arange(n - 1, -2, -1), (n, n + 1))
    found = skew(by_distance, n)
    i, j = np.tril_indices(n)
    np.testing.assert_array_equal(found[i, j], i - j)


def softmax_by_row(logits, mask):
    weights = np.zeros_like(logits)
    for row, allowed in enumerate(mask):
        if allowed.any():
            shifted = np.exp(logits[row, allowed] - logits[row, allowed].max())
            weights[row, allowed] = shifted / shifted.sum()
    return weights


def masked_softmax(logits, mask):
    weights, total = softmax_terms(logits, mask)
    assert weights.dtype == total.dtype == jnp.float32
    return weights / total


@pytest.fixture
def logits_and_mask():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(6, 5)).astype(np.float32)
    mask = rng.random((6, 5)) < 0.6
    mask[0], mask[1], mask[2] = False, True, np.arange(5) == 3
    logits[3, mask[3]] += 1e4  # overflows unless the largest is taken off first
    logits[4, mask[4]] -= 1e4
    return logits, mask


def test_masked_softmax_values(logits_and_mask):
    logits, mask = logits_and_mask
    found = np.asarray(masked_softmax(logits, mask))
    expected = softmax_by_row(logits.astype(np.float64), mask)
    # 1e4 leaves a float32 logit three digits behind the point.
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not found[~mask].any()
    assert not found[0].any()


def test_masked_softmax_gradients(logits_and_mask):
    logits, mask = logits_and_mask
    cotangent = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    _, pull = jax.vjp(lambda x: masked_softmax(x, mask), logits)
    found = np.asarray(pull(jnp.asarray(cotangent))[0])
    p = softmax_by_row(logits.astype(np.float64), mask)
    expected = p * (cotangent - (p * cotangent).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not found[~mask].any()
    assert not found[0].any()


def test_masked_softmax_ignores_what_it_masks(logits_and_mask):
    logits, mask = logits_and_mask
    for rubbish in (np.inf, -np.inf, np.nan, 3e38):
        spoilt = np.where(mask, logits, np.float32(rubbish))
        value, pull = jax.vjp(lambda x: masked_softmax(x, mask), spoilt)
        np.testing.assert_array_equal(value, masked_softmax(logits, mask))
        gradient = np.asarray(pull(jnp.ones_like(value))[0])
        assert np.isfinite(gradient).all()
        assert not gradient[~mask].any()


def test_masked_softmax_is_in_float32():
    masked_softmax(jnp.asarray([[0.0, 1e-3]], jnp.bfloat16), jnp.ones((1, 2), bool))


def test_distance_features_are_sines_then_cosines():
    distances, width = np.array([-70, -1, 0, 1, 2047]), 6
    found = np.asarray(distance_features(jnp.asarray(distances), width))
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = distances[:, None] * frequencies
    np.testing.assert_allclose(found[:, :3], np.sin(angles), atol=2e-4)
    np.testing.assert_allclose(found[:, 3:], np.cos(angles), atol=2e-4)


def test_distance_features_need_an_even_width():
    with pytest.raises(ValueError, match="must be even, not 7"):
        distance_features(jnp.arange(3), 7)


def bound(seed=0):
    """A `RelativeAttention` whose parameters are all random."""
    attention = RelativeAttention(HEADS, HEAD_DIM, WIDTH)
    shape = (HEADS, HEAD_DIM)
    shapes = {name: (WIDTH, *shape) for name in ("query", "key", "value", "position")}
    shapes["output"] = (*shape, WIDTH)
    rng = np.random.default_rng(seed)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32)}
        for name, size in shapes.items()
    }
    for name in ("content_bias", "position_bias"):
        params[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return attention.bind({"params": params})


def test_relative_keys_fall_from_the_farthest_pair():
    attention = bound()
    found = attention.relative_keys(4, 7, offset=2)
    features = distance_features(jnp.arange(5, -2, -1), WIDTH)
    kernel = attention.variables["params"]["position"]["kernel"]
    expected = np.einsum("ds,shx->dhx", features, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def attend(attention, queries, source, mask, offset=0, repeats=1):
    num_queries, num_keys = mask.shape[-2:]
    run = num_keys // repeats
    relative = attention.relative_keys(num_queries, num_queries + run, offset)
    return np.asarray(
        attention(
            queries,
            attention.keys_values(source),
            mask=jnp.asarray(mask),
            relative=relative,
            repeats=repeats,
        )
    )


@pytest.fixture
def source():
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(6, WIDTH)), jnp.float32)


def test_a_query_that_sees_nothing_gives_exactly_zero(source):
    mask = np.ones((6, 6), bool)
    mask[2] = False
    found = attend(bound(), source, source, mask)
    assert not found[2].any()
    assert np.abs(found[[0, 1, 3, 4, 5]]).min() > 0


def test_a_query_that_sees_one_key_gives_its_value(source):
    attention = bound()
    mask = np.eye(6, k=-1, dtype=bool)
    found = attend(attention, source, source, mask)
    values = attention.keys_values(source).values
    expected = np.asarray(attention.output(values))
    np.testing.assert_allclose(found[1:], expected[:-1], atol=1e-5)


def test_positions_start_anew_in_each_run_of_keys(source):
    # Two runs of three keys: where one is masked, the other acts as if alone.
    attention, queries = bound(), source[:4]
    for run in range(2):
        keys = slice(3 * run, 3 * run + 3)
        mask = np.zeros((4, 6), bool)
        mask[:, keys] = True
        found = attend(attention, queries, source, mask, offset=2, repeats=2)
        alone = attend(attention, queries, source[keys], mask[:, keys], offset=2)
        np.testing.assert_allclose(found, alone, atol=1e-6)


def test_only_distances_matter():
    # The same six tokens, three places further on and with others before them.
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(9, WIDTH)), jnp.float32)
    mask = np.tril(np.ones((9, 9), bool))
    mask[3:, :3] = False
    found = attend(bound(), x, x, mask)[3:]
    alone = attend(bound(), x[3:], x[3:], mask[3:, 3:])
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_leading_axes_are_a_batch(source):
    attention, mask = bound(), np.tril(np.ones((6, 6), bool))
    stacked = jnp.stack([source, source[::-1]])[None]
    found = attend(attention, stacked, stacked, mask[None, None])
    np.testing.assert_allclose(
        found[0, 1], attend(attention, source[::-1], source[::-1], mask), atol=1e-5
    )
