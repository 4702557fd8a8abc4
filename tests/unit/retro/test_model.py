"""The layout of RETRO's layers, its sizes, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retro_examples import jit, random_example, random_params, small_config

from realm_retro.errors import UserError
from realm_retro.parallel import axes
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.model import Retro, Runs, runs

EVERY_THIRD = tuple(range(9, 33, 3))


@pytest.mark.parametrize(
    ("num_layers", "places", "plan"),
    [
        (12, (), Runs(12, (), 0)),
        (12, (6, 9, 12), Runs(5, ((2, 2),), 0)),
        (24, (9, 12, 15, 18, 21, 24), Runs(8, ((5, 2),), 0)),
        # "9, 12, …, 32" of the largest model does not rise by threes to its end.
        (32, EVERY_THIRD, Runs(8, ((7, 2),), 2)),
        (32, (*EVERY_THIRD, 32), Runs(8, ((7, 2), (1, 1)), 0)),
        (7, (2, 4, 6), Runs(1, ((2, 1),), 1)),
        (12, (1,), Runs(0, (), 11)),
        (12, tuple(range(1, 13)), Runs(0, ((11, 0),), 0)),
    ],
)
def test_runs(num_layers, places, plan):
    assert runs(small_config(num_layers=num_layers, cca_layers=places)) == plan


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_runs_lay_every_layer_out_in_its_place(in_p):
    places = tuple(p for p, cross in enumerate(in_p, start=1) if cross)
    plan = runs(small_config(num_layers=len(in_p), cca_layers=places))
    laid = [False] * plan.stem + [True] * bool(places)
    for units, plain in plan.groups:
        laid += ([False] * plain + [True]) * units
    assert laid + [False] * plan.tail == in_p


def abstract_params(config):
    inputs = [jnp.zeros((1, config.chunk_length), int), None]
    if config.retrieves:
        shape = (1, 1, 2, config.neighbour_length)
        inputs += [jnp.zeros(shape, int), jnp.ones(shape, bool)]
    return jax.eval_shape(Retro(config).init, jax.random.key(0), *inputs)["params"]


# Table 2 of the paper: (d, d_ffw, heads, head size, layers), millions of parameters
# without embeddings of the baseline and of RETRO. The counts of RETRO are those of CCA
# in "every third layer starting from layer 6" (section 2.5).
TABLE_2 = [
    ((896, 3_584, 16, 64, 12), 132, 172),
    ((1_536, 6_144, 12, 128, 12), 368, 425),
    ((2_048, 8_192, 16, 128, 24), 1_309, 1_451),
    ((4_096, 16_384, 32, 128, 32), 6_982, 7_532),
]


@pytest.mark.parametrize(("sizes", "baseline", "retro"), TABLE_2)
def test_parameter_counts_are_the_papers(sizes, baseline, retro):
    width, ffw, heads, head_dim, layers = sizes

    def millions(cca_layers):
        config = RetroConfig(
            vocab_size=128_000,
            num_layers=layers,
            model_dim=width,
            num_heads=heads,
            head_dim=head_dim,
            ffw_dim=ffw,
            cca_layers=cca_layers,
        )
        leaves = jax.tree_util.tree_leaves_with_path(
            axes.unbox(abstract_params(config))
        )
        sizes = [math.prod(x.shape) for path, x in leaves if path[-1].key != "table"]
        return sum(sizes) / 1e6

    assert millions(()) == pytest.approx(baseline, rel=0.005)
    assert millions(tuple(range(6, layers + 1, 3))) == pytest.approx(retro, rel=0.01)


@pytest.mark.parametrize("share_embedding", [False, True])
def test_every_parameter_can_be_sharded(share_embedding):
    config = small_config(
        num_heads=4,
        encoder_num_heads=4,
        vocab_size=64,
        encoder_ffw_dim=16,
        share_embedding=share_embedding,
    )
    params = abstract_params(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = axes.shardings(params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    assert len(leaves) == len(jax.tree.leaves(axes.unbox(params)))
    for path, sharding in leaves:
        cut = {axis for axis in sharding.spec if axis}
        # Matrices lie in pieces on both axes, norms and biases of heads need not.
        wanted = {"kernel": {"fsdp", "tensor"}, "table": {"fsdp", "tensor"}}
        assert cut >= wanted.get(path[-1].key, set()), jax.tree_util.keystr(path)


def test_a_new_retro_is_its_plain_decoder():
    config, x = small_config(), random_example(small_config())
    model = Retro(config)
    inputs = (x.tokens, x.segments, x.neighbours, x.neighbour_mask)
    params = jit(model.init)(jax.random.key(0), *inputs)
    on, off = jit(
        lambda params: (model.apply(params, *inputs), model.apply(params, *inputs[:2]))
    )(params)
    np.testing.assert_array_equal(on, off)


def test_recomputing_activations_changes_nothing():
    config = small_config(num_layers=2, encoder_layers=1, cca_layers=(1, 2))
    params, x = random_params(config), random_example(config, batch=1, chunks=3)

    def logits(remat):
        model = Retro(dataclasses.replace(config, remat=remat))
        inputs = (x.tokens, None, x.neighbours, x.neighbour_mask)
        return jit(model.apply)({"params": params}, *inputs)

    np.testing.assert_allclose(logits(True), logits(False), atol=1e-4)


def test_retrieval_needs_whole_chunks():
    config = small_config()
    x = random_example(config)
    with pytest.raises(ValueError, match="15 tokens are not whole chunks of 4"):
        Retro(config).apply(
            {"params": random_params(config)},
            x.tokens[:, :-1],
            None,
            x.neighbours,
            x.neighbour_mask,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "config.model.num_heads is 0; at least 1"),
        ({"chunk_length": -3}, "config.model.chunk_length is -3; at least 1"),
        ({"model_dim": 13}, "config.model.model_dim is 13; must be even"),
        ({"encoder_dim": 9}, "config.model.encoder_dim is 9; must be even"),
        (
            {"cca_layers": (2, 2)},
            r"cca_layers is \(2, 2\); must rise, without repeats",
        ),
        ({"cca_layers": (3, 2)}, "must rise"),
        ({"cca_layers": (0, 2)}, "layers are counted from 1 to 3"),
        ({"cca_layers": (2, 4)}, "layers are counted from 1 to 3"),
        ({"encoder_ca_layers": (3,)}, "layers are counted from 1 to 2"),
        ({"compute_dtype": "float16"}, "'float16'; float32 or bfloat16"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message) as error:
        small_config(**changes)
    assert "\n" not in str(error.value)


def test_a_plain_decoder_needs_no_encoder():
    assert not small_config(cca_layers=(), encoder_ca_layers=(9,)).retrieves
