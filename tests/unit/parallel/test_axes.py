import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from realm_retro.parallel import axes
from realm_retro.parallel.mesh import MeshConfig, active, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 8), P("fsdp", "tensor")),
        (("batch", "length", "embed_act"), (8, 5, 8), P(("data", "fsdp"), None, None)),
        (("layers", "heads", "embed"), (3, 4, 6), P(None, "tensor", "fsdp")),
        ((None, "vocab"), (8, 8), P(None, "tensor")),
        # A mesh axis serves one dimension only.
        (("embed", "embed"), (8, 8), P("fsdp", None)),
        (("batch", "embed"), (8, 8), P(("data", "fsdp"), None)),
        # What does not divide stays whole, as far as it must.
        (("embed", "mlp"), (7, 8), P(None, "tensor")),
        (("batch",), (6,), P("data")),
        (("batch",), (1,), P(None)),
        ((), (), P()),
    ],
)  # fmt: skip
def test_spec(mesh, names, shape, expected):
    assert axes.spec(names, shape, mesh) == expected


def test_axes_of_size_one_are_not_named():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    assert axes.spec(("embed", "mlp"), (8, 8), mesh) == P(None, None)


def test_unknown_names_and_wrong_ranks_are_refused(mesh):
    with pytest.raises(ValueError, match="'emb' is not a logical axis"):
        axes.spec(("emb",), (8,), mesh)
    with pytest.raises(ValueError, match="1 axis names"):
        axes.spec(("embed",), (8, 8), mesh)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 4))
    assert axes.constrain(x, ("batch", "embed_act")) is x


def test_constrain_lays_out_over_the_active_mesh(mesh):
    def f(x):
        with active(mesh):
            return axes.constrain(2 * x, ("batch", "mlp"))

    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P()))
    y = jax.jit(f)(x)
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")


def test_shardings_match_the_unboxed_tree_and_count_fallbacks(mesh, caplog):
    def box(shape, names):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return nn.LogicallyPartitioned(leaf, names)

    boxed = {
        "a": box((4, 6), ("embed", "mlp")),
        "b": {"odd": box((3, 5), ("embed", "mlp")), "plain": jnp.ones(3)},
    }
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO"):
        found = axes.shardings(boxed, mesh)
    assert found["a"].spec == P("fsdp", "tensor")
    assert found["b"]["odd"].spec == P(None, None)
    assert found["b"]["plain"].spec == P()
    assert jax.tree.structure(found) == jax.tree.structure(axes.unbox(boxed))
    assert caplog.text.count("1 weights stay whole") == 1
    assert "['b']['odd'] (3, 5)" in caplog.text
