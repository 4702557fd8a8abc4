"""Every full-size config compiles for the TPUs that it names, fits, wastes little."""

import pathlib
import re

import jax
import pytest

from realm_retro import config as config_lib
from realm_retro.cli import plan
from realm_retro.cli.plan_task import PlanConfig
from realm_retro.parallel import topology

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = [
    "retro/retro_172m.py",
    "retro/retro_425m.py",
    "retro/retro_1_5b.py",
    "retro/retro_7_5b.py",
    "realm/base.py",
    "realm/base.py:ict",
    "realm/base.py:finetune",
]
GIB = 2**30


def planned(name, place=""):
    path, _, which = name.partition(":")
    scope = {}
    exec((ROOT / "configs" / path).read_text(), scope)
    config = scope["get_config"](*([which] if which else []))
    settings = config_lib.build(PlanConfig, config.plan, name="config.plan")
    found = topology.parse(plan.chosen(place, settings))
    return plan.plan(config, settings, found), config


def test_every_full_size_config_is_here():
    paper = sorted((ROOT / "configs").rglob("*.py"))
    large = [
        str(path.relative_to(ROOT / "configs"))
        for path in paper
        if "sizes.paper(" in path.read_text() or "sizes.base(" in path.read_text()
    ]
    assert set(large) == {name.partition(":")[0] for name in CONFIGS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not topology.can_compile(), reason="needs libtpu: the extra tpu")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_compiles_fits_and_wastes_little(name):
    found, config = planned(name)
    assert found["fits"] is True, found["verdict"]
    assert found["notes"] == []
    assert found["flops"]["unknown_loops"] == 0
    compiled = found["compiled"]
    assert compiled["unknown_loops"] == 0
    # Nothing large lies on every chip, neither weights nor moments.
    assert found["memory"]["whole"] == {}
    # Chips do not do each other's work.
    assert compiled["repeated"] < 1.5
    # No array of the vocabulary's width in float32 for a whole batch.
    vocabulary = config.model.get("vocab_size", 30522)
    for array in compiled["arrays"]:
        wide = re.match(rf"f32\[(?:\d+,)*{vocabulary}\]", array["shape"])
        assert not (wide and array["bytes"] > GIB), array
    # The index stays where it is.
    whole = found["memory"]["index"] * found["topology"]["chips"]
    for one in compiled["largest_collectives"]:
        assert not whole or one["bytes"] < whole / 16, one


@pytest.mark.slow
@pytest.mark.skipif(not topology.can_compile(), reason="needs libtpu: the extra tpu")
def test_what_is_too_large_is_refused_by_the_compiler():
    found, _ = planned("retro/retro_1_5b.py", "v5e:2x2")
    assert found["fits"] is False
    assert found["memory"]["needed"] > found["memory"]["capacity"]
    assert "ran out of memory" in found["notes"][0].lower()
    assert jax.devices()[0].platform == "cpu"
