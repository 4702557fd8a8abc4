import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from realm_retro.errors import UserError
from realm_retro.train import optim
from realm_retro.train.optim import OptimizerConfig


def test_schedule():
    config = OptimizerConfig(peak_learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    schedule = optim.warmup_cosine(config, steps=105)
    rates = np.array([schedule(step) for step in range(105)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[54], (2.0 + 0.2) / 2, rtol=1e-5)
    np.testing.assert_allclose(rates[104], 0.2, rtol=1e-5)
    assert np.all(np.diff(rates[4:]) < 0)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (0, 2), (5, 5)])
def test_schedule_of_short_runs(warmup, steps):
    schedule = optim.warmup_cosine(OptimizerConfig(1.0, warmup), steps)
    rates = np.array([schedule(step) for step in range(steps)])
    assert np.all((rates > 0) & (rates <= 1))


def test_warmup_longer_than_the_run():
    with pytest.raises(UserError, match="warmup_steps=9 exceeds"):
        optim.make_optimizer(
            OptimizerConfig(warmup_steps=9), steps=8, trainable=True, decayed=True
        )


def test_negative_settings():
    with pytest.raises(ValueError, match="clip=-1"):
        OptimizerConfig(clip=-1)


def box(names):
    return nn.LogicallyPartitioned(jnp.ones((2,) * len(names)), names)


def test_decay_mask():
    boxed = {
        "kernel": box(("embed", "mlp")),
        "stacked kernel": box(("layers", "embed", "heads", "head_dim")),
        "output": box(("layers", "heads", "head_dim", "embed")),
        "norm": box(("norm",)),
        "stacked norm": box(("layers", "norm")),
        "stacked bias": box(("layers", "embed")),
        "bias of heads": box(("heads", "head_dim")),
        "table": box(("vocab", "embed")),
        "plain matrix": jnp.ones((2, 2)),
        "plain vector": jnp.ones(2),
    }
    mask = optim.decay_mask(boxed)
    decayed = {name for name, value in mask.items() if value}
    assert decayed == {"kernel", "stacked kernel", "output", "plain matrix"}


def make(config, trainable, decayed):
    return optim.make_optimizer(config, steps=100, trainable=trainable, decayed=decayed)


def test_decay_moves_only_what_it_should():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    config = OptimizerConfig(peak_learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    rule = make(config, {"a": True, "b": True}, {"a": True, "b": False})
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.transform.update(grads, rule.transform.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["a"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(after["b"], 1.0)


def test_the_gradient_is_clipped_and_not_the_update():
    # Adam's first update does not depend on the gradient's scale; its moments do.
    params = {"a": jnp.ones(4)}
    config = OptimizerConfig(warmup_steps=0, clip=1.0)
    rule = make(config, {"a": True}, {"a": False})
    grads = {"a": jnp.full(4, 100.0)}
    _, state = rule.transform.update(grads, rule.transform.init(params), params)
    moments = optax.tree.get(state, "mu")["a"]
    np.testing.assert_allclose(moments, (1 - config.b1) * 0.5, rtol=1e-5)


def test_frozen_weights_have_neither_moments_nor_decay():
    params = {"free": jnp.ones((2, 2)), "frozen": {"a": jnp.ones((2, 2))}}
    trainable = {"free": True, "frozen": {"a": False}}
    everything = jax.tree.map(lambda _: True, params)
    rule = make(OptimizerConfig(warmup_steps=0), trainable, everything)
    chosen = rule.trainable_of(params)
    assert chosen["frozen"]["a"] is None
    state = rule.transform.init(chosen)
    assert len(jax.tree.leaves(optax.tree.get(state, "mu"))) == 1
    updates, _ = rule.transform.update(chosen, state, chosen)
    after = optim.merge(optax.apply_updates(chosen, updates), params)
    assert after["frozen"]["a"] is params["frozen"]["a"]
    assert np.all(np.asarray(after["free"]) != 1)


def test_select_and_merge_are_inverse():
    tree = {"a": 1, "b": {"c": 2, "d": 3}}
    mask = {"a": True, "b": {"c": False, "d": True}}
    other = jax.tree.map(lambda keep: not keep, mask)
    chosen, rest = optim.select(tree, mask), optim.select(tree, other)
    assert chosen == {"a": 1, "b": {"c": None, "d": 3}}
    assert optim.merge(chosen, rest) == tree
