"""REALM agrees with `realm_reference`, which was written from the papers alone.

A difference here means that the model computes something else than REALM. Do not relax
the tolerance: float32 against float64 needs no more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import realm_reference as reference
from realm_examples import jit, random_batch, random_realm, small_realm

from realm_retro.realm import model, objective, packing, reader
from realm_retro.realm.ict import in_batch_loss

TOLERANCE = 1e-5

CONFIGS = {
    "paper": small_realm(projection_norm=False, score_scale=0.1),
    "released_code": small_realm(
        pooler=True, document_types=True, marginal="per_token", score_scale=0.5
    ),
    "sentence_encoder": small_realm(
        pooling="mean", embed_dim=0, normalise=True, tied=True, score_scale=5.0
    ),
}


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 or bfloat16 products where the tests run on an accelerator."""
    with jax.default_matmul_precision("highest"):
        yield


def assert_close(found, expected, tolerance=TOLERANCE):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@functools.cache
def compiled(config):
    def loss(params, batch):
        return objective.pretrain_loss(config, params, batch, jax.random.key(0))

    return jit(loss)


def loss_of(config, params, batch):
    return compiled(config)(params, batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_metrics(name):
    config = CONFIGS[name]
    params, batch = random_realm(config), random_batch(config)
    total, weight, further = loss_of(config, params, batch)
    exact = reference.as_float64(params)
    rows = len(batch["query"])
    expected = {key: [0.0, 0.0] for key in further}

    def add(key, value, weight=1.0):
        expected[key][0] += value
        expected[key][1] += weight

    wanted = 0.0
    for row in range(rows):
        prior, tokens = reference.example(exact, config, batch, row)
        y = {z: sum(values) for z, values in tokens.items()}
        likelihood = reference.log_likelihood(prior, tokens, config.marginal)
        wanted -= likelihood
        posterior = {z: prior[z] + y[z] for z in prior}
        evidence = np.log(sum(np.exp(v) for v in posterior.values()))
        posterior = {z: v - evidence for z, v in posterior.items()}
        add("mlm", -likelihood, len(tokens[0]))
        add("null_mlm", -y[0], len(tokens[0]))
        add("gain", likelihood - y[0])
        add("null_prior", np.exp(prior[0]))
        add("null_posterior", np.exp(posterior[0]))
        add("prior_entropy", -sum(np.exp(v) * v for v in prior.values()))
        add("posterior_entropy", -sum(np.exp(v) * v for v in posterior.values()))
        add("retrieved", len(prior) - 1)
        for z in list(prior)[1:]:
            add("utility", y[z] - y[0])
    assert weight == rows
    assert_close(total, wanted)
    for key, pair in expected.items():
        assert_close(np.asarray(further[key]), np.array(pair))


def test_the_two_marginals_differ_beyond_one_target():
    config, other = small_realm(), small_realm(marginal="per_token")
    params, batch = random_realm(config), random_batch(config)
    assert batch["target_mask"].sum(1).max() > 1
    joint, per_token = (loss_of(c, params, batch)[0] for c in (config, other))
    assert abs(joint - per_token) > 0.01
    batch["target_mask"] = np.arange(config.max_masks)[None, :] < np.ones((3, 1))
    joint, per_token = (loss_of(c, params, batch)[0] for c in (config, other))
    np.testing.assert_allclose(joint, per_token, rtol=1e-6)


def test_gradient_weights_are_the_papers_and_autodiffs():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 5)).astype(np.float32)
    tokens = (-2 * rng.random((3, 5, 4))).astype(np.float32)
    valid = np.ones((3, 5), bool)
    valid[1, 3:] = False
    mask = np.arange(4)[None, :] < np.array([[1], [4], [3]])

    def prior_of(scores):
        # d = 1 and a query of 1: the score is the document's only number.
        query = jnp.ones((3, 1))
        return objective.log_prior(query, scores[..., None], jnp.asarray(valid))

    def likelihood(scores):
        prior = prior_of(scores)
        return objective.marginal_log_likelihood(prior, tokens, mask).sum()

    found = objective.gradient_weights(prior_of(scores), tokens, mask)
    for row in range(3):
        there = np.flatnonzero(valid[row])
        p = np.exp(scores[row, there].astype(np.float64))
        p /= p.sum()
        y = [np.exp(tokens[row, z][mask[row]].astype(float).sum()) for z in there]
        marginal = sum(p * y)
        expected = np.zeros(5)
        expected[there] = [(y[i] / marginal - 1) * p[i] for i in range(len(there))]
        assert_close(found[row], expected)
    # Appendix A: r(z) is the derivative of log p(y | x) by the score f(x, z).
    assert_close(jax.jit(jax.grad(likelihood))(scores), np.asarray(found))


