"""Shape aliases shared by the whole package.

Axis names used in annotations (jaxtyping strings):

* ``batch``      sequences of a batch
* ``length``     tokens of a sequence (n in the RETRO paper)
* ``chunks``     chunks of a sequence (l = n / m)
* ``neighbours`` neighbours of a chunk (k)
* ``retrieved``  tokens of one neighbour (r = 2 m: chunk and continuation)
* ``model``      width of the decoder (d), ``encoder`` width of the encoder (d')
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array
HostArray: TypeAlias = np.ndarray
PyTree: TypeAlias = Any
Params: TypeAlias = Mapping[str, Any]
Batch: TypeAlias = Mapping[str, Any]
JsonDict: TypeAlias = dict[str, Any]
# An ml_collections.ConfigDict, of whose attributes no type checker can know.
Config: TypeAlias = Any

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "Config",
    "Float",
    "HostArray",
    "Int",
    "JsonDict",
    "Params",
    "PyTree",
]
