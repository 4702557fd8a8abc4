"""Floating-point operations of a program, counted in its jaxpr.

The compiler's own count takes the body of a loop once, however often it runs. Here the
body of a scan counts as often as it is long, recomputation in the backward pass
included. Only matrix products and convolutions are counted: the rest is no work for a
matrix unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

# Passes of a matrix unit that multiplies bfloat16 over a product of float32, by the
# precision that it was asked for (jax.lax.Precision).
_PASSES = {"HIGHEST": 6, "HIGH": 3}


@dataclasses.dataclass(frozen=True)
class Flops:
    """What a program multiplies and adds, all devices together.

    Attributes:
      total: multiply-adds × 2.
      passes: the same with each product of float32 taken as often as a unit for
        bfloat16 has to.
      once: `total` with every loop body taken once, as a compiler counts.
      unknown_loops: loops without a fixed number of turns, whose bodies are taken
        once; 0 where the count is whole.
    """

    total: float = 0.0
    passes: float = 0.0
    once: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            *(a + b for a, b in zip(_values(self), _values(other), strict=True))
        )

    def repeated(self, times: int) -> Flops:
        """A loop body that is run so often."""
        return dataclasses.replace(
            self, total=self.total * times, passes=self.passes * times
        )

    def everywhere(self, devices: int) -> Flops:
        """A body whose shapes are those of one of so many devices."""
        return Flops(
            self.total * devices,
            self.passes * devices,
            self.once * devices,
            self.unknown_loops,
        )


def count(jaxpr: Any) -> Flops:
    """The operations of a jaxpr, closed or not, with everything that it calls.

    Args:
      jaxpr: e.g. ``jax.jit(f).trace(*arguments).jaxpr``.
    """
    total = Flops()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total += _equation(equation)
    return total


def _equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "cond":
        # One branch runs; the dearest is what has to be paid for.
        return max(map(count, params["branches"]), key=lambda found: found.passes)
    inner = Flops()
    for sub in _jaxprs(params):
        inner += count(sub)
    if name == "scan":
        return inner.repeated(params["length"])
    if name == "while" and inner.total:
        return dataclasses.replace(inner, unknown_loops=inner.unknown_loops + 1)
    if name == "shard_map":
        manual = params.get("manual_axes") or params["mesh"].axis_names
        sizes = dict(params["mesh"].shape)
        return inner.everywhere(math.prod(sizes[axis] for axis in manual))
    return inner


def _product(equation: Any) -> Flops:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    (out,) = equation.outvars
    depth = math.prod(left.shape[axis] for axis in contracted)
    return _weighed(2.0 * out.aval.size * depth, equation)


def _convolution(equation: Any) -> Flops:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval
    (out,) = equation.outvars
    features = kernel.shape[numbers.rhs_spec[0]]
    return _weighed(2.0 * out.aval.size * kernel.size / max(features, 1), equation)


def _weighed(flops: float, equation: Any) -> Flops:
    precision = str(equation.params.get("precision") or "").upper()
    passes = 1
    if all(x.aval.dtype.itemsize >= 4 for x in equation.invars):
        asked = (n for name, n in _PASSES.items() if f".{name}" in precision)
        passes = max(asked, default=1)
    return Flops(flops, flops * passes, flops)


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _jaxprs(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)
    elif hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
        yield value


def _values(flops: Flops) -> tuple[Any, ...]:
    return tuple(getattr(flops, field.name) for field in dataclasses.fields(flops))
