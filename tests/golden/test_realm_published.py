"""Our REALM with published weights against Hugging Face's (transformers 4.57.6).

The recordings are small models with random weights, biases and norms included, their
inputs, outputs and gradients in float64. They are no part of the repository: name
their folder in REALM_ORACLES. The round trip at the end needs nothing.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from realm_retro.arrays import flatten
from realm_retro.interop import export, name_table, realm
from realm_retro.interop.tensors import Tensors
from realm_retro.nn import losses
from realm_retro.parallel import axes
from realm_retro.realm import model as model_lib
from realm_retro.realm import objective, qa, reader
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.model import Embedder, KnowledgeEncoder

ORACLES = pathlib.Path(
    os.environ.get("REALM_ORACLES")
    or pathlib.Path(__file__).parents[3] / "shared" / "oracles" / "realm"
)
TOLERANCE = 1e-4
CHANGED = "published REALM weights no longer give the published model's numbers"

recorded = pytest.mark.skipif(
    not (ORACLES / "embedder.npz").exists(),
    reason=f"no recordings of Hugging Face REALM in {ORACLES}",
)


class Oracle:
    """A recording: our parameters of its weights, its inputs and outputs."""

    def __init__(self, name, tmp_path):
        with np.load(ORACLES / f"{name}.npz", allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        defaults = {"type_vocab_size": 2, "layer_norm_eps": 1e-12}
        config = defaults | json.loads(str(self.arrays["meta"]))["config"]
        path = epath.Path(tmp_path) / "config.json"
        path.write_text(json.dumps(config))
        tensors = Tensors(f"{name}.npz", self.under("w/"))
        self.published = realm.take(tensors, path)
        tensors.refuse_leftovers()
        self.config = RealmConfig(
            **self.published.model, query_length=8, title_length=8, body_length=8
        )
        self.beam = config["reader_beam_size"]

    def __getitem__(self, name):
        return self.arrays[name]

    def under(self, prefix):
        return {
            name.removeprefix(prefix): value
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }

    def gradient(self, table, prefix):
        """A recorded gradient as a tree of ours."""
        tensors = Tensors("gradients", self.under(prefix))
        found = name_table.read(table, tensors.take)
        tensors.refuse_leftovers()
        return found


@pytest.fixture
def oracle(tmp_path):
    return lambda name: Oracle(name, tmp_path)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0, err_msg=CHANGED)


def assert_gradients(found, wanted):
    """Close in each leaf, measured by the largest gradient of that leaf."""
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        scale = max(np.abs(leaf).max(), 1e-2)
        np.testing.assert_allclose(
            found[path] / scale, leaf / scale, atol=1e-3, rtol=0, err_msg=path
        )


def graded(loss, params):
    """((value, more), gradient), compiled: operation by operation takes minutes."""
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def embed(config, params, ids, mask, types=None):
    flat = ids.reshape(-1, ids.shape[-1])
    types = None if types is None else types.reshape(flat.shape)
    vectors = Embedder(config).apply(
        {"params": params}, flat, mask.reshape(flat.shape) > 0, types
    )
    return vectors.reshape(*ids.shape[:-1], -1)


def tower_table(config):
    return name_table.tower(config.bert, config.embed_dim)


@recorded
@pytest.mark.slow
def test_embedder(oracle):
    case = oracle("embedder")
    assert set(case.published.parts) == {"query"}
    assert case.config.tied
    inputs = [
        case[f"in/{n}"] for n in ("input_ids", "attention_mask", "token_type_ids")
    ]
    probe = np.load(ORACLES / "embedder_probe.npy").astype(np.float32)
    tower = case.published.parts["query"]

    def scalar(tower):
        found = embed(case.config, tower, *inputs)
        return jnp.sum(found * probe), found

    (total, found), gradient = graded(scalar, tower)
    assert_close(found, case["out64/projected_score"])
    np.testing.assert_allclose(total, case["out64/_scalar_differentiated"], rtol=1e-4)
    assert_gradients(gradient, case.gradient(tower_table(case.config), "g64/"))


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("name", ["scorer_shared", "scorer_separate"])
def test_scorer(oracle, name):
    case = oracle(name)
    parts, config = case.published.parts, case.config
    assert config.tied == (name == "scorer_shared")
    assert set(parts) == ({"query"} if config.tied else {"query", "document"})
    query = case["in/input_ids"], case["in/attention_mask"]
    candidates = case["in/candidate_input_ids"], case["in/candidate_attention_mask"]

    def scalar(parts):
        vector = embed(config, parts["query"], *query)
        document = parts["query" if config.tied else "document"]
        vectors = embed(config, document, *candidates)
        prior = objective.log_prior(
            vector, vectors, np.ones(vectors.shape[:2], bool), config.score_scale
        )
        return prior[:, 1].sum(), (vector, vectors)

    (total, found), gradient = graded(scalar, parts)
    vector, vectors = found
    assert_close(vector, case["out64/query_score"])
    assert_close(vectors, case["out64/candidate_score"])
    scores = jnp.einsum("bd,bkd->bk", vector, vectors)
    assert_close(scores, case["out64/relevance_score"])
    assert_close(total, case["out64/_scalar_differentiated"])
    places = {"query": "embedder.", "document": "embedder."}
    if not config.tied:
        places["query"] = "query_embedder."
    for part in parts:
        wanted = case.gradient(tower_table(config), f"g64/{places[part]}")
        assert_gradients(gradient[part], wanted)


@recorded
@pytest.mark.slow
def test_knowledge_augmented_encoder(oracle):
    case = oracle("knowledge_aug_encoder")
    config, params = case.config, case.published.parts["encoder"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = (case[f"in/{name}"] for name in names)
    b, k, length = ids.shape
    everywhere = np.broadcast_to(np.arange(length), (b * k, length))
    # They take −100 for a token that is no target, and count it unless masked out.
    labels, counted = case["in/labels"], case["in/mlm_mask"] > 0
    targets = np.repeat(np.maximum(labels, 0)[:, None], k, axis=1)
    assert (labels[counted] >= 0).all()

    def loss(inputs):
        params, relevance = inputs
        flat = [x.reshape(b * k, length) for x in (ids, mask > 0, types)]
        logits = KnowledgeEncoder(config).apply({"params": params}, *flat, everywhere)
        tokens = -losses.token_losses(logits, targets.reshape(b * k, length))
        prior = jax.nn.log_softmax(relevance)
        likelihood = objective.marginal_log_likelihood(
            prior, tokens.reshape(b, k, length), counted, "per_token"
        )
        return -likelihood.sum() / counted.sum(), logits

    relevance = jnp.asarray(case["in/relevance_score"])
    (total, logits), gradient = graded(loss, (params, relevance))
    assert_close(logits, case["out64/logits"].reshape(logits.shape))
    assert_close(total, case["out64/loss"])
    table = name_table.knowledge_encoder(config.bert)
    assert_close(gradient[1], case.arrays.pop("g64/input:relevance_score"))
    assert_gradients(gradient[0], case.gradient(table, "g64/"))


def span_scores(config, params, ids, mask, types):
    apply = jax.jit(reader.SpanReader(config).apply)
    return apply({"params": params}, ids, mask > 0, types)


def correct_spans(config, tokens, starts, ends):
    """bool [rows, spans]; −1 is no answer, their ends are inclusive."""
    table = reader.spans(tokens, config.span_width)
    same = (table[:, 0] == starts[..., None]) & (table[:, 1] - 1 == ends[..., None])
    return same.any(axis=1)


def read(config, params, case, prefix, relevance, allowed, tokens):
    """(retriever loss, reader loss, what they gave) of our functions."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [case[f"{prefix}{name}"][: case.beam, :tokens] for name in names]
    start, end, has = case["starts"], case["ends"], case["has"]
    scores = span_scores(config, params, *inputs)[None]
    legal = reader.legal_spans(jnp.asarray(allowed), config.span_width)[None]
    correct = correct_spans(config, tokens, start[: case.beam], end[: case.beam])[None]
    logits = relevance[None, : case.beam]
    early = qa.early_update_loss(relevance[None], jnp.asarray(has)[None])[0]
    full = qa.reader_loss(logits, scores, legal, jnp.asarray(correct))[0]
    return early, full, (correct[0], qa.best_span(logits, scores, legal))