@pytest.mark.parametrize("form", ["joint", "per_token"])
def test_the_null_document_alone_is_a_plain_masked_lm(form):
    config = small_realm(marginal=form)
    params, batch = random_realm(config), random_batch(config, k=1)
    exact = reference.as_float64(params)
    wanted = 0.0
    for row in range(3):
        x = list(batch["query"][row][: batch["query_len"][row]])
        tokens = [reference.CLS, *x, reference.SEP, reference.SEP]
        types = [0] * (len(x) + 2) + [1]
        for j in np.flatnonzero(batch["target_mask"][row]):
            place = batch["mask_positions"][row, j] + 1
            found = reference.predict(exact["encoder"], config, tokens, types, place)
            wanted -= found[batch["targets"][row, j]]
    total, weight, further = loss_of(config, params, batch)
    assert_close(total, wanted)
    assert weight == 3
    assert further["null_prior"] == (3, 3)
    assert further["utility"] == (0, 0)


def test_a_masked_duplicate_is_as_if_it_were_not_there():
    config = small_realm()
    params, batch = random_realm(config), random_batch(config, k=3)
    batch["valid"][:] = True
    wanted, _, expected = loss_of(config, params, batch)
    more = {
        name: np.concatenate([value, value[:, 2:]], axis=1)
        if name in ("title", "title_len", "body", "body_len", "valid")
        else value
        for name, value in batch.items()
    }
    counted_twice = loss_of(config, params, more)[0]
    assert abs(counted_twice - wanted) > 1e-3
    more["valid"][:, 3] = False
    found, _, further = loss_of(config, params, more)
    assert_close(found, np.asarray(wanted))
    for key, pair in further.items():
        assert_close(np.asarray(pair), np.asarray(expected[key]))


def test_bfloat16_inputs_are_summed_in_float32():
    rng = np.random.default_rng(2)
    query = jnp.asarray(rng.normal(size=(2, 64)), jnp.bfloat16)
    documents = jnp.asarray(3 * rng.normal(size=(2, 6, 64)), jnp.bfloat16)
    tokens = jnp.asarray(-3 * rng.random((2, 6, 4)), jnp.bfloat16)
    mask = np.ones((2, 4), bool)
    prior = objective.log_prior(query, documents, jnp.ones((2, 6), bool))
    assert prior.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in (query, documents, tokens)]
    for row in range(2):
        expected = reference.log_softmax(exact[1][row] @ exact[0][row])
        assert_close(prior[row], expected)
        for form in ("joint", "per_token"):
            found = objective.marginal_log_likelihood(prior, tokens, mask, form)
            by_candidate = dict(enumerate(expected))
            likelihood = reference.log_likelihood(
                by_candidate, dict(enumerate(exact[2][row])), form
            )
            assert found.dtype == jnp.float32
            assert_close(found[row], likelihood)


def test_derivative_by_every_part():
    # Finite differences of the reference along a random direction of each part.
    config = small_realm(score_scale=0.3, num_layers=1)
    params, direction = random_realm(config), random_realm(config, seed=5)
    batch = random_batch(config, rows=1, k=3)

    @jit
    @jax.grad
    def gradient(params):
        return objective.pretrain_loss(config, params, batch, None)[0]

    def moved(part, step):
        exact = reference.as_float64(params)
        exact[part] = jax.tree.map(
            lambda p, v: p + step * np.asarray(v, np.float64),
            exact[part],
            direction[part],
        )
        found = reference.example(exact, config, batch, 0)
        return -reference.log_likelihood(*found, "joint")

    found = gradient({part: params[part] for part in model.PRETRAINING})
    for part in model.PRETRAINING:
        slope = (moved(part, 1e-5) - moved(part, -1e-5)) / 2e-5
        assert abs(slope) > 1e-3, "nothing to compare"
        products = jax.tree.map(np.vdot, found[part], direction[part])
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-3)


