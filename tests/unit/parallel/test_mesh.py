import jax
import pytest
from jax.sharding import AxisType

from realm_retro.errors import UserError
from realm_retro.parallel.mesh import MeshConfig, active, local_mesh, make_mesh


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 1), (2, 4, 1)),
        ((1, 2, -1), (1, 2, 4)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_sizes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.devices.shape == expected
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_default_is_all_devices_on_data():
    assert make_mesh().devices.shape == (8, 1, 1)


def test_the_devices_of_one_process():
    assert local_mesh().devices.shape == (8, 1, 1)
    assert local_mesh(2, 2).devices.shape == (2, 2, 2)
    with pytest.raises(UserError, match=r"embed: fsdp=3 x tensor=1 does not divide"):
        local_mesh(3)


def test_some_devices():
    devices = jax.devices()[2:4]
    mesh = make_mesh(MeshConfig(1, 2, 1), devices)
    assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 4), (16, 1, 1)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match=r"config\.mesh: data=.* fit 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, -2, 1)])
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(ValueError, match="each must be 1 or more"):
        MeshConfig(*sizes)


def test_active_sets_the_mesh_while_tracing():
    mesh = make_mesh()
    seen = []

    def f(x):
        with active(mesh):
            seen.append(jax.sharding.get_abstract_mesh().shape)
        seen.append(jax.sharding.get_abstract_mesh().empty)
        return x

    jax.jit(f)(1.0)
    assert seen == [mesh.shape, True]
