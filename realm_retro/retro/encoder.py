"""The neighbour encoder: bidirectional, its own width, conditioned on the decoder."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from realm_retro.nn.attention import RelativeAttention
from realm_retro.nn.layers import FeedForward, Projection, RMSNorm, TokenEmbedding
from realm_retro.parallel import axes
from realm_retro.retro.config import RetroConfig
from realm_retro.typing import Array, Bool, Float, Int

# Of activations; without it the compiler may cut the width and copy all neighbours of
# the global batch to every device.
_ACTIVATIONS = ("batch", "neighbours", "retrieved", "embed_act")


class EncoderLayer(nn.Module):
    """Self-attention, cross-attention to the decoder's chunk, feed-forward.

    Attributes:
      config: the model's shape.
      conditioned: whether this layer is in P_enc.
    """

    config: RetroConfig
    conditioned: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b k r encoder"],
        mask: Bool[Array, "b k r"],
        chunk: Float[Array, "b 1 m model"],
    ) -> Float[Array, "b k r encoder"]:
        """One layer of Algorithm 1's encoder loop.

        Args:
          x: activations of the k neighbours of each chunk.
          mask: their real tokens.
          chunk: H_u, the decoder's activations of the chunk. They are normed here: the
            decoder's residual stream grows with training, and as it is it would drown
            the neighbour's own tokens.
        """
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        r, m = x.shape[-2], chunk.shape[-2]
        attend = functools.partial(
            RelativeAttention,
            num_heads=config.encoder_num_heads,
            head_dim=config.encoder_head_dim,
            width=config.encoder_dim,
            dtype=dtype,
        )

        attention = attend(name="attention")
        y = RMSNorm(dtype, name="attention_norm")(x)
        x += attention(
            y,
            attention.keys_values(y),
            mask=jnp.expand_dims(mask, -2),
            relative=attention.relative_keys(r, 2 * r, offset=0),
        )
        x = axes.constrain(x, _ACTIVATIONS)
        if self.conditioned:
            # Distance i' − i of neighbour token i' to chunk token i (equation 7).
            cross = attend(name="cross")
            x += cross(
                RMSNorm(dtype, name="cross_norm")(x),
                cross.keys_values(RMSNorm(dtype, name="chunk_norm")(chunk)),
                mask=jnp.ones((x.shape[0], 1, 1, m), bool),
                relative=cross.relative_keys(r, r + m, offset=0),
            )
            x = axes.constrain(x, _ACTIVATIONS)
        y = RMSNorm(dtype, name="ffw_norm")(x)
        x += FeedForward(config.encoder_ffw_dim, dtype, name="ffw")(y)
        return axes.constrain(x, _ACTIVATIONS)


class Encoder(nn.Module):
    """ENCODER(RET(C_u), H_u) of Algorithm 1, for all chunks and neighbours at once."""

    config: RetroConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch l k r"] | Float[Array, "batch l k r model"],
        mask: Bool[Array, "batch l k r"],
        chunks: Float[Array, "batch l m model"],
    ) -> Float[Array, "batch l k r encoder"]:
        """Encodes every neighbour, conditioned on the chunk that retrieved it.

        Args:
          tokens: neighbours' tokens, padded with any id where `mask` is False; or the
            decoder's embeddings of them, which are then mapped to the encoder's width.
          mask: real tokens. A neighbour without any gives finite values, which the
            cross-attention masks.
          chunks: H_u, decoder activations after self-attention at layer min(P).
        """
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        batch, chunks_per_row, k, r = mask.shape
        rows = (batch * chunks_per_row, k, r)
        if config.share_embedding:
            width = (config.encoder_dim,)
            embed = Projection(width, ("embed", "mlp"), dtype, name="embed")
            x = embed(tokens.reshape(*rows, config.model_dim))
        else:
            size = (config.vocab_size, config.encoder_dim)
            x = TokenEmbedding(*size, dtype, name="embed")(tokens.reshape(rows))
        x = axes.constrain(x, _ACTIVATIONS)
        mask = mask.reshape(rows)
        chunks = chunks.reshape(rows[0], 1, *chunks.shape[2:])
        for layer in range(1, config.encoder_layers + 1):
            conditioned = layer in config.encoder_ca_layers
            x = EncoderLayer(config, conditioned, name=f"layer_{layer}")(
                x, mask, chunks
            )
        x = RMSNorm(dtype, name="norm")(x)
        x = x.reshape(batch, chunks_per_row, k, r, config.encoder_dim)
        return axes.constrain(x, ("batch", "chunks", *_ACTIVATIONS[1:]))