def assert_read(case, prefix, found, tokens):
    early, full, (correct, best) = found
    assert_close(early, case[f"{prefix}retriever_loss"])
    assert_close(full, case[f"{prefix}reader_loss"])
    assert_close(early + full, case[f"{prefix}loss"])
    np.testing.assert_array_equal(correct, case[f"{prefix}reader_correct"])
    assert int(best.passage[0, 0]) == int(case[f"{prefix}block_idx"])
    first, end = reader.spans(tokens, case.config.span_width)[int(best.span[0, 0])]
    return int(first), int(end) - 1


def reader_table(config):
    return name_table.span_reader(config.bert, config.span_hidden)


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("name", ["reader", "reader_no_answer"])
def test_reader(oracle, name):
    case = oracle(name)
    config, params = case.config, case.published.parts["reader"]
    tokens = case["in/input_ids"].shape[1]
    allowed = case["in/block_mask"][: case.beam]
    case.arrays |= {
        "starts": case["in/start_positions"],
        "ends": case["in/end_positions"],
        "has": case["in/has_answers"],
    }
    relevance = jnp.asarray(case["in/relevance_score"])

    def loss(inputs):
        params, relevance = inputs
        found = read(config, params, case, "in/", relevance, allowed, tokens)
        return found[0] + found[1], found

    (_, found), gradient = graded(loss, (params, relevance))
    first, last = assert_read(case, "out64/", found, tokens)
    assert first == int(case["out64/start_pos"].item())
    assert last == int(case["out64/end_pos"].item())
    if name == "reader_no_answer":
        assert float(found[0]) == float(found[1]) == 0
    assert_close(gradient[1], case.arrays.pop("g64/input:relevance_score"))
    assert_gradients(gradient[0], case.gradient(reader_table(config), "g64/"))


