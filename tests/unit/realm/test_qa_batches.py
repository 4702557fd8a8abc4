"""What a batch of questions may hold, and which weights its loss reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qa_examples import random_qa_batch
from realm_examples import jit, random_realm, small_realm

from realm_retro.parallel import axes, mesh
from realm_retro.realm import model, qa, reader
from realm_retro.text import answers

CONFIG = small_realm(num_layers=1, score_scale=0.3)
PARAMS = random_realm(CONFIG, model.FINETUNING)


def loss(params, batch, train_documents=False):
    key = jax.random.key(0)
    return qa.finetune_loss(CONFIG, params, batch, key, train_documents=train_documents)


frozen = jit(loss)
full = jit(lambda params, batch: loss(params, batch, train_documents=True))


def assert_same(found, expected, atol=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("train_documents", [False, True])
def test_the_gradient_reaches_what_is_trained(train_documents):
    batch = random_qa_batch(CONFIG)
    slope = jit(jax.grad(lambda p: loss(p, batch, train_documents)[0]))(PARAMS)
    for part in ("query", "reader"):
        assert largest(slope[part]["bert"]["layers"]) > 1e-4, part
    moved = largest(slope["document"])
    assert moved > 1e-4 if train_documents else moved == 0


def test_a_frozen_index_needs_neither_titles_nor_the_document_tower():
    batch = random_qa_batch(CONFIG)
    lean = {name: batch[name] for name in qa.BATCH_SPEC}
    params = {name: PARAMS[name] for name in ("query", "reader")}
    assert_same(frozen(params, lean), frozen(PARAMS, batch), atol=0)
    assert set(batch) == {*qa.BATCH_SPEC, *qa.TITLE_SPEC}
    for name, names in {**qa.BATCH_SPEC, **qa.TITLE_SPEC}.items():
        assert len(names) == batch[name].ndim, name


def test_what_stands_at_padding_changes_nothing():
    batch = random_qa_batch(CONFIG)
    other = random_qa_batch(CONFIG, seed=9)

    def behind(name, length):
        place = np.arange(batch[name].shape[-1])
        return np.where(place < batch[length][..., None], batch[name], other[name])

    gone = ~batch["beam_valid"]
    read_gone = np.take_along_axis(gone, batch["slots"], axis=1)[..., None]
    rubbish = {
        **batch,
        "query": behind("query", "query_len"),
        "title": np.where(read_gone, other["title"], behind("title", "title_len")),
        "body": np.where(read_gone, other["body"], behind("body", "body_len")),
        "beam_vectors": np.where(
            gone[..., None], 1e3 * other["beam_vectors"], batch["beam_vectors"]
        ),
        "beam_has": batch["beam_has"] | gone,
        "correct": batch["correct"] | read_gone[..., None],
    }
    for name in ("query", "title", "body", "beam_vectors", "beam_has", "correct"):
        assert (rubbish[name] != batch[name]).any(), name
    assert_same(frozen(PARAMS, rubbish), frozen(PARAMS, batch))
    assert_same(full(PARAMS, rubbish), full(PARAMS, batch))


def test_fresh_vectors_in_the_beam_give_the_same_either_way():
    batch = random_qa_batch(CONFIG)
    ids, mask = qa.packing.document_inputs(
        *(batch[name] for name in ("title", "title_len", "body", "body_len"))
    )
    vectors = np.array(batch["beam_vectors"])
    fresh = jit(lambda params: model.embed_documents(CONFIG, params, ids, mask))(PARAMS)
    np.put_along_axis(vectors, batch["slots"][..., None], np.asarray(fresh), axis=1)
    assert (vectors != batch["beam_vectors"]).any()
    assert_same(frozen(PARAMS, {**batch, "beam_vectors": vectors}), full(PARAMS, batch))


def test_a_batch_is_the_sum_of_its_parts():
    batch = random_qa_batch(CONFIG, rows=8)
    halves = [
        frozen(PARAMS, {name: value[half] for name, value in batch.items()})
        for half in (slice(0, 4), slice(4, 8))
    ]
    assert_same(jax.tree.map(jnp.add, *halves), frozen(PARAMS, batch))


def test_any_mesh_gives_the_same():
    batch = random_qa_batch(CONFIG, rows=8)
    devices = mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(
        lambda: model.init(CONFIG, jax.random.key(0), model.FINETUNING)
    )
    params = jax.device_put(PARAMS, axes.shardings(boxed, devices))
    placed = {
        name: jax.device_put(
            batch[name], axes.sharding(names, batch[name].shape, devices)
        )
        for name, names in qa.BATCH_SPEC.items()
    }

    @jit
    def run(params, batch):
        with mesh.active(devices):
            return loss(params, batch)

    assert_same(run(params, placed), frozen(PARAMS, batch))


def test_correct_spans_of_a_body():
    spans = np.array([[0, 1], [2, 5], [1, 6], [5, 7], [6, 8], [3, 3]])
    correct, left_out = qa.correct_spans(spans, length=7, width=4)
    assert correct.shape == (7, 4)
    assert np.argwhere(correct).tolist() == [[0, 0], [2, 2], [5, 1]]
    assert left_out == 3  # too long, beyond the end, empty
    correct, left_out = qa.correct_spans(np.zeros((0, 2), np.int32), length=7, width=4)
    assert (correct.sum(), left_out) == (0, 0)


def test_correct_spans_find_their_place_in_the_joint_input():
    rng = np.random.default_rng(0)
    correct = rng.random((2, 3, 7, 4)) < 0.4
    query_len, tokens = np.array([8, 2], np.int32), 8 + 7 + 3
    found = np.asarray(qa.joint_spans(correct, query_len, tokens, 4))
    table = reader.spans(tokens, 4)
    for row, passage in np.ndindex(2, 3):
        wanted = {
            (query_len[row] + 2 + s, query_len[row] + 2 + s + w + 1)
            for s, w in np.argwhere(correct[row, passage])
            if s + w + 1 <= 7
        }
        assert set(map(tuple, table[found[row, passage]].tolist())) == wanted


def test_from_a_text_to_a_target():
    text = "Emma was written by Jane Austen."
    bytes_ = np.array([[0, 4], [5, 8], [9, 16], [17, 19], [20, 24], [25, 28], [28, 31]])
    spans = answers.token_spans(
        bytes_, answers.answer_spans(text, ["Jane Austen"], False)
    )
    correct, left_out = qa.correct_spans(spans, length=7, width=4)
    assert np.argwhere(correct).tolist() == [[4, 2]]
    assert left_out == 0
    assert answers.token_text(text, bytes_, 4, 7) == "Jane Austen"