@pytest.mark.parametrize("form", ["joint", "per_token"])
def test_derivative_of_the_marginal(form):
    rng = np.random.default_rng(4)
    scores, tokens = rng.normal(size=4), -2 * rng.random((4, 3))
    moves = rng.normal(size=4), rng.normal(size=(4, 3))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(scores, tokens):
        prior = jax.nn.log_softmax(scores)[None]
        mask = jnp.ones((1, 3), bool)
        return objective.marginal_log_likelihood(prior, tokens[None], mask, form)[0]

    def moved(step):
        prior = reference.log_softmax(scores + step * moves[0])
        each = tokens + step * moves[1]
        return reference.log_likelihood(
            dict(enumerate(prior)), dict(enumerate(each)), form
        )

    found = gradient(scores.astype(np.float32), tokens.astype(np.float32))
    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert_close(sum(np.vdot(g, v) for g, v in zip(found, moves, strict=True)), slope)


def test_span_scores():
    config = small_realm()
    params = random_realm(config)
    batch = random_batch(config)
    query = np.broadcast_to(batch["query"][:, None], (3, 4, config.query_length))
    length = np.broadcast_to(batch["query_len"][:, None], (3, 4))
    body, body_len = batch["body"], batch["body_len"]
    scores, legal = jit(
        lambda params: reader.score_spans(config, params, query, length, body, body_len)
    )(params)
    table = reader.spans(config.joint_tokens, config.span_width)
    assert scores.shape == legal.shape == (3, 4, len(table))
    exact = reference.as_float64(params["reader"])
    compared = 0
    for row, z in np.ndindex(3, 4):
        x, n = list(query[row, z][: length[row, z]]), int(body_len[row, z])
        tokens = [reference.CLS, *x, reference.SEP, *body[row, z][:n], reference.SEP]
        types = [0] * (len(x) + 2) + [1] * (n + 1)
        expected = reference.span_scores(exact, config, tokens, types)
        first = len(x) + 2
        allowed = {
            span for span in expected if span[0] >= first and span[1] <= first + n
        }
        assert {tuple(s) for s in table[np.asarray(legal[row, z])].tolist()} == allowed
        for index in np.flatnonzero(legal[row, z]):
            assert_close(scores[row, z, index], expected[tuple(table[index].tolist())])
            compared += 1
    assert compared > 50


def test_inverse_cloze_loss():
    rng = np.random.default_rng(3)
    queries, documents = rng.normal(size=(2, 5, 6))
    passage = np.array([7, 3, 7, -1, 4])
    removed = np.array([True, True, False, True, True])
    total, weight, further = in_batch_loss(
        *(jnp.asarray(x, jnp.float32) for x in (queries, documents)),
        jnp.asarray(passage),
        jnp.asarray(removed),
        0.7,
    )
    wanted, right, right_removed = 0.0, 0, 0
    for i in (0, 1, 2, 4):
        others = [j for j in range(5) if passage[j] not in (-1, passage[i])]
        scores = [0.7 * queries[i] @ documents[j] for j in (i, *others)]
        wanted -= reference.log_softmax(np.array(scores))[0]
        right += scores[0] == max(scores)
        right_removed += removed[i] and scores[0] == max(scores)
    assert_close(total, wanted)
    assert weight == 4
    assert further["accuracy"] == (right, 4)
    assert further["accuracy_removed"] == (right_removed, 3)


def test_packing_against_lists():
    config = small_realm()
    batch = random_batch(config)
    found = jit(packing.document_inputs)(
        *(batch[name] for name in ("title", "title_len", "body", "body_len"))
    )
    for row, z in np.ndindex(batch["valid"].shape):
        title = batch["title"][row, z][: batch["title_len"][row, z]]
        body = batch["body"][row, z][: batch["body_len"][row, z]]
        wanted = [101, *title, 102, *body, 102] if z else [101, 102]
        ids, mask = (np.asarray(x[row, z]) for x in found)
        assert mask.sum() == len(wanted)
        assert mask[: len(wanted)].all()
        assert ids[mask].tolist() == wanted
        assert not ids[~mask].any()
