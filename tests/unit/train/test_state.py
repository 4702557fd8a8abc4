import chex
import jax
import numpy as np
import optax
import toy_training as toy
from jax.sharding import PartitionSpec as P

from realm_retro.train import optim, state


def plan(mesh, trainable=None):
    init = toy.make_recipe().init
    params = state.abstract_params(init, mesh)
    rule = optim.make_optimizer(
        toy.OPTIMIZER,
        steps=20,
        trainable=trainable or jax.tree.map(lambda _: True, params),
        decayed=jax.tree.map(lambda _: True, params),
    )
    return init, rule, state.abstract_state(params, rule)


def test_moments_lie_as_their_weights_do():
    _, _, abstract = plan(toy.mesh_of(2, 2, 2))
    assert abstract.params["up"]["kernel"].sharding.spec == P("fsdp", "tensor")
    for moment in ("mu", "nu"):
        found = optax.tree.get(abstract.opt_state, moment)
        assert state.shardings_of(found) == state.shardings_of(abstract.params)


def test_the_state_is_born_sharded():
    init, rule, abstract = plan(toy.mesh_of(2, 2, 2))
    born = state.init_state(init, rule, abstract, seed=0)
    chex.assert_trees_all_equal_shapes_and_dtypes(born, abstract)
    assert state.shardings_of(born) == state.shardings_of(abstract)
    kernel = born.params["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_initial_weights_depend_on_the_seed_and_not_on_the_mesh():
    trees = [
        jax.device_get(state.init_state(*plan(mesh), seed=seed).params)
        for mesh, seed in [
            (toy.mesh_of(1, 1, 1), 0),
            (toy.mesh_of(2, 2, 2), 0),
            (toy.mesh_of(1, 1, 1), 1),
        ]
    ]
    chex.assert_trees_all_equal(trees[0], trees[1])
    assert not np.array_equal(trees[0]["up"]["kernel"], trees[2]["up"]["kernel"])


def test_keys_differ_by_seed_purpose_and_step():
    keys = [
        state.key_for(seed, purpose, step)
        for seed in range(2)
        for purpose in (state.INIT, state.LOSS)
        for step in range(3)
    ]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(data) == len(keys)
