"""The losses of question answering agree with loops in float64, written from ORQA.

A difference here means that another loss is trained. Do not relax the tolerance:
float32 against float64 needs no more.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import realm_reference as reference
from qa_examples import random_qa_batch
from realm_examples import jit, random_realm, small_realm
from realm_reference import CLS, SEP

from realm_retro.realm import model, qa, reader

CONFIGS = {
    "paper": small_realm(projection_norm=False, score_scale=0.1),
    "sentence_encoder": small_realm(
        pooling="mean", embed_dim=0, normalise=True, tied=True, score_scale=5.0
    ),
}


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 or bfloat16 products where the tests run on an accelerator."""
    with jax.default_matmul_precision("highest"):
        yield


def assert_close(found, expected, tolerance=1e-5):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def marginal_loss(scores, wanted):
    """−log Σ_wanted e^s / Σ e^s of one question; 0 if nothing is wanted."""
    if not any(wanted):
        return 0.0
    top = max(scores)
    all_of_it = sum(math.exp(s - top) for s in scores)
    good = sum(math.exp(s - top) for s, w in zip(scores, wanted, strict=True) if w)
    return math.log(all_of_it) - math.log(good)


def random_spans(seed=0, rows=5, k=3, spans=11):
    rng = np.random.default_rng(seed)
    legal = rng.random((rows, k, spans)) < 0.7
    correct = rng.random((rows, k, spans)) < 0.15
    legal[1, 2] = False  # a passage that is missing
    correct[2] = False  # nothing is correct
    legal[3] = False  # nothing is legal
    correct[3] = True
    correct[4] = legal[4]  # everything is correct
    logits = 3 * rng.normal(size=(rows, k))
    return logits, 3 * rng.normal(size=(rows, k, spans)), legal, correct


def expected_reader_loss(logits, scores, legal, correct):
    losses = []
    for row in range(len(logits)):
        places = [(z, s) for z, s in np.ndindex(legal.shape[1:]) if legal[row, z, s]]
        joint = [logits[row, z] + scores[row, z, s] for z, s in places]
        losses.append(marginal_loss(joint, [correct[row, z, s] for z, s in places]))
    return np.array(losses)


def test_early_update_loss():
    rng = np.random.default_rng(0)
    scores = 4 * rng.normal(size=(4, 9))
    has = rng.random((4, 9)) < 0.3
    valid = rng.random((4, 9)) < 0.8
    has[1] = False
    has[2] = ~valid[2]  # what has an answer is not there
    has[0] = has[3] = valid[0] = True
    has[3, :4] = False
    expected = [
        marginal_loss(scores[i][valid[i]], has[i][valid[i]]) for i in range(len(has))
    ]
    assert expected[0] == expected[1] == expected[2] == 0 < expected[3]
    found = qa.early_update_loss(jnp.float32(scores), has, valid)
    assert found.dtype == jnp.float32
    assert_close(found, expected)
    everything = [marginal_loss(scores[i], has[i]) for i in range(len(has))]
    assert_close(qa.early_update_loss(jnp.float32(scores), has), everything)


def test_reader_loss_is_one_softmax_over_all_passages():
    example = random_spans()
    found = qa.reader_loss(*map(jnp.asarray, example))
    assert found.dtype == jnp.float32
    assert_close(found, expected_reader_loss(*example))
    assert found[2] == found[3] == found[4] == 0 < found[0]
    # A softmax of each passage on its own gives another number.
    apart = [
        expected_reader_loss(*(x[:1, z : z + 1] for x in example))[0]
        for z in range(example[0].shape[1])
    ]
    assert abs(sum(apart) - found[0]) > 0.1


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_against_differences_and_finite(scale):
    logits, scores, legal, correct = random_spans()
    logits, scores = scale * logits, scale * scores

    def total(logits, scores):
        return qa.reader_loss(logits, scores, legal, correct).sum()

    slopes = jax.grad(total, argnums=(0, 1))(jnp.float32(logits), jnp.float32(scores))
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert not np.asarray(slope[2:4]).any(), "without a correct span nothing moves"
    assert not np.asarray(slopes[1])[~legal].any()
    assert np.asarray(slopes[1])[0].any()
    if scale > 1:
        return
    h = 1e-6
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += h
        down[index] -= h
        change = expected_reader_loss(up, scores, legal, correct).sum()
        change -= expected_reader_loss(down, scores, legal, correct).sum()
        assert_close(slopes[0][index], change / (2 * h), 1e-4)


def test_gradient_of_the_early_update():
    scores = jnp.array([[1.0, 2.0, -1.0], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0]])
    has = jnp.array([[False, True, False], [False] * 3, [True, False, True]])
    valid = jnp.array([[True, True, False], [True] * 3, [False] * 3])
    slope = jax.grad(lambda s: qa.early_update_loss(s, has, valid).sum())(scores)
    # ∂/∂f(z) = p(z) − p(z | has an answer)
    p = 1 / (1 + math.exp(1.0))
    assert_close(slope, [[p, -p, 0], [0, 0, 0], [0, 0, 0]])