@recorded
@pytest.mark.slow
def test_span_logits(oracle):
    case = oracle("reader")
    with np.load(ORACLES / "reader_logits.npz", allow_pickle=False) as arrays:
        recorded = dict(arrays)
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [case[f"in/{name}"] for name in names]
    params = case.published.parts["reader"]
    found = np.asarray(span_scores(case.config, params, *inputs))
    table = reader.spans(inputs[0].shape[1], case.config.span_width)
    np.testing.assert_array_equal(table[:, 0], recorded["starts"])
    np.testing.assert_array_equal(table[:, 1] - 1, recorded["ends"])
    legal = recorded["span_logits"] > -1e30  # they subtract the largest float
    assert legal.any()
    assert_close(found[legal], recorded["span_logits"][legal])


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_open_domain_question_answering(oracle, mode):
    case = oracle("openqa")
    config, parts = case.config, case.published.parts
    assert set(parts) == {"query", "reader"}
    assert not config.tied
    blocks = np.asarray(case.published.vectors)
    assert len(blocks) == len(case["block_records"])
    beam = case.beam if mode == "eval" else len(case["top6"].reshape(-1))
    padded = case["concat/attention_mask"][:beam]
    tokens = int(padded.sum(axis=1).max())
    case.arrays |= {
        "starts": case["concat/start"][:beam],
        "ends": case["concat/end"][:beam],
        "has": case["concat/has_answers"][:beam],
    }
    special = case["concat/special_tokens_mask"] > 0
    allowed = ~special & (case["concat/token_type_ids"] > 0)
    allowed = allowed[: case.beam, :tokens]
    question = [
        case[f"in/{n}"] for n in ("input_ids", "attention_mask", "token_type_ids")
    ]

    def loss(parts):
        vector = embed(config, parts["query"], *question)
        scores = jnp.einsum("nd,bd->bn", blocks, vector)
        _, top = jax.lax.top_k(scores, beam)
        relevance = jnp.take_along_axis(scores, top, axis=1)[0]
        found = read(
            config, parts["reader"], case, "concat/", relevance, allowed, tokens
        )
        return found[0] + found[1], (vector, scores, top, found)

    (_, aux), gradient = graded(loss, parts)
    vector, scores, top, found = aux
    assert_close(vector.reshape(-1), case["question_projection"].reshape(-1))
    assert_close(scores.reshape(-1), case["block_scores"].reshape(-1))
    np.testing.assert_array_equal(top[0], case["top6"].reshape(-1)[:beam])
    first, last = assert_read(case, f"{mode}/", found, tokens)
    assert first == int(case[f"{mode}/start"].item())
    assert last == int(case[f"{mode}/end"].item())
    block = case["concat/input_ids"][int(found[2][1].passage[0, 0])]
    answer = block[first : last + 1]
    np.testing.assert_array_equal(answer, case[f"{mode}/predicted_ids"].reshape(-1))
    for part, table in (("query", tower_table), ("reader", reader_table)):
        place = {"query": "embedder.", "reader": "reader."}[part]
        wanted = case.gradient(table(config), f"{mode}/g/{place}")
        assert_gradients(gradient[part], wanted)


@pytest.mark.parametrize("part", ["query", "encoder", "reader"])
def test_what_is_written_reads_as_the_same_model(tmp_path, part):
    config = RealmConfig(
        vocab_size=120,
        width=16,
        num_layers=2,
        num_heads=2,
        hidden=24,
        max_positions=32,
        title_length=4,
        body_length=8,
        query_length=6,
        embed_dim=8,
        span_hidden=6,
        span_width=3,
        activation="gelu_tanh",
        pooler=True,
        document_types=True,
        tied=True,
    )
    boxed = jax.eval_shape(
        lambda key: model_lib.init(config, key, (part,)), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    wanted = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        axes.unbox(boxed)[part],
    )
    model = {name: getattr(config, name) for name in vars(config)}
    export.save(tmp_path, export.KINDS[part], model, wanted)
    published = realm.load(tmp_path)
    assert set(published.parts) == {part}
    jax.tree.map(np.testing.assert_array_equal, published.parts[part], wanted)
    fixed = {n: v for n, v in published.model.items() if n != "tied"}
    assert fixed == {name: model[name] for name in fixed}
