"""A plain decoder learns to retrieve, and stays the decoder that it was."""

import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import pytest
from retro_examples import jit, random_example, random_params, small_config

from realm_retro.errors import UserError
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.retro import flops, recipe, retrofit
from realm_retro.retro.model import Retro, runs
from realm_retro.retro.retrofit import InitConfig
from realm_retro.train import optim

# Every kind of run: layers below, between and above, one or several to a unit.
PLACES = [(2, 4, 6), (1, 4, 5), (7,)]


def fitted(places, layers=7):
    """(RETRO's config, its parameters, the decoder's config and parameters)."""
    config = small_config(num_layers=layers, cca_layers=places)
    base = retrofit.plain(config)
    decoder = {"params": random_params(base, seed=3)}
    new = {"params": random_params(config)}
    extend = jit(functools.partial(retrofit.extend, config))
    return config, extend(decoder, new), base, decoder


def test_off_is_the_decoder_bit_for_bit():
    config, params, base, decoder = fitted((2,), layers=3)
    x = random_example(config)
    shape, cut = recipe.without_retrieval(
        config, params, make_mesh(MeshConfig(2, 2, 2))
    )
    assert shape == base
    apply = jit(Retro(base).apply)
    wanted = apply(decoder, x.tokens, x.segments)
    off = apply(jax.device_get(cut), x.tokens, x.segments)
    np.testing.assert_array_equal(off, wanted)
    # The whole RETRO without neighbours is another program, and rounds on its own.
    whole = jit(Retro(config).apply)(params, x.tokens, x.segments)
    np.testing.assert_allclose(whole, wanted, atol=1e-4)


@pytest.mark.parametrize("places", PLACES)
def test_the_decoder_comes_out_as_it_went_in(places):
    config, params, _, decoder = fitted(places)
    found = jit(functools.partial(retrofit.decoder_of, config))(params)
    jax.tree.map(np.testing.assert_array_equal, found, decoder)
    shapes = jax.tree.map(np.shape, {"params": random_params(config)})
    assert jax.tree.map(np.shape, params) == shapes


@pytest.mark.parametrize("places", PLACES)
def test_every_layer_stands_in_its_place(places):
    config = small_config(num_layers=7, cca_layers=places)
    decoder = {"params": random_params(retrofit.plain(config))}
    # Each layer holds nothing but its number.
    decoder["params"]["stem"] = jax.tree.map(
        lambda x: np.broadcast_to(
            np.arange(1, 8.0)[(...,) + (None,) * (x.ndim - 1)], x.shape
        ),
        decoder["params"]["stem"],
    )
    params = retrofit.extend(config, decoder, {"params": random_params(config)})

    def numbers(tree):
        return np.unique(tree["attention"]["norm"]["scale"]).tolist()

    made = params["params"]
    assert np.unique(made["bridge_ffw"]["norm"]["scale"]).tolist() == [places[0]]
    groups = [made[f"groups_{i}"] for i in range(len(runs(config).groups))]
    cross = [number for group in groups for number in numbers(group["cca"])]
    assert cross == [*places[1:]]
    rest = [made["stem"]] if "stem" in made else []
    rest += [{k: v for k, v in group.items() if k != "cca"} for group in groups]
    rest += [made["tail"]] if "tail" in made else []
    plain = [
        number for run in rest for layer in run.values() for number in numbers(layer)
    ]
    assert sorted(plain) == [i for i in range(1, 8) if i not in places]


@pytest.mark.parametrize("places", PLACES)
def test_what_is_trained_is_what_the_decoder_does_not_have(places):
    config, params, base, decoder = fitted(places)
    mask = retrofit.trainable(params)
    trained, frozen = (
        jax.tree.leaves(optim.select(params, chosen))
        for chosen in (mask, jax.tree.map(lambda x: not x, mask))
    )
    size = sum(leaf.size for leaf in trained)
    assert size == recipe.count_params(config) - recipe.count_params(base) > 0
    new = optim.select({"params": random_params(config)}, mask)
    for ours, wanted in zip(trained, jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    count = sum(leaf.size for leaf in frozen)
    assert count == sum(leaf.size for leaf in jax.tree.leaves(decoder))


def config_of(**init):
    model = small_config(cca_layers=init.pop("places", (2, 3)))
    return ml_collections.ConfigDict(
        {"seed": 0, "model": dataclasses.asdict(model), "init": init}
    )


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"frozen": True}, "name the run that trained it in config.init.run"),
        ({"frozen": True, "run": "a", "places": ()}, "config.model.cca_layers is empt"),
        ({"bert": "minilm"}, "config.init.bert is not a setting"),
    ],
)
def test_what_cannot_be_is_one_line(init, message):
    with pytest.raises(UserError, match=message) as error:
        recipe.init_config(config_of(**init))
    assert "\n" not in str(error.value)


def test_without_the_section_weights_are_random():
    config = config_of()
    del config.init
    assert recipe.init_config(config) == InitConfig()


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^config.init.run='base' must be.*runs/base"):
        recipe.start_params(config_of(run="base"), tmp_path, None)


def test_frozen_weights_cost_no_gradient():
    config, size = small_config(), {"tokens": 64, "window": 16}
    off = flops.forward_flops(config, **size, k=0)
    new = flops.forward_flops(config, **size, k=2) - off
    logits = 2 * 64 * config.model_dim * config.vocab_size
    layer = (off - logits) / config.num_layers
    found = flops.training_flops(config, **size, k=2, frozen=True)
    # Layer 1 forward alone; layers 2 and 3 and the logits there and back; the new
    # weights' three passes.
    assert found == pytest.approx(layer + 2 * (2 * layer + logits) + 3 * new)
    assert flops.training_flops(config, **size, k=2) == pytest.approx(3 * (off + new))
