"""Small blocks that both systems are built from: norms, projections, feed-forward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from realm_retro.parallel import axes
from realm_retro.typing import Array, Float, Int


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: Sequence[str | None],
    shape: Sequence[int],
) -> Array:
    """Declares a float32 weight of `module` whose dimensions have logical axis names.

    Only for use inside a compact ``__call__`` or ``setup``.
    """
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    # Flax's types say that this is a box; at run time it is the array inside.
    return cast(Array, module.param(name, boxed, tuple(shape), jnp.float32))


def linear(x: Array, weight: Array, contract: int = 1) -> Array:
    """``[…, *inputs] × [*inputs, *features] → […, *features]``.

    In the weight's gradient, the first factor is copied transposed, and XLA on CPU
    fuses into that copy whatever made the factor, element by element across memory.
    So the narrower one comes first, which JAX's own rule leaves to chance.

    Args:
      x: activations.
      weight: the map.
      contract: how many axes `inputs` are.
    """
    return cast(Array, _linear(x, weight, contract))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, weight: Array, contract: int) -> Array:
    trailing = tuple(range(x.ndim - contract, x.ndim))
    over = ((trailing, tuple(range(contract))), ((), ()))
    return jax.lax.dot_general(x, weight, over)


def _linear_forward(x: Array, weight: Array, contract: int):
    return _linear(x, weight, contract), (x, weight)


def _linear_backward(contract: int, saved: tuple[Array, Array], dy: Array):
    x, weight = saved
    rows = tuple(range(x.ndim - contract))
    features = tuple(range(contract, weight.ndim))
    outputs = tuple(range(len(rows), dy.ndim))
    dx = jax.lax.dot_general(dy, weight, ((outputs, features), ((), ())))
    over_rows = ((rows, rows), ((), ()))
    if math.prod(weight.shape[:contract]) <= math.prod(weight.shape[contract:]):
        return dx, jax.lax.dot_general(x, dy, over_rows)
    transposed = jax.lax.dot_general(dy, x, over_rows)
    return dx, jnp.moveaxis(transposed, range(-contract, 0), range(contract))


_linear.defvjp(_linear_forward, _linear_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32.

    Attributes:
      dtype: dtype of the result; the scale is kept in float32.
    """

    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        """Normalises the last axis."""
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:])
        y = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square + self.epsilon)
        return (y * _like(scale, y)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016), computed in float32.

    Attributes:
      dtype: dtype of the result; scale and bias are kept in float32.
    """

    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        """Normalises the last axis."""
        width = x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), width)
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), width)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.epsilon)
        return (y * _like(scale, y) + _like(bias, y)).astype(self.dtype)


class Projection(nn.Module):
    """A linear map from the last axes of the input to new axes.

    Attributes:
      features: sizes of the new axes, e.g. ``(heads, head_dim)``.
      axes: logical axis names of the weight: contracted axes, then new ones.
      dtype: dtype of the product; the weight is kept in float32.
      scale: multiplies the initial standard deviation of 1 / √fan-in.
      contract: how many trailing axes of the input are contracted.
      bias: whether a bias is added, zero at first.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype = jnp.float32
    scale: float = 1.0
    contract: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """``[…, *contracted] → […, *features]``."""
        inputs = x.shape[x.ndim - self.contract :]
        fan_in = 1
        for size in inputs:
            fan_in *= size
        init = nn.initializers.normal(self.scale * fan_in**-0.5)
        shape = (*inputs, *self.features)
        weight = parameter(self, "kernel", init, self.axes, shape)
        y = linear(x.astype(self.dtype), weight.astype(self.dtype), self.contract)
        if self.bias:
            names = self.axes[self.contract :]
            bias = parameter(self, "bias", nn.initializers.zeros, names, self.features)
            y = y + _like(bias, y).astype(self.dtype)
        return y


class FeedForward(nn.Module):
    """Two projections with a GELU between them (the paper's FFW).

    Attributes:
      hidden: width between the projections (d_ffw).
      scale: initial scale of the second projection.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        """Maps each position by itself."""
        h = Projection((self.hidden,), ("embed", "mlp"), self.dtype, name="up")(x)
        between = (None,) * (h.ndim - 2)
        h = axes.constrain(nn.gelu(h, approximate=True), ("batch", *between, "mlp"))
        return Projection(
            (x.shape[-1],), ("mlp", "embed"), self.dtype, self.scale, name="down"
        )(h)


class TokenEmbedding(nn.Module):
    """Token embeddings, and logits with the same weights.

    Weights have variance 1 / width, so that logits of a normed activation start with
    variance 1; embeddings are scaled by √width to start with variance 1 as well.

    Attributes:
      vocab_size: rows.
      width: size of an embedding.
    """

    vocab_size: int
    width: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Declares the table."""
        init = nn.initializers.normal(self.width**-0.5)
        shape = (self.vocab_size, self.width)
        self.table = parameter(self, "table", init, ("vocab", "embed"), shape)

    def __call__(self, tokens: Int[Array, "*axes"]) -> Float[Array, "*axes width"]:
        """Looks tokens up."""
        # Whole in width, as for a product; or the compiler may look up pieces of the
        # global batch's rows on each device and gather those.
        table = axes.constrain(self.table, ("vocab", None))
        rows = jnp.take(table, tokens, axis=0).astype(self.dtype)
        rows = axes.constrain(rows, ("batch", *(None,) * (rows.ndim - 1)))
        return rows * jnp.asarray(self.width**0.5, self.dtype)

    def logits(self, x: Float[Array, "*axes width"]) -> Float[Array, "*axes vocab"]:
        """Scores every token, in `dtype`."""
        return linear(x, self.table.astype(self.dtype).T)


def _like(values: Array, x: Array) -> Array:
    return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)
