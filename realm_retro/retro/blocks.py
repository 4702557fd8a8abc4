"""The residual blocks of RETRO's decoder: pre-norm, each adds what it computes.

Each block runs in one of two ways, told by its `Context`: over whole sequences, or
over one token with the past in the collection ``cache``. Both give the same numbers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from realm_retro.nn.attention import KeyValues, RelativeAttention
from realm_retro.nn.layers import FeedForward, RMSNorm
from realm_retro.parallel import axes
from realm_retro.retro.cca import ChunkedCrossAttention
from realm_retro.retro.config import RetroConfig
from realm_retro.typing import Array, Float

_ACTIVATIONS = ("batch", "length", "embed_act")


class Context(flax.struct.PyTreeNode):
    """What all layers of one pass share.

    Attributes:
      mask: which position sees which, ``[batch, n, n]``; None in a step.
      neighbours: encoded neighbours E, ``[batch, l, k, r, encoder]``; in a step l is
        1 and they are given only where a chunk completes.
      neighbour_mask: their real tokens, ``[batch, l, k, r]``; in a step
        ``[batch, k, r]`` of the neighbours in use.
      position: of the one token of a step; None over whole sequences.
    """

    # Any: which of them are there depends on the pass, and is checked where it starts.
    mask: Any = None
    neighbours: Any = None
    neighbour_mask: Any = None
    position: Any = None

    @property
    def retrieves(self) -> bool:
        """Whether there are neighbours to attend to."""
        return self.neighbour_mask is not None


class SelfAttention(nn.Module):
    """h + ATTN(norm(h)), causal and within a document.

    Attributes:
      config: the model's shape.
      decode_length: room in the cache, in tokens.
    """

    config: RetroConfig
    decode_length: int = 0

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch n model"], context: Context
    ) -> Float[Array, "batch n model"]:
        """Adds what each position reads from those that it may see."""
        attention = _attention(self.config, "attention")
        x = RMSNorm(_dtype(self.config), name="norm")(h)
        source = attention.keys_values(x)
        if context.position is None:
            n = h.shape[1]
            # Causal: distances n − 1 … 0, and one more column that `skew` needs.
            relative = attention.relative_keys(n, n + 1, offset=0)
            mask = context.mask
        else:
            source, relative, mask = self._past(attention, source, context.position)
        whole = context.position is None
        y = attention(x, source, mask=mask, relative=relative, causal=whole)
        return axes.constrain(h + y, _ACTIVATIONS)

    def _past(self, attention: RelativeAttention, new: KeyValues, position: Array):
        """Appends the new token's keys and values; returns all that it may see."""
        room = self.decode_length
        batch, _, *head = new.keys.shape
        past = self.variable(
            "cache",
            "past",
            lambda: KeyValues(*(jnp.zeros((batch, room, *head), x.dtype) for x in new)),
        )
        past.value = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(
                old, x, position, axis=1
            ),
            past.value,
            new,
        )
        # Row c of the table is the distance room − 1 − c; this token needs position,
        # position − 1, … for keys 0, 1, …
        table = self.variable(
            "cache", "distances", lambda: attention.relative_keys(room, 2 * room, 0)
        )
        start = room - 1 - position
        relative = jax.lax.dynamic_slice_in_dim(table.value, start, room)
        mask = jnp.arange(room)[None, None, :] <= position
        return past.value, relative, mask


class CrossAttention(nn.Module):
    """h + CCA(norm(h), E).

    Its output projection starts at zero, so a RETRO starts as the plain decoder of its
    size and takes from neighbours only what it has learnt to.
    """

    config: RetroConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch n model"], context: Context
    ) -> Float[Array, "batch n model"]:
        """Adds what each position reads from the neighbours of the last whole chunk."""
        attention = _attention(self.config, "attention", scale=0.0)
        cca = ChunkedCrossAttention(attention, self.config.chunk_length, name="cca")
        x = RMSNorm(_dtype(self.config), name="norm")(h)
        if context.position is None:
            y = cca(x, context.neighbours, context.neighbour_mask)
        else:
            y = self._step(cca, x, context)
        return axes.constrain(h + y, _ACTIVATIONS)

    def _step(self, cca: ChunkedCrossAttention, x: Array, context: Context) -> Array:
        """One token: it attends the neighbours that the last completed chunk got."""
        m = self.config.chunk_length
        batch, k, r = context.neighbour_mask.shape
        if context.neighbours is not None:
            fresh = cca.keys_values(context.neighbours[:, 0])
            self.put_variable("cache", "neighbours", fresh)
        table = self.variable("cache", "distances", lambda: cca.relative_keys(r))
        # The i-th token of the attending chunk; row c of the table is 2 m − 2 − c.
        i = (context.position - (m - 1)) % m
        relative = jax.lax.dynamic_slice_in_dim(table.value, m - 1 - i, r)
        return cca.attention(
            x,
            self.get_variable("cache", "neighbours"),
            mask=context.neighbour_mask.reshape(batch, 1, k * r),
            relative=relative,
            repeats=k,
        )


class ChunkBuffer(nn.Module):
    """H_u while its chunk is generated: a step's activations at layer min(P).

    Attributes:
      chunk_length: m.
    """

    chunk_length: int

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch 1 model"], position: Array
    ) -> Float[Array, "batch m model"]:
        """Writes this token's activations; returns those of its chunk so far."""
        shape = (h.shape[0], self.chunk_length, h.shape[-1])
        chunk = self.variable("cache", "chunk", jnp.zeros, shape, h.dtype)
        chunk.value = jax.lax.dynamic_update_slice_in_dim(
            chunk.value, h, position % self.chunk_length, axis=1
        )
        return chunk.value


class FeedForwardBlock(nn.Module):
    """h + FFW(norm(h))."""

    config: RetroConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch n model"]
    ) -> Float[Array, "batch n model"]:
        """Adds the feed-forward of each position."""
        dtype, scale = _dtype(self.config), _residual_scale(self.config)
        x = RMSNorm(dtype, name="norm")(h)
        y = FeedForward(self.config.ffw_dim, dtype, scale, name="ffw")(x)
        return axes.constrain(h + y, _ACTIVATIONS)


def _attention(
    config: RetroConfig, name: str, *, scale: float = 1.0
) -> RelativeAttention:
    return RelativeAttention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        width=config.model_dim,
        dtype=_dtype(config),
        scale=scale * _residual_scale(config),
        name=name,
    )


def _dtype(config: RetroConfig) -> jnp.dtype:
    return jnp.dtype(config.compute_dtype)


def _residual_scale(config: RetroConfig) -> float:
    """Keeps the residual stream's variance independent of the depth at the start."""
    return (2 * config.num_layers) ** -0.5
