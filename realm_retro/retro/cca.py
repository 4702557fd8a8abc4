"""Chunked cross-attention: RETRO's one new operator (section 2.4, listing 1).

A sequence of n tokens is l chunks of m. The k neighbours of chunk u, each of r = 2 m
tokens, are encoded to E_u, and may be used once all of chunk u is known: by its last
token and the first m − 1 tokens of the next chunk. Those m tokens are the *attending
chunk* H_u⁺, so the operator shifts the sequence by m − 1, attends chunk by chunk, and
shifts back; the first m − 1 tokens attend nothing and get exactly zero.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from realm_retro.nn.attention import KeyValues, RelativeAttention
from realm_retro.typing import Array, Bool, Float


def to_attending_chunks(
    x: Float[Array, "batch n width"], chunk_length: int
) -> Float[Array, "batch l m width"]:
    """Drops the first m − 1 positions, pads the end, cuts into chunks: H_u⁺."""
    batch, length, width = x.shape
    shift = chunk_length - 1
    x = jnp.pad(x[:, shift:], ((0, 0), (0, shift), (0, 0)))
    return x.reshape(batch, length // chunk_length, chunk_length, width)


def from_attending_chunks(
    x: Float[Array, "batch l m width"],
) -> Float[Array, "batch n width"]:
    """Undoes `to_attending_chunks`: zeros for the first m − 1 positions."""
    batch, chunks, length, width = x.shape
    flat = x.reshape(batch, chunks * length, width)
    shift = length - 1
    return jnp.pad(flat, ((0, 0), (shift, 0), (0, 0)))[:, : chunks * length]


class ChunkedCrossAttention(nn.Module):
    """CCA(H, E) of equation 5, without the residual.

    Positions: the distance of the i-th token of an attending chunk to token i' of a
    neighbour is ``i − i' + m − 1`` (equation 6, whose l is meant to be m), and starts
    anew for each neighbour. The softmax is joint over all k r keys, so the order of
    the neighbours does not matter and no weight depends on k.

    Attributes:
      attention: the attention from decoder to encoded neighbours.
      chunk_length: m.
    """

    attention: RelativeAttention
    chunk_length: int

    def keys_values(self, neighbours: Float[Array, "*b k r encoder"]) -> KeyValues:
        """Projects encoded neighbours; the k r tokens of a chunk become one axis."""
        *batch, k, r, width = neighbours.shape
        return self.attention.keys_values(neighbours.reshape(*batch, k * r, width))

    def relative_keys(self, retrieved: int) -> Array:
        """W s(i − i' + m − 1) for a whole attending chunk and one neighbour of r."""
        m = self.chunk_length
        return self.attention.relative_keys(m, m + retrieved, offset=m - 1)

    def __call__(
        self,
        x: Float[Array, "batch n width"],
        neighbours: Float[Array, "batch l k r encoder"],
        mask: Bool[Array, "batch l k r"],
    ) -> Float[Array, "batch n width"]:
        """Attends from normed activations to the encoded neighbours.

        Args:
          x: activations of l whole chunks.
          neighbours: E_u for each chunk u.
          mask: True for real tokens of neighbours that are there; a chunk without
            any contributes exactly zero.
        """
        batch, chunks, k, r = mask.shape
        attending = to_attending_chunks(x, self.chunk_length)
        y = self.attention(
            attending,
            self.keys_values(neighbours),
            mask=mask.reshape(batch, chunks, 1, k * r),
            relative=self.relative_keys(r),
            repeats=k,
        )
        return from_attending_chunks(y)
