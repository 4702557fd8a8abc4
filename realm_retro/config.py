"""From a config file's ``ConfigDict`` to the small dataclass beside the code.

A file in ``configs/`` returns one ``ml_collections.ConfigDict`` whose sections
(``corpus``, ``model``, ``train`` …) carry plain values, so that any of them can be
overridden on the command line (``--config.train.steps=200``). The code that reads a
section declares a frozen dataclass and gets it with `build`, which refuses unknown
and missing fields and says what the known ones are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import ml_collections

from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

T = TypeVar("T")


def build(cls: type[T], section: Any, *, name: str) -> T:
    """Builds the dataclass `cls` from one section of a config.

    Args:
      cls: a dataclass; its own ``__post_init__`` checks the values.
      section: a mapping (usually a ``ConfigDict``) with exactly its fields; fields
        that have a default may be missing.
      name: what to call the section in errors, e.g. ``config.model``.

    Raises:
      UserError: for an unknown field, or a missing one without a default.
    """
    values = as_dict(section)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise UserError(f"{name}.{key} is not a setting; {name} has: {known}")
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            raise UserError(
                f"{name}.{key} is missing from the config and has no default"
            )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**frozen)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def read(config: Any, name: str, cls: type[T]) -> T:
    """Builds `cls` from the section `name` of a config; see `build` and `section`."""
    return build(cls, section(config, name), name=f"config.{name}")


def section(config: Any, name: str) -> Any:
    """One section of a config; an empty one where the config is silent."""
    return config.get(name, ml_collections.ConfigDict())


def as_dict(value: Any) -> JsonDict:
    """A plain dict of JSON-able values from a ``ConfigDict``, mapping or dataclass."""
    if isinstance(value, ml_collections.ConfigDict):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(cast(Mapping[str, Any], value))
