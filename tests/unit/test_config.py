"""Sections of a config become dataclasses, and mistakes in them are named."""

import dataclasses
import json

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro import config as config_lib
from realm_retro.errors import UserError


@dataclasses.dataclass(frozen=True)
class Section:
    size: int
    rate: float = 0.5
    layers: tuple[int, ...] = ()
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.size < 0:
            raise UserError(f"config.section.size is {self.size}; it must be ≥ 0")
        if self.rate > 1:
            raise ValueError(f"rate is {self.rate}, at most 1")


def build(values):
    return config_lib.build(Section, values, name="config.section")


@pytest.mark.parametrize("wrap", [dict, ml_collections.ConfigDict])
def test_values_and_defaults(wrap):
    assert build(wrap({"size": 3})) == Section(size=3)
    assert build(wrap({"size": 3, "rate": 0.1})) == Section(size=3, rate=0.1)


@pytest.mark.parametrize("value", [[3, 6], (3, 6)])
def test_sequences_become_tuples(value):
    config = ml_collections.ConfigDict({"size": 1, "layers": value})
    assert build(config).layers == (3, 6)
    hash(build(config).layers)


def test_an_unknown_field_is_named_with_the_known_ones():
    with pytest.raises(UserError) as raised:
        build({"size": 1, "lerning_rate": 1e-3})
    assert str(raised.value) == (
        "config.section.lerning_rate is not a setting;"
        " config.section has: layers, names, rate, size"
    )


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match=r"config\.section\.size is missing"):
        build({})


def test_the_dataclass_checks_its_values():
    with pytest.raises(UserError, match=r"^config\.section\.size is -1; it must be"):
        build({"size": -1})
    with pytest.raises(UserError, match=r"^config\.section: rate is 2, at most 1"):
        build({"size": 1, "rate": 2})


def test_a_wrong_type_is_one_line():
    with pytest.raises(UserError, match=r"^config\.section: '<' not supported"):
        build({"size": "many"})


def test_a_silent_config_has_empty_sections():
    config = ml_collections.ConfigDict({"a": {"b": 1}})
    assert config_lib.as_dict(config_lib.section(config, "a")) == {"b": 1}
    assert config_lib.as_dict(config_lib.section(config, "none")) == {}


@given(
    st.builds(
        Section,
        size=st.integers(0, 99),
        rate=st.floats(0, 1),
        layers=st.lists(st.integers(0, 9)).map(tuple),
        names=st.dictionaries(st.text("aé\n"), st.text('b"\0'), max_size=3),
    )
)
def test_a_section_survives_json(section):
    text = json.dumps(config_lib.as_dict(section))
    assert build(json.loads(text)) == section


def test_as_dict_does_not_share_with_the_config():
    config = ml_collections.ConfigDict({"a": {"b": 1}})
    config_lib.as_dict(config)["a"]["b"] = 2
    assert config.a.b == 1
