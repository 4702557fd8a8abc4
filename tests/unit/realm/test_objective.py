"""The loss where something is missing, and which weights it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from realm_examples import jit, random_batch, random_realm, small_realm

from realm_retro.parallel import axes, mesh
from realm_retro.realm import model, objective

CONFIG = small_realm(num_layers=1, score_scale=0.3)
PARAMS = random_realm(CONFIG, model.PRETRAINING)


def loss(params, batch, config=CONFIG):
    return objective.pretrain_loss(config, params, batch, jax.random.key(0))


jitted = jit(loss)


@jit
def gradient(params, batch):
    return jax.grad(lambda params: loss(params, batch)[0])(params)


def assert_same(found, expected, atol=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def test_gradient_reaches_both_towers_and_the_encoder():
    found = gradient(PARAMS, random_batch(CONFIG))
    for part in model.PRETRAINING:
        kernel = found[part]["bert"]["layers"]["up"]["kernel"]
        assert np.abs(kernel).max() > 1e-4, part
    for part in model.TOWERS:
        assert np.abs(found[part]["projection"]["kernel"]).max() > 1e-4, part


def test_what_stands_at_padding_changes_nothing():
    batch = random_batch(CONFIG)
    wanted, slope = jitted(PARAMS, batch), gradient(PARAMS, batch)
    other = random_batch(CONFIG, seed=9)

    def behind(name, length):
        place = np.arange(batch[name].shape[-1])
        return np.where(place < batch[length][..., None], batch[name], other[name])

    gone = ~batch["valid"][..., None]
    rubbish = {
        **batch,
        "query": behind("query", "query_len"),
        "title": np.where(gone, other["title"], behind("title", "title_len")),
        "body": np.where(gone, other["body"], behind("body", "body_len")),
        "mask_positions": np.where(batch["target_mask"], batch["mask_positions"], -77),
        "targets": np.where(batch["target_mask"], batch["targets"], -1),
    }
    for name in ("query", "title", "body", "targets"):
        assert (rubbish[name] != batch[name]).any(), name
    assert_same(jitted(PARAMS, rubbish), wanted)
    assert_same(gradient(PARAMS, rubbish), slope)


def test_nothing_in_the_null_documents_place_is_looked_at():
    batch = random_batch(CONFIG)
    wanted = jitted(PARAMS, batch)
    lengths = {
        name: np.concatenate([batch[name][:, :1] + 2, batch[name][:, 1:]], axis=1)
        for name in ("title_len", "body_len")
    }
    assert_same(jitted(PARAMS, {**batch, **lengths}), wanted, atol=0)


def test_an_example_without_targets_weighs_nothing():
    batch = random_batch(CONFIG)
    empty = {**batch, "target_mask": batch["target_mask"].copy()}
    empty["target_mask"][1] = False
    rest = {name: np.delete(value, 1, axis=0) for name, value in batch.items()}
    found = jitted(PARAMS, empty)
    assert found[1] == 2
    assert_same(found, jitted(PARAMS, rest))
    nothing = {**batch, "target_mask": np.zeros_like(batch["target_mask"])}
    total, weight, further = jitted(PARAMS, nothing)
    assert (total, weight) == (0, 0)
    assert all(pair == (0, 0) for pair in further.values())
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient(PARAMS, nothing)))


def test_without_any_candidate_loss_and_gradient_are_zero():
    batch = random_batch(CONFIG)
    batch["valid"][1] = False
    total, weight, further = jitted(PARAMS, batch)
    rest = {name: np.delete(value, 1, axis=0) for name, value in batch.items()}
    assert_same((total, weight, further), jitted(PARAMS, rest))
    batch["valid"][:] = False
    assert jitted(PARAMS, batch)[:2] == (0, 0)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient(PARAMS, batch)))


@pytest.mark.parametrize("form", ["joint", "per_token"])
def test_marginal_of_empty_rows_is_zero_with_gradient_zero(form):
    valid = jnp.array([[True, False], [False, False], [True, True]])
    mask = jnp.array([[True, False], [True, True], [False, False]])
    tokens = jnp.full((3, 2, 2), -1.5)

    def total(scores, tokens):
        prior = objective.log_prior(jnp.ones((3, 1)), scores[..., None], valid)
        each = objective.marginal_log_likelihood(prior, tokens, mask, form)
        return each.sum(), each

    scores = jnp.array([[0.0, 5.0], [1.0, 2.0], [3.0, 4.0]])
    (_, each), slopes = jax.value_and_grad(total, (0, 1), has_aux=True)(scores, tokens)
    np.testing.assert_allclose(each, [-1.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(slopes[0], np.zeros((3, 2)), atol=1e-6)
    np.testing.assert_allclose(slopes[1][0], [[1, 0], [0, 0]], atol=1e-6)
    assert not np.asarray(slopes[1][1:]).any()


@pytest.mark.parametrize("form", ["joint", "per_token"])
def test_a_row_of_minus_infinity_has_no_gradient(form):
    # Whoever makes the prior: nothing upstream is there to stop a NaN.
    prior = jnp.array([[-jnp.inf, -jnp.inf], [-0.5, -1.0]])
    tokens, mask = jnp.full((2, 2, 3), -1.0), jnp.ones((2, 3), bool)

    def total(prior):
        found = objective.marginal_log_likelihood(prior, tokens, mask, form)
        posterior = objective.log_posterior(prior, tokens, mask)
        return found.sum() + posterior[1, 0]

    slope = jax.grad(total)(prior)
    assert np.asarray(slope[0]).tolist() == [0, 0]
    assert np.isfinite(slope[1]).all()


def test_scores_far_apart_stay_finite():
    valid = jnp.ones((1, 3), bool)
    scores = jnp.array([[[1e4], [0.0], [-1e4]]])
    prior = objective.log_prior(jnp.ones((1, 1)), scores, valid)
    np.testing.assert_allclose(prior, [[0, -1e4, -2e4]])
    tokens = jnp.array([[[-2e4], [-1.0], [0.0]]])
    mask = jnp.ones((1, 1), bool)
    found = objective.marginal_log_likelihood(prior, tokens, mask)
    np.testing.assert_allclose(found, -10_001)


def test_pieces_of_a_batch_add_up():
    batch = random_batch(CONFIG, rows=4)
    halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    found = jax.tree.map(jnp.add, *(jitted(PARAMS, piece) for piece in halves))
    assert_same(found, jitted(PARAMS, batch))


def test_any_mesh_gives_the_same():
    batch = random_batch(CONFIG, rows=4)
    devices = mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
    params = jax.device_put(PARAMS, axes.shardings(boxed, devices))
    placed = {
        name: jax.device_put(
            value, axes.sharding(objective.BATCH_SPEC[name], value.shape, devices)
        )
        for name, value in batch.items()
    }

    @jit
    def run(params, batch):
        with mesh.active(devices):
            return loss(params, batch)

    assert_same(run(params, placed), jitted(PARAMS, batch))


def test_batch_spec_names_every_axis():
    batch = random_batch(CONFIG)
    assert set(objective.BATCH_SPEC) == set(batch)
    for name, value in batch.items():
        assert len(objective.BATCH_SPEC[name]) == value.ndim, name


def test_a_helpful_document_is_seen_in_the_metrics():
    # Document 1 makes the target certain, document 2 does nothing.
    prior = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    tokens = jnp.log(jnp.array([[[0.1], [1.0], [0.1]]]))
    found = objective.metrics(prior, tokens, jnp.ones((1, 1), bool))
    means = {name: float(total / weight) for name, (total, weight) in found.items()}
    marginal = 0.5 * 0.1 + 0.25 + 0.25 * 0.1
    assert means["mlm"] == pytest.approx(-np.log(marginal))
    assert means["utility"] == pytest.approx(np.log(10) / 2)
    assert means["gain"] == pytest.approx(np.log(marginal / 0.1))
    assert means["null_prior"] == pytest.approx(0.5)
    assert means["null_posterior"] == pytest.approx(0.05 / marginal)
    weights = objective.gradient_weights(prior, tokens, jnp.ones((1, 1), bool))
    assert weights[0, 1] > 0 > weights[0, 2]
    assert float(weights.sum()) == pytest.approx(0, abs=1e-6)
