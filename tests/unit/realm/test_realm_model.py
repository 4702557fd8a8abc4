"""Parts, their parameters, and what must not change a vector or a logit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from realm_examples import jit, random_batch, random_realm, small_realm

from realm_retro.errors import UserError
from realm_retro.nn.bert import Bert
from realm_retro.parallel import axes, mesh
from realm_retro.realm import model, packing

CONFIG = small_realm()
IDS = np.random.default_rng(0).integers(104, 111, (4, 9)).astype(np.int32)
MASK = np.arange(9)[None, :] < np.array([[9], [4], [2], [6]])


def bert_params(config=CONFIG, seed=3):
    shapes = jax.eval_shape(Bert(config.bert).init, jax.random.key(0), IDS, MASK)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        axes.unbox(shapes)["params"],
    )


def vectors(config, params, ids=IDS, mask=MASK, key=None):
    embed = jit(lambda *x: model.embed_queries(config, *x))
    return np.asarray(embed(params, ids, mask, key))


def test_each_stage_has_its_own_parts():
    def parts(config, *names):
        return set(
            jax.eval_shape(lambda: model.init(config, jax.random.key(0), *names))
        )

    tied = small_realm(tied=True)
    assert parts(CONFIG) == {"query", "document", "encoder"}
    assert parts(CONFIG, model.FINETUNING) == {"query", "document", "reader"}
    assert parts(CONFIG, model.TOWERS) == {"query", "document"}
    assert parts(tied) == {"query", "encoder"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"bert", "projection", "projection_norm"}),
        ({"projection_norm": False}, {"bert", "projection"}),
        ({"embed_dim": 0}, {"bert"}),
        ({"embed_dim": 0, "pooler": True}, {"bert", "pooler"}),
    ],
)
def test_weights_of_a_tower(changes, expected):
    config = small_realm(**changes)
    params = random_realm(config, ("query",))
    assert set(params["query"]) == expected
    assert vectors(config, params).shape == (4, config.vector_dim)


def test_random_towers_are_independent_and_any_stage_starts_alike():
    @jit
    def make(key):
        reader = {"reader": model.init_reader(CONFIG, key)}
        everything = {**model.init(CONFIG, key), **reader}
        stage = model.init(CONFIG, key, model.FINETUNING)
        return axes.unbox(everything), axes.unbox(stage)

    made, stage = make(jax.random.key(1))
    for part, weights in stage.items():
        jax.tree.map(np.testing.assert_array_equal, weights, made[part])
    query, document = (
        made[name]["projection"]["kernel"] for name in ("query", "document")
    )
    assert np.abs(query - document).max() > 0.01


def test_tied_towers_are_one():
    config = small_realm(tied=True)
    params = random_realm(config, ("query",))
    found = jit(lambda p: model.embed_documents(config, p, IDS, MASK))(params)
    np.testing.assert_allclose(found, vectors(config, params), atol=1e-6)


def test_padding_and_its_ids_change_nothing():
    for pooling in ("cls", "mean"):
        config = small_realm(pooling=pooling)
        params = random_realm(config, ("query",))
        ids = np.pad(np.where(MASK, IDS, 5), ((0, 0), (0, 3)), constant_values=9)
        mask = np.pad(MASK, ((0, 0), (0, 3)))
        wanted = vectors(config, params)
        np.testing.assert_allclose(
            vectors(config, params, ids, mask), wanted, atol=2e-5
        )


def test_leading_axes_are_free():
    params = random_realm(CONFIG, ("query",))
    found = vectors(CONFIG, params, IDS.reshape(2, 2, 9), MASK.reshape(2, 2, 9))
    np.testing.assert_allclose(
        found, vectors(CONFIG, params).reshape(2, 2, 9), atol=1e-6
    )


def test_normalised_vectors_have_length_one():
    config = small_realm(normalise=True)
    found = vectors(config, random_realm(config, ("query",)))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_document_types_mark_title_and_body_in_the_document_tower_alone():
    config, plain = small_realm(document_types=True), CONFIG
    params = random_realm(config)
    batch = random_batch(config)
    names = ("title", "title_len", "body", "body_len")
    ids, mask = packing.document_inputs(*(batch[name] for name in names))

    def document(config):
        return jit(lambda p: model.embed_documents(config, p, ids, mask))(params)

    assert np.abs(document(config) - document(plain)).max() > 1e-3
    np.testing.assert_array_equal(vectors(config, params), vectors(plain, params))


def test_dropout_is_on_with_a_key_alone():
    config = small_realm(dropout=0.5)
    params = random_realm(config, ("query",))
    still = vectors(config, params)
    np.testing.assert_array_equal(still, vectors(CONFIG, params))
    moved = vectors(config, params, key=jax.random.key(0))
    dropped = moved == 0
    assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_allclose(moved[~dropped], 2 * still[~dropped], rtol=1e-5)


def test_vocabulary_logits_at_masked_places_alone():
    batch = random_batch(CONFIG)
    ids, mask, types = packing.joint_inputs(
        batch["query"], batch["query_len"], batch["body"][:, 1], batch["body_len"][:, 1]
    )
    positions = np.array([[1, 4], [3, 1], [2, 2]])
    params = random_realm(CONFIG)["encoder"]

    def logits(params):
        encoder = model.KnowledgeEncoder(CONFIG)
        return encoder.apply({"params": params}, ids, mask, types, positions)

    assert jax.eval_shape(logits, params).shape == (3, 2, CONFIG.vocab_size)
    wide = [
        variable.aval.shape
        for equation in jax.make_jaxpr(logits)(params).eqns
        for variable in equation.outvars
        if variable.aval.shape[-1:] == (CONFIG.vocab_size,) and variable.aval.ndim == 3
    ]
    assert wide
    assert max(np.prod(shape) for shape in wide) == 3 * 2 * CONFIG.vocab_size


def test_head_shares_the_word_embeddings():
    params = random_realm(CONFIG)["encoder"]
    leaves = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert sum(CONFIG.vocab_size in shape for shape in leaves) == 2  # table and bias

    def total(params):
        logits = model.KnowledgeEncoder(CONFIG).apply(
            {"params": params}, IDS, MASK, None, IDS[:, :1] * 0
        )
        return logits[..., 50].sum()

    gradient = jit(jax.grad(total))(params)["bert"]["embeddings"]["tokens"]
    assert 50 not in IDS
    assert np.abs(gradient[50]).max() > 0.01


def test_bert_weights_go_into_every_part():
    weights = bert_params()
    parts = (*model.PRETRAINING, "reader")
    boxed = model.from_bert(CONFIG, weights, jax.random.key(0), parts)
    assert jax.tree.structure(boxed) == jax.tree.structure(
        jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0), parts))
    )
    params = axes.unbox(boxed)
    for part in parts:
        jax.tree.map(np.testing.assert_array_equal, params[part]["bert"], weights)
    # Equal towers: what the BERT finds alike is alike from the first step.
    jax.tree.map(np.testing.assert_array_equal, params["query"], params["document"])
    found = jit(Bert(CONFIG.bert).apply)({"params": weights}, IDS, MASK)
    config = small_realm(embed_dim=0)
    boxed = model.from_bert(config, weights, jax.random.key(0), ("query",))
    params = axes.unbox(boxed)
    np.testing.assert_allclose(vectors(config, params), found[:, 0], atol=2e-5)


def test_no_two_parts_share_a_buffer():
    # A train step donates its parameters: the same buffer twice is an error.
    boxed = model.from_bert(
        CONFIG, jax.tree.map(jnp.asarray, bert_params()), jax.random.key(0)
    )
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    moved(axes.unbox(boxed))


def test_head_of_a_checkpoint():
    head = jax.tree.map(lambda x: np.asarray(x) + 1, random_realm(CONFIG)["encoder"])
    boxed = model.from_bert(CONFIG, bert_params(), jax.random.key(0), head=head["head"])
    found = axes.unbox(boxed)["encoder"]["head"]
    jax.tree.map(np.testing.assert_array_equal, found, head["head"])


def test_refuses_weights_of_another_shape():
    config = dataclasses.replace(CONFIG, hidden=25)
    with pytest.raises(UserError, match=r"/bert.*\['down'\]\['kernel'\].*24.*25"):
        model.from_bert(config, bert_params(), jax.random.key(0))
    weights = bert_params()
    del weights["embeddings"]["positions"]
    with pytest.raises(UserError, match=r"positions.*has no such weight"):
        model.from_bert(CONFIG, weights, jax.random.key(0))
    extra = {**bert_params(), "extra": np.zeros(3)}
    with pytest.raises(UserError, match=r"without a place.*'extra'"):
        model.from_bert(CONFIG, extra, jax.random.key(0))


def logits_of(config, params):
    def run(params):
        encoder, none = model.KnowledgeEncoder(config), IDS[:, :2] * 0
        return encoder.apply({"params": params["encoder"]}, IDS, MASK, None, none)

    return np.asarray(jit(run)(params))


@pytest.mark.parametrize("output", [vectors, logits_of])
def test_bfloat16_computes_near_and_returns_float32(output):
    params = random_realm(CONFIG)
    wanted = output(CONFIG, params)
    found = output(small_realm(compute_dtype="bfloat16"), params)
    assert found.dtype == np.float32
    difference = np.linalg.norm(found - wanted)
    assert 0 < difference < 0.05 * np.linalg.norm(wanted)


def test_sharded_over_data_fsdp_and_tensor():
    devices = mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
    params = random_realm(CONFIG, model.PRETRAINING)
    placed = jax.device_put(params, axes.shardings(boxed, devices))
    projection = placed["document"]["projection"]["kernel"]
    assert projection.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)

    @jit
    def run(params, ids, mask):
        with mesh.active(devices):
            return (
                model.embed_queries(CONFIG, params, ids, mask),
                model.KnowledgeEncoder(CONFIG).apply(
                    {"params": params["encoder"]}, ids, mask, None, ids[:, :2] * 0
                ),
            )

    found, logits = run(placed, IDS, MASK)
    np.testing.assert_allclose(found, vectors(CONFIG, params), atol=2e-5)
    np.testing.assert_allclose(logits, logits_of(CONFIG, params), atol=5e-5)