def test_bfloat16_scores_are_summed_in_float32():
    logits, scores, legal, correct = random_spans()
    low = [jnp.asarray(x, jnp.bfloat16) for x in (logits, scores)]
    exact = [np.asarray(x, np.float64) for x in low]
    found = qa.reader_loss(*low, legal, correct)
    assert found.dtype == jnp.float32
    assert_close(found, expected_reader_loss(*exact, legal, correct))


def test_best_spans():
    logits, scores, legal, _ = random_spans()
    rows, k, spans = legal.shape
    found = qa.best_span(jnp.asarray(logits), jnp.asarray(scores), legal, count=4)
    for row in range(rows):
        places = [(z, s) for z, s in np.ndindex(k, spans) if legal[row, z, s]]
        joint = {(z, s): logits[row, z] + scores[row, z, s] for z, s in places}
        if not joint:
            assert (found.log_prob[row] == -np.inf).all()
            continue
        total = math.log(sum(math.exp(v) for v in joint.values()))
        best = sorted(joint, key=joint.__getitem__, reverse=True)[:4]
        given = zip(found.passage[row].tolist(), found.span[row].tolist(), strict=True)
        assert list(given) == best
        assert_close(found.log_prob[row], [joint[place] - total for place in best])


def expected_loss(config, params, batch, train_documents):
    """Early and full loss of each question, with all that the metrics count."""
    exact = reference.as_float64(params)
    tower = exact["query" if config.tied else "document"]
    lines = []
    for row in range(len(batch["query"])):
        x = list(batch["query"][row, : batch["query_len"][row]])
        query = reference.embed(exact["query"], config, [CLS, *x, SEP])
        f = config.score_scale * batch["beam_vectors"][row].astype(np.float64) @ query
        joint, wanted = [], []
        for z, slot in enumerate(batch["slots"][row]):
            title = list(batch["title"][row, z, : batch["title_len"][row, z]])
            body = list(batch["body"][row, z, : batch["body_len"][row, z]])
            if train_documents:
                document = [CLS, *title, SEP, *body, SEP]
                vector = reference.embed(tower, config, document)
                f[slot] = config.score_scale * (query @ vector)
            if not batch["beam_valid"][row, slot]:
                continue
            tokens = [CLS, *x, SEP, *body, SEP]
            types = [0] * (len(x) + 2) + [1] * (len(body) + 1)
            spans = reference.span_scores(exact["reader"], config, tokens, types)
            for (start, end), score in spans.items():
                start, end = start - len(x) - 2, end - len(x) - 2
                if start >= 0 and end <= len(body):
                    joint.append(f[slot] + score)
                    wanted.append(batch["correct"][row, z, start, end - start - 1])
        there = np.flatnonzero(batch["beam_valid"][row])
        has = batch["beam_has"][row][there]
        lines.append(
            {
                "early": marginal_loss(f[there], has),
                "full": marginal_loss(joint, wanted),
                "beam_has": any(has),
                "top_has": has[np.argmax(f[there])],
                "read_has": any(wanted),
                "span_match": wanted[int(np.argmax(joint))],
            }
        )
    return lines


@pytest.mark.parametrize("train_documents", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_finetune_loss_and_metrics(name, train_documents):
    config = CONFIGS[name]
    params = random_realm(config, model.FINETUNING)
    batch = random_qa_batch(config)
    total, weight, further = jit(
        lambda params, batch: qa.finetune_loss(
            config, params, batch, jax.random.key(0), train_documents=train_documents
        )
    )(params, batch)
    lines = expected_loss(config, params, batch, train_documents)
    assert_close(total, sum(line["early"] + line["full"] for line in lines))
    assert weight == len(lines)
    assert [line["beam_has"] for line in lines] == [True, True, True, False]
    assert [line["read_has"] for line in lines] == [True, True, False, False]
    for key, (value, count) in further.items():
        assert_close(value, sum(float(line[key]) for line in lines))
        of = {"early": "beam_has", "full": "read_has"}.get(key)
        assert count == (sum(line[of] for line in lines) if of else len(lines)), key


def test_best_spans_of_a_batch_stand_in_the_body():
    config = CONFIGS["paper"]
    params = random_realm(config, model.FINETUNING)
    batch = random_qa_batch(config)

    def answer(params, batch):
        scores, _ = qa.beam_scores(config, params, batch)
        found = qa.best_span(*qa.read(config, params, batch, scores), count=3)
        tokens, width = config.joint_tokens, config.span_width
        return found, qa.body_spans(batch["query_len"], found.span, tokens, width)

    found, (start, end) = jit(answer)(params, batch)
    table = reader.spans(config.joint_tokens, config.span_width)
    for row, column in np.ndindex(found.span.shape):
        passage = found.passage[row, column]
        assert batch["beam_valid"][row, batch["slots"][row, passage]]
        assert 0 <= start[row, column] < end[row, column]
        assert end[row, column] <= batch["body_len"][row, passage]
        first, last = table[found.span[row, column]]
        assert last - first == end[row, column] - start[row, column]
