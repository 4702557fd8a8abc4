"""Multi-head attention with relative positions, for every attention of RETRO.

Positions enter as in Transformer-XL (Dai et al. 2019), which is how we read the RETRO
paper's "positional logits are obtained as a linear transform of a cosine vector
computed from d(i, i')" (appendix B.1.2): with s(d) a vector of sines and cosines of
the distance and W a learned map to heads × head size,

    logits[i, i'] = ((q_i + u) · k_i' + (q_i + v) · W s(d(i, i'))) / √head_size.

The width of s(d) is the width of the queries' layer. This reading is the one that
gives the parameter counts of the paper's baselines (132M, 368M, 1,309M, 6,982M).

Distances differ per attention (self: i − i'; chunked cross-attention: i − i' + m − 1;
encoder: i' − i), so the caller passes the distance of the first query and key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from realm_retro.nn.layers import Projection
from realm_retro.parallel import axes
from realm_retro.typing import Array, Bool, Float, Int

# Finite, so that a row without any key gives zeros and not NaN (see `softmax_terms`).
_MASKED = -1e30


class KeyValues(NamedTuple):
    """Projected keys and values, ``[batch…, keys, heads, head_dim]`` each."""

    keys: Array
    values: Array


class Queries(NamedTuple):
    """What asks, ``[batch…, queries, heads, head_dim]`` each, scaled.

    Attributes:
      content: (q + u) / √head_size, for the keys.
      position: (q + v) / √head_size, for W s(d).
    """

    content: Array
    position: Array


def distance_features(distances: Int[Array, " n"], width: int) -> Float[Array, "n w"]:
    """s(d): sines and cosines of the distances at geometric wavelengths, float32.

    Args:
      distances: signed distances, in tokens.
      width: how many features; half sines, half cosines. Must be even.
    """
    if width % 2:
        raise ValueError(
            f"the width of the distance features must be even, not {width}"
        )
    powers = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    frequencies = jnp.power(10_000.0, -powers)
    angles = distances.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def skew(by_distance: Array, num_keys: int) -> Array:
    """Turns logits per (query, distance) into logits per (query, key).

    Column c of the input holds the distance d_max − c, where d_max is the distance of
    the last query to the first key; query i needs key i' at column
    ``queries − 1 − i + i'``. That is one slice and two reshapes, no gather.

    Args:
      by_distance: ``[…, queries, distances]``, distances in falling order, at least
        ``num_keys + 1`` of them unless there is one query. A key whose column lies
        beyond the last reads garbage: the caller masks it.
      num_keys: keys wanted.

    Returns:
      ``[…, queries, num_keys]``.
    """
    *batch, queries, distances = by_distance.shape
    if queries == 1:
        return by_distance[..., :num_keys]
    flat = by_distance.reshape(*batch, queries * distances)
    flat = flat[..., queries - 1 : queries - 1 + queries * (distances - 1)]
    return flat.reshape(*batch, queries, distances - 1)[..., :num_keys]


def softmax_terms(
    logits: Float[Array, "*axes keys"], mask: Bool[Array, "*axes keys"]
) -> tuple[Float[Array, "*axes keys"], Float[Array, "*axes 1"]]:
    """The softmax over the keys that `mask` allows, as weights and what divides them.

    In float32. A row without any key gets an infinite divisor, that is zeros. Values
    and gradients are finite for every mask (traps: −inf rows, where-gradients).
    """
    logits = jnp.where(mask, logits.astype(jnp.float32), _MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, jnp.where(jnp.any(mask, axis=-1, keepdims=True), total, jnp.inf)


def attend(
    queries: Queries,
    source: KeyValues,
    relative: Float[Array, "distances heads head_dim"],
    mask: Bool[Array, "*b queries keys"],
    *,
    repeats: int = 1,
) -> Float[Array, "*b queries heads head_dim"]:
    """What each query reads; exactly zero for a query that may see nothing.

    Heads come before positions throughout, which makes every product one over
    contiguous matrices, and values are divided by the softmax's sum after they are
    added up, which spares a pass over the weights.

    Args:
      queries: see `Queries`.
      source: what is attended to.
      relative: W s(d), in the order that `skew` wants.
      mask: True where a query may see a key.
      repeats: the keys are this many runs whose positions each start anew; the softmax
        is joint over all of them.
    """
    content, position, keys, values, relative = (
        jnp.swapaxes(x, -2, -3) for x in (*queries, *source, relative)
    )
    logits = skew(
        jnp.einsum("...hqd,...hld->...hql", position, relative),
        keys.shape[-2] // repeats,
    )
    if repeats > 1:
        logits = jnp.concatenate([logits] * repeats, axis=-1)
    logits = logits + jnp.einsum("...hqd,...hkd->...hqk", content, keys)
    weights, total = softmax_terms(logits, jnp.expand_dims(mask, -3))
    y = jnp.einsum("...hqk,...hkd->...hqd", weights.astype(values.dtype), values)
    return jnp.swapaxes((y / total).astype(values.dtype), -2, -3)


def attend_causally(
    queries: Queries,
    source: KeyValues,
    relative: Float[Array, "distances heads head_dim"],
    mask: Bool[Array, "*b n n"],
) -> Float[Array, "*b n heads head_dim"]:
    """`attend` where no query sees a later key: keys that none can see are left out.

    The queries are cut into up to four runs, each with the keys up to its own end,
    which is 5/8 of the work.
    """
    n = mask.shape[-1]
    size = n // next(parts for parts in (4, 2, 1) if n % parts == 0)
    runs = []
    for end in range(size, n + 1, size):
        asking = slice(end - size, end)
        runs.append(
            attend(
                Queries(*(x[..., asking, :, :] for x in queries)),
                KeyValues(*(x[..., :end, :, :] for x in source)),
                # Row c is the distance n − 1 − c; a run starts at end − 1.
                relative[n - end : n + 1],
                mask[..., asking, :end],
            )
        )
    return jnp.concatenate(runs, axis=-3)


class RelativeAttention(nn.Module):
    """Multi-head attention with Transformer-XL positions; see the module docstring.

    ``num_heads * head_dim`` need not equal the width of the layer.

    Attributes:
      num_heads: heads.
      head_dim: size of one head.
      width: width of the queries' layer, of the output and of s(d).
      dtype: dtype of the products; softmax and weights are in float32.
      scale: initial scale of the output projection; 0 starts it at zero.
    """

    num_heads: int
    head_dim: int
    width: int
    dtype: jnp.dtype = jnp.float32
    scale: float = 1.0

    def setup(self):
        """Declares the maps and biases."""
        heads, into = (self.num_heads, self.head_dim), ("embed", "heads", "head_dim")
        self.query = Projection(heads, into, self.dtype)
        self.key = Projection(heads, into, self.dtype)
        self.value = Projection(heads, into, self.dtype)
        self.position = Projection(heads, into, self.dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, into[1:])
        self.content_bias = self.param("content_bias", zeros, heads, jnp.float32)
        self.position_bias = self.param("position_bias", zeros, heads, jnp.float32)
        out_of = ("heads", "head_dim", "embed")
        self.output = Projection(
            (self.width,), out_of, self.dtype, self.scale, contract=2
        )

    def keys_values(self, source: Float[Array, "*b keys width"]) -> KeyValues:
        """Projects what is attended to."""
        return KeyValues(_by_heads(self.key(source)), _by_heads(self.value(source)))

    def relative_keys(
        self, num_queries: int, num_distances: int, offset: int
    ) -> Float[Array, "distances heads head_dim"]:
        """W s(d) for d = ``offset + num_queries − 1`` and falling by one a row."""
        distances = offset + num_queries - 1 - jnp.arange(num_distances)
        return self.position(distance_features(distances, self.width))

    def __call__(
        self,
        x: Float[Array, "*b queries width"],
        source: KeyValues,
        *,
        mask: Bool[Array, "*b queries keys"],
        relative: Float[Array, "distances heads head_dim"],
        repeats: int = 1,
        causal: bool = False,
    ) -> Float[Array, "*b queries width"]:
        """Attends from `x` to the projected `source`.

        Args:
          x: normed activations that ask.
          source: keys and values, ``[*b, keys, heads, head_dim]``.
          mask: True where a query may see a key; broadcast over leading axes.
          relative: `relative_keys` for these queries and keys.
          repeats: the keys are this many runs (neighbours) whose positions each start
            anew; the softmax is joint over all of them.
          causal: promises that `mask` hides every later key from a query, so that
            they need not be scored.

        Returns:
          The output projection of the attended values: exactly zero for a query that
          may see nothing.
        """
        scale = self.head_dim**-0.5
        query = _by_heads(self.query(x))
        queries = Queries(
            _add(query, self.content_bias) * scale,
            _add(query, self.position_bias) * scale,
        )
        if causal:
            y = attend_causally(queries, source, relative, mask)
        else:
            y = attend(queries, source, relative, mask, repeats=repeats)
        return self.output(_by_heads(y))


def _by_heads(x: Array) -> Array:
    """``[batch, …, heads, head_dim]``, laid out by rows of the batch and by heads."""
    between = (None,) * (x.ndim - 3)
    return axes.constrain(x, ("batch", *between, "heads", "head_dim"))


def _add(query: Array, bias: Any) -> Array:
    bias = bias.astype(query.dtype)
    return query + bias.reshape((1,) * (query.ndim - 2) + bias.shape)
