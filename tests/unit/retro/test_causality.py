"""What each output may depend on, what it must depend on, and what must not matter.

Dependence is read from gradients: all tokens of a sequence are distinct and the logits
that are differentiated are those of tokens that do not occur, so that the gradient of
row ``tokens[q]`` of the (tied) embedding table is that of the input at position q.
Numbers that must agree to the last bit come from one compiled program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retro_examples import Example, jit, random_example, random_params, small_config

from realm_retro.nn import losses
from realm_retro.retro.model import Retro

CONFIG = small_config(num_layers=2, cca_layers=(1, 2), encoder_layers=1)
MODEL = Retro(CONFIG)
M, R, CHUNKS, K = CONFIG.chunk_length, CONFIG.neighbour_length, 4, 2
N = M * CHUNKS
UNUSED = np.arange(N, CONFIG.vocab_size)

POSITIONS = np.arange(N)
CAUSAL = POSITIONS[:, None] >= POSITIONS[None, :]
# Ret(C_u) is used from the last token of chunk u on, and not by the one before.
USES_NEIGHBOURS = POSITIONS[:, None] >= M * np.arange(1, CHUNKS + 1)[None, :] - 1


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def x():
    """One sequence of distinct tokens; neighbour j of chunk u is all token u K + j."""
    rng = np.random.default_rng(0)
    own = np.arange(CHUNKS * K).reshape(1, CHUNKS, K, 1)
    return random_example(CONFIG, batch=1, k=K)._replace(
        tokens=rng.permutation(N)[None].astype(np.int32),
        segments=np.zeros((1, N), np.int32),
        neighbours=np.broadcast_to(own, (1, CHUNKS, K, R)).astype(np.int32),
        neighbour_mask=np.ones((1, CHUNKS, K, R), bool),
    )


def inputs(x: Example, on: bool = True) -> tuple:
    neighbours = (x.neighbours, x.neighbour_mask) if on else (None, None)
    return (x.tokens, x.segments, *neighbours)


def apply(params, inputs):
    return MODEL.apply({"params": params}, *inputs)


# Compiled once for each shape, ON and OFF.
forward = jit(apply)


@jit
def gradient(params, inputs, at):
    """Of a random mixture of the logits at the positions that `at` weighs."""
    mixture = np.random.default_rng(9).normal(size=UNUSED.size).astype(np.float32)
    return jax.grad(
        lambda params: at @ (apply(params, inputs)[0][:, UNUSED] @ mixture)
    )(params)


def dependence(params, x, on=True):
    """Which positions depend on which tokens [n, n], and on which neighbours [n, l, K].

    Neighbours are None where it does not retrieve.
    """
    by_token, by_neighbour = [], []
    for p in POSITIONS:
        found = gradient(params, inputs(x, on), np.eye(N, dtype=np.float32)[p])
        rows = np.asarray(found["embed"]["table"])[x.tokens[0]]
        by_token.append(np.abs(rows).sum(-1) > 0)
        rows = np.asarray(found["encoder"]["embed"]["table"])[x.neighbours[0, :, :, 0]]
        by_neighbour.append(np.abs(rows).sum(-1) > 0)
    return np.array(by_token), np.array(by_neighbour)


def test_outputs_depend_on_all_that_came_before_and_nothing_after(params, x):
    by_token, by_neighbour = dependence(params, x)
    np.testing.assert_array_equal(by_token, CAUSAL)
    expected = np.broadcast_to(USES_NEIGHBOURS[:, :, None], by_neighbour.shape)
    np.testing.assert_array_equal(by_neighbour, expected)


def test_without_retrieval_they_depend_on_the_same_tokens(params, x):
    by_token, by_neighbour = dependence(params, x, on=False)
    np.testing.assert_array_equal(by_token, CAUSAL)
    assert not by_neighbour.any()


def test_documents_of_a_window_do_not_see_each_other(params, x):
    # Two chunks each; the neighbours of the first document's last chunk are dropped,
    # as `retro.batches` does.
    segments = POSITIONS // (2 * M)
    mask = x.neighbour_mask.copy()
    mask[:, 1] = False
    packed = x._replace(segments=segments[None], neighbour_mask=mask)
    by_token, by_neighbour = dependence(params, packed)
    same = segments[:, None] == segments[None, :]
    np.testing.assert_array_equal(by_token, CAUSAL & same)
    same = segments[:, None] == (np.arange(CHUNKS) // 2)[None, :]
    expected = USES_NEIGHBOURS & same & (np.arange(CHUNKS) != 1)
    np.testing.assert_array_equal(by_neighbour[:, :, 0], expected)
    np.testing.assert_array_equal(by_neighbour[:, :, 1], expected)


@pytest.mark.parametrize("on", [True, False])
def test_a_changed_token_leaves_earlier_outputs_to_the_last_bit(params, x, on):
    base = np.asarray(forward(params, inputs(x, on)))[0]
    for q in range(N):
        tokens = x.tokens.copy()
        tokens[0, q] = UNUSED[q]
        found = np.asarray(forward(params, inputs(x._replace(tokens=tokens), on)))[0]
        np.testing.assert_array_equal(found[:q], base[:q])
        assert np.abs(found[q:] - base[q:]).max(axis=-1).min() > 0


def test_no_neighbours_reach_the_first_tokens(params, x):
    base = np.asarray(forward(params, inputs(x)))[0]
    other = x._replace(neighbours=x.neighbours + CHUNKS * K)
    missing = x._replace(neighbour_mask=np.zeros_like(x.neighbour_mask))
    for changed in (other, missing):
        found = np.asarray(forward(params, inputs(changed)))[0]
        np.testing.assert_array_equal(found[: M - 1], base[: M - 1])
        assert np.abs(found - base)[M - 1 :].max(axis=-1).min() > 1e-3


def test_missing_neighbours_are_retrieval_off(params, x):
    missing = x._replace(neighbour_mask=np.zeros_like(x.neighbour_mask))
    found = forward(params, inputs(missing))
    assert np.isfinite(found).all()
    # Two programs, so not to the last bit; that CCA adds exactly zero is in test_cca.
    np.testing.assert_allclose(found, forward(params, inputs(x, on=False)), atol=1e-5)


def test_missing_neighbours_train_nothing_that_reads_them(params, x):
    missing = x._replace(neighbour_mask=np.zeros_like(x.neighbour_mask))
    for example, wanted in ((x, True), (missing, False)):
        found = gradient(params, inputs(example), np.ones(N, np.float32))
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            name = jax.tree_util.keystr(path)
            reads = "encoder" in name or "cross" in name
            assert np.isfinite(leaf).all(), name
            assert bool(np.any(leaf)) == (wanted or not reads), name


def test_the_order_of_neighbours_does_not_matter(params):
    x = random_example(CONFIG, batch=1, k=K)
    turned = x._replace(
        neighbours=x.neighbours[:, :, ::-1], neighbour_mask=x.neighbour_mask[:, :, ::-1]
    )
    found, expected = forward(params, inputs(turned)), forward(params, inputs(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_takes_more_neighbours_than_it_was_trained_with(params):
    x = random_example(CONFIG, batch=1, k=K)
    more = random_example(CONFIG, batch=1, k=5, seed=3)
    mask = np.concatenate([x.neighbour_mask, more.neighbour_mask], axis=2)
    neighbours = np.concatenate([x.neighbours, more.neighbours], axis=2)
    found = forward(params, (x.tokens, x.segments, neighbours, mask))
    expected = forward(params, inputs(x))
    assert np.abs(found - expected)[0, M - 1 :].max(axis=-1).min() > 1e-3
    # A missing neighbour is none at all.
    mask[:, :, K:] = False
    found = forward(params, (x.tokens, x.segments, neighbours, mask))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_padding_may_be_any_token(params):
    x = random_example(CONFIG, batch=1, k=K)
    other = (x.neighbours + 1) % CONFIG.vocab_size
    spoilt = x._replace(neighbours=np.where(x.neighbour_mask, x.neighbours, other))
    assert (spoilt.neighbours != x.neighbours).any()
    found, expected = forward(params, inputs(spoilt)), forward(params, inputs(x))
    np.testing.assert_array_equal(found, expected)


def test_bfloat16_is_close_to_float32(params):
    x = random_example(CONFIG, batch=1, k=K)
    model = Retro(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    found = jit(model.apply)({"params": params}, *inputs(x))
    expected = np.asarray(forward(params, inputs(x)))
    assert found.dtype == jnp.bfloat16
    error = np.asarray(found, np.float32) - expected
    # Eight bits a number, some twenty roundings deep.
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(expected**2))
    mean = [
        np.divide(*losses.cross_entropy(logits, x.targets, x.loss_mask))
        for logits in (found, expected)
    ]
    assert abs(mean[0] - mean[1]) < 0.02


@functools.partial(jit, static_argnames="room")
def one_step(variables, token, position, neighbours, mask, *, room):
    return Retro(CONFIG, decode_length=room).apply(
        variables, token, position, neighbours, mask, method="step", mutable=["cache"]
    )


@pytest.mark.parametrize("on", [pytest.param(True, marks=pytest.mark.slow), False])
def test_steps_with_a_cache_equal_the_whole_pass(params, on):
    # A chunk's neighbours arrive with the token that completes it: that token already
    # attends to them. One row misses all of them for its second chunk.
    x = random_example(CONFIG, batch=2, k=K)
    x = x._replace(segments=np.zeros_like(x.segments))
    assert not x.neighbour_mask[-1, 1].any()
    expected = np.asarray(forward(params, inputs(x, on)))
    variables, mask = {"params": params}, None
    for p in range(N):
        neighbours = None
        if on and (p + 1) % M == 0:
            neighbours, mask = x.neighbours[:, p // M], x.neighbour_mask[:, p // M]
        found, updates = one_step(
            variables, x.tokens[:, p], jnp.int32(p), neighbours, mask, room=N + 3
        )
        variables = {"params": params, **updates}
        np.testing.assert_allclose(found, expected[:, p], atol=1e-4, err_msg=f"{p=}")
