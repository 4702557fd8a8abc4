"""The model agrees with `retro_reference`, which was written from the paper alone.

A difference here means that the model computes something else than RETRO. Do not relax
the tolerance: float32 against float64 needs no more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import retro_reference as reference
from retro_examples import jit, random_example, random_params, small_config

from realm_retro.nn import losses
from realm_retro.nn.attention import RelativeAttention
from realm_retro.retro.cca import ChunkedCrossAttention
from realm_retro.retro.encoder import Encoder
from realm_retro.retro.model import Retro

TOLERANCE = 1e-5  # of the largest number that is compared

# name → (config, neighbours of each chunk)
CONFIGS = {
    "every_other_layer": (small_config(num_layers=7, cca_layers=(2, 4, 6)), 2),
    "from_the_first_layer": (
        small_config(
            num_layers=6,
            cca_layers=(1, 2, 3, 6),
            chunk_length=3,
            encoder_dim=14,
            encoder_ca_layers=(1, 2),
            share_embedding=True,
        ),
        3,
    ),
    "once_in_the_last_layer": (
        small_config(cca_layers=(3,), encoder_layers=1, chunk_length=2),
        1,
    ),
}
PLAIN = small_config(cca_layers=())


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 or bfloat16 products where the tests run on an accelerator."""
    with jax.default_matmul_precision("highest"):
        yield


def assert_close(found, expected):
    scale = np.abs(expected).max()
    assert scale > 0.1, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)


def model_logits(config, params, *inputs):
    apply = jit(lambda params, *inputs: Retro(config).apply(params, *inputs))
    return np.asarray(apply({"params": params}, *inputs))


def module_output(module, params, method, *inputs):
    inputs = [jnp.asarray(x, jnp.float32 if x.dtype == float else None) for x in inputs]
    apply = jit(
        lambda *inputs: module.apply({"params": params}, *inputs, method=method)
    )
    return np.asarray(apply(*inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_retro_on(name):
    config, k = CONFIGS[name]
    params, x = random_params(config), random_example(config, k=k)
    found = model_logits(
        config, params, x.tokens, x.segments, x.neighbours, x.neighbour_mask
    )
    for row, logits in enumerate(found):
        expected = reference.forward(
            params,
            config,
            x.tokens[row],
            segments=x.segments[row],
            neighbours=x.neighbours[row],
            neighbour_mask=x.neighbour_mask[row],
        )
        assert_close(logits, expected)


@pytest.mark.parametrize(
    "config", [CONFIGS["from_the_first_layer"][0], PLAIN], ids=["off", "plain"]
)
def test_without_retrieval(config):
    params, x = random_params(config), random_example(config)
    tokens = x.tokens[:, :-1]  # needs no whole chunks
    found = model_logits(config, params, tokens)
    for row, logits in enumerate(found):
        assert_close(logits, reference.forward(params, config, tokens[row]))


def test_the_reference_sees_the_layers_where_the_paper_counts_them():
    for config, _ in CONFIGS.values():
        layers = reference.decoder_layers(random_params(config))
        assert len(layers) == config.num_layers
        places = [p for p, layer in enumerate(layers, start=1) if "cross" in layer]
        assert tuple(places) == config.cca_layers


def test_attention():
    config = small_config()
    attention = RelativeAttention(config.num_heads, config.head_dim, config.model_dim)
    params = reference.decoder_layers(random_params(config))[0]["attention"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, config.model_dim))
    source = rng.normal(size=(9, config.model_dim))
    mask = rng.random((7, 9)) < 0.5
    mask[3] = False
    offset = -2

    def attend(module, x, source):
        # Distance of query i to key j: i − j + offset; from 6 + offset down.
        relative = module.relative_keys(7, 16, offset)
        keys_values = module.keys_values(source)
        return module(x, keys_values, mask=jnp.asarray(mask), relative=relative)

    found = module_output(attention, params["attention"], attend, x, source)
    expected = reference.attend(
        reference.as_float64(params["attention"]),
        queries=x,
        keys=source,
        distance=lambda i, j: i - j + offset,
        visible=lambda i, j: mask[i, j],
    )
    assert_close(found, expected)
    assert not found[3].any()


def test_encoder():
    config = small_config(encoder_layers=3, encoder_ca_layers=(1, 3))
    params, x = random_params(config)["encoder"], random_example(config, batch=1)
    n, d = x.tokens.shape[1], config.model_dim
    h = np.random.default_rng(2).normal(size=(1, n, d)).astype(np.float32)
    chunks = h.reshape(1, -1, config.chunk_length, d)
    found = module_output(
        Encoder(config),
        params,
        lambda module, *inputs: module(*inputs),
        x.neighbours,
        x.neighbour_mask,
        chunks,
    )
    assert np.isfinite(found).all()
    weights = reference.as_float64(params)
    embeddings = weights["embed"]["table"] * np.sqrt(config.encoder_dim)
    expected = reference.encode(
        weights, config, embeddings, x.neighbours[0], x.neighbour_mask[0], h[0]
    )
    compared = 0
    for u, neighbours in enumerate(expected):
        for j, tokens in enumerate(neighbours):
            for place, encoding in tokens:
                assert_close(found[0, u, j, place - 1], encoding)
                compared += 1
    assert compared == x.neighbour_mask.sum()


def test_chunked_cross_attention():
    config, k = small_config(), 3
    m, r, width = config.chunk_length, config.neighbour_length, config.encoder_dim
    params = random_params(config)["bridge_cross"]["attention"]
    x = random_example(config, batch=1, k=k)
    rng = np.random.default_rng(3)
    h = rng.normal(size=(1, 4 * m, config.model_dim))
    encoded = rng.normal(size=(1, 4, k, r, width))
    attention = RelativeAttention(config.num_heads, config.head_dim, config.model_dim)
    found = module_output(
        ChunkedCrossAttention(attention, m),
        {"attention": params},
        lambda module, *inputs: module(*inputs),
        h,
        encoded,
        x.neighbour_mask,
    )
    as_lists = [
        [
            [(i + 1, encoded[0, u, j, i]) for i in np.flatnonzero(mask)]
            for j, mask in enumerate(masks)
        ]
        for u, masks in enumerate(x.neighbour_mask[0])
    ]
    expected = reference.chunked_cross_attention(
        reference.as_float64(params), h[0], as_lists, m
    )
    assert_close(found[0], expected)


def test_loss_and_its_derivative():
    config = small_config(num_layers=1, cca_layers=(1,), encoder_layers=1)
    params, x = random_params(config), random_example(config, batch=1, chunks=3)
    direction = random_params(config, seed=5)

    @jit
    @jax.value_and_grad
    def model_loss(params):
        logits = Retro(config).apply(
            {"params": params}, x.tokens, None, x.neighbours, x.neighbour_mask
        )
        total, weight = losses.cross_entropy(logits, x.targets, x.loss_mask)
        return total / weight

    def reference_loss(step):
        moved = jax.tree.map(
            lambda p, v: np.asarray(p, np.float64) + step * np.asarray(v, np.float64),
            params,
            direction,
        )
        inputs = {"neighbours": x.neighbours[0], "neighbour_mask": x.neighbour_mask[0]}
        logits = reference.forward(moved, config, x.tokens[0], **inputs)
        return reference.loss(logits, x.targets[0], x.loss_mask[0])

    value, gradient = model_loss(params)
    assert_close(value, reference_loss(0.0))
    products = jax.tree.map(lambda g, v: np.vdot(np.asarray(g), v), gradient, direction)
    step = 1e-5
    slope = (reference_loss(step) - reference_loss(-step)) / (2 * step)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-4)
