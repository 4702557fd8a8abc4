"""Inverse cloze examples, and their loss over the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from realm_examples import jit, random_batch, random_realm, small_realm

from realm_retro.parallel import axes, mesh
from realm_retro.realm import ict, model

CONFIG = small_realm(num_layers=1, score_scale=0.3)
BODIES = np.arange(1, 41).reshape(4, 10).astype(np.uint16)
LENGTHS = np.array([10, 8, 5, 0])
SENTENCES = [
    np.array([[0, 3], [3, 9], [9, 10]]),
    np.array([[0, 4], [4, 8]]),
    np.array([[0, 5]]),
    np.zeros((0, 2), int),
]


def make(seed=0, rows=slice(None), **settings):
    rng = np.random.default_rng(seed)
    settings = {"query_length": 4, **settings}
    return ict.ict_examples(
        BODIES[rows], LENGTHS[rows], SENTENCES[rows], rng, **settings
    )


def batch_of(rows=8, seed=0):
    whole = random_batch(CONFIG, rows=rows, k=2, seed=seed)
    names = ("title", "title_len", "body", "body_len")
    return {
        "query": whole["query"],
        "query_len": whole["query_len"],
        **{name: whole[name][:, 1] for name in names},
        "passage": np.arange(rows),
        "removed": np.arange(rows) % 2 == 0,
    }


def loss(params, batch):
    return ict.ict_loss(CONFIG, params, batch, None)


jitted = jit(loss)
gradient = jit(jax.grad(lambda params, batch: loss(params, batch)[0]))


def test_sentence_and_rest_are_the_passage():
    seen = set()
    for seed in range(60):
        found = make(seed, mask_rate=0.5)
        for row in range(4):
            if not found.usable[row]:
                continue
            query = found.query[row, : found.query_len[row]].tolist()
            body = found.body[row, : found.body_len[row]].tolist()
            whole = BODIES[row, : LENGTHS[row]].tolist()
            assert not found.query[row, found.query_len[row] :].any()
            assert not found.body[row, found.body_len[row] :].any()
            fitting = [
                (start, end)
                for start, end in SENTENCES[row].tolist()
                if whole[start:end][:4] == query
            ]
            assert len(fitting) == 1
            ((start, end),) = fitting
            assert found.truncated[row] == max(0, end - start - 4)
            kept = whole[:start] + whole[end:] if found.removed[row] else whole
            assert body == kept
            seen.add((row, start, bool(found.removed[row])))
    # Every sentence of every passage was a query, removed and not.
    assert len(seen) == 2 * 3 + 2 * 2 + 1


def test_removed_as_often_as_asked():
    bodies, lengths = np.ones((4000, 4), int), np.full(4000, 4)
    sentences = [np.array([[0, 2], [2, 4]])] * 4000
    found = ict.ict_examples(
        bodies, lengths, sentences, np.random.default_rng(0), query_length=2
    )
    assert found.removed.mean() == pytest.approx(0.9, abs=0.02)
    assert found.usable.all()


def test_a_passage_of_one_sentence_cannot_lose_it():
    assert make(mask_rate=1.0).usable.tolist() == [True, True, False, False]
    assert make(mask_rate=0.0).usable.tolist() == [True, True, True, False]
    assert not make(mask_rate=1.0).removed[2:].any()


def test_same_seed_same_examples_and_rows_do_not_disturb_each_other():
    found, again = make(3), make(3)
    np.testing.assert_array_equal(found.query, again.query)
    first = make(3, slice(0, 2))
    np.testing.assert_array_equal(found.query[:2], first.query)
    np.testing.assert_array_equal(found.body[:2], first.body)


def test_gradient_reaches_both_towers():
    params = random_realm(CONFIG, model.TOWERS)
    found = gradient(params, batch_of())
    for part in model.TOWERS:
        assert np.abs(found[part]["projection"]["kernel"]).max() > 1e-4, part


def test_negatives_come_from_all_devices():
    params, batch = random_realm(CONFIG, model.TOWERS), batch_of()
    devices = mesh.make_mesh()
    assert devices.size == 8
    placed = {
        name: jax.device_put(
            value, axes.sharding(ict.BATCH_SPEC[name], value.shape, devices)
        )
        for name, value in batch.items()
    }

    @jit
    def run(params, batch):
        with mesh.active(devices):
            return loss(params, batch)

    found, wanted = run(params, placed), jitted(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    alone = {name: value[:1] for name, value in batch.items()}
    assert jitted(params, alone)[0] == pytest.approx(0, abs=1e-5)
    assert wanted[0] > 1


def test_a_missing_row_is_neither_query_nor_negative():
    params, batch = random_realm(CONFIG, model.TOWERS), batch_of()
    rest = {name: np.delete(value, 2, axis=0) for name, value in batch.items()}
    batch["passage"][2] = -1
    found, wanted = jitted(params, batch), jitted(params, rest)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    batch["passage"][:] = -1
    slopes = gradient(params, batch)
    assert all(not leaf.any() for leaf in jax.tree.leaves(slopes))


def test_the_same_passage_elsewhere_is_no_negative():
    # Rows 0 and 1 hold the same passage: only row 2 stands against them.
    vectors = jnp.eye(3)[np.array([0, 0, 1])]
    passage = jnp.array([5, 5, 6])
    removed = jnp.ones(3, bool)
    total, _, further = ict.in_batch_loss(vectors, vectors, passage, removed)
    one, two = (np.log(1 + n * np.exp(-1.0)) for n in (1, 2))
    assert float(total) == pytest.approx(2 * one + two, rel=1e-6)
    assert further["accuracy"] == (3, 3)
    total, _, _ = ict.in_batch_loss(vectors, vectors, jnp.arange(3), removed)
    assert float(total) > 2 * one + two + 0.5


def test_batch_spec_names_every_axis():
    batch = batch_of()
    assert set(ict.BATCH_SPEC) == set(batch)
    for name, value in batch.items():
        assert len(ict.BATCH_SPEC[name]) == value.ndim, name
