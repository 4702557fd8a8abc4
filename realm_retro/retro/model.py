"""RETRO's decoder (section 2, Algorithm 1), and the plain decoder beside it.

Layers come in runs, each compiled once however long it is:

    stem      plain layers before min(P)
    bridge    layer min(P): its self-attention gives H_u, which conditions the encoder;
              the encoded neighbours E are computed here, once, and used from here on
    groups_i  units of "a few plain layers, then one with CCA"
    tail      plain layers after max(P)

A plain decoder is all stem. RETRO[OFF] is the same weights without neighbours: encoder
and CCA are skipped, not fed with padding.

A model made with ``decode_length`` has a second entry, `Retro.step`, that takes one
token at a time and keeps keys, values and encoded neighbours in the collection
``cache``.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from realm_retro.nn.layers import RMSNorm, TokenEmbedding
from realm_retro.parallel import axes
from realm_retro.retro.blocks import (
    ChunkBuffer,
    Context,
    CrossAttention,
    FeedForwardBlock,
    SelfAttention,
)
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.encoder import Encoder
from realm_retro.typing import Array, Bool, Float, Int


class Runs(NamedTuple):
    """How a decoder's layers fall into runs.

    Attributes:
      stem: plain layers before the bridge (all layers of a plain decoder).
      groups: ``(units, plain)`` pairs: so many units of `plain` plain layers and one
        with CCA.
      tail: plain layers after the last CCA.
    """

    stem: int
    groups: tuple[tuple[int, int], ...]
    tail: int


def runs(config: RetroConfig) -> Runs:
    """Splits layers 1 … L at the places P of `config`."""
    places = config.cca_layers
    if not places:
        return Runs(config.num_layers, (), 0)
    gaps = [after - before - 1 for before, after in itertools.pairwise(places)]
    groups = tuple((len(list(same)), gap) for gap, same in itertools.groupby(gaps))
    return Runs(places[0] - 1, groups, config.num_layers - places[-1])


class DecoderLayer(nn.Module):
    """Self-attention, CCA where the layer is in P, feed-forward."""

    config: RetroConfig
    in_p: bool
    decode_length: int = 0

    @nn.compact
    def __call__(self, h: Array, context: Context) -> Array:
        """One layer of Algorithm 1's decoder loop."""
        h = SelfAttention(self.config, self.decode_length, name="attention")(h, context)
        if self.in_p and context.retrieves:
            h = CrossAttention(self.config, name="cross")(h, context)
        return FeedForwardBlock(self.config, name="ffw")(h)


class Unit(nn.Module):
    """What a run repeats: some plain layers, then perhaps one with CCA."""

    config: RetroConfig
    plain: int
    cross: bool
    decode_length: int = 0

    @nn.compact
    def __call__(self, h: Array, context: Context) -> tuple[Array, None]:
        """The layers one after the other; the signature is that of a scan's body."""
        for i in range(self.plain):
            name = f"plain_{i}"
            h = DecoderLayer(self.config, False, self.decode_length, name=name)(
                h, context
            )
        if self.cross:
            h = DecoderLayer(self.config, True, self.decode_length, name="cca")(
                h, context
            )
        return h, None


class Retro(nn.Module):
    """The whole model; see the module docstring.

    Attributes:
      config: its shape.
      decode_length: most tokens that `step` will see; 0 for a model without `step`.
    """

    config: RetroConfig
    decode_length: int = 0

    def setup(self):
        """Lays the runs out."""
        config, plan = self.config, runs(self.config)
        dtype = jnp.dtype(config.compute_dtype)
        self.embed = TokenEmbedding(config.vocab_size, config.model_dim, dtype)
        self.stem = self._run(plan.stem, 1, False)
        if config.retrieves:
            block = nn.remat(SelfAttention) if config.remat else SelfAttention
            self.bridge_attention = block(config, self.decode_length)
            self.encoder = (nn.remat(Encoder) if config.remat else Encoder)(config)
            self.bridge_chunk = ChunkBuffer(config.chunk_length)
            self.bridge_cross = CrossAttention(config)
            self.bridge_ffw = FeedForwardBlock(config)
        self.groups = [self._run(units, plain, True) for units, plain in plan.groups]
        self.tail = self._run(plan.tail, 1, False)
        self.norm = RMSNorm(dtype)

    def __call__(
        self,
        tokens: Int[Array, "batch n"],
        segments: Int[Array, "batch n"] | None = None,
        neighbours: Int[Array, "batch l k r"] | None = None,
        neighbour_mask: Bool[Array, "batch l k r"] | None = None,
    ) -> Float[Array, "batch n vocab"]:
        """Logits of the next token at each position, in the compute dtype.

        Args:
          tokens: input tokens; n is a whole number of chunks where it retrieves.
          segments: which document each token belongs to; attention stays inside it.
            None: one document a row.
          neighbours: tokens of the k neighbours (chunk and continuation) of each
            chunk; None is RETRO[OFF]. k may differ from training.
          neighbour_mask: real tokens of neighbours that are there.

        Raises:
          ValueError: n is not a whole number of chunks; neighbours without a mask.
        """
        m = self.config.chunk_length
        if (neighbours is None) != (neighbour_mask is None):
            raise ValueError("neighbours and neighbour_mask: give both or neither")
        if neighbours is not None and tokens.shape[1] % m:
            raise ValueError(f"{tokens.shape[1]} tokens are not whole chunks of {m}")
        context = Context(mask=_visible(tokens, segments))
        h = axes.constrain(self.embed(tokens), ("batch", "length", "embed_act"))
        h = self._scan(self.stem, h, context)
        if self.config.retrieves:
            h = self.bridge_attention(h, context)
            if neighbours is not None and neighbour_mask is not None:
                chunks = h.reshape(h.shape[0], -1, m, h.shape[-1])
                encoded = self._encode(neighbours, neighbour_mask, chunks)
                context = context.replace(
                    neighbours=encoded, neighbour_mask=neighbour_mask
                )
                h = self.bridge_cross(h, context)
            h = self.bridge_ffw(h)
        return self._finish(h, context)

    def step(
        self,
        token: Int[Array, " batch"],
        position: Int[Array, ""],
        neighbours: Int[Array, "batch k r"] | None = None,
        neighbour_mask: Bool[Array, "batch k r"] | None = None,
    ) -> Float[Array, "batch vocab"]:
        """Logits after one more token of each row; updates the collection ``cache``.

        Args:
          token: the token at `position`.
          position: counted from 0, the same for all rows.
          neighbours: of the chunk that this token completes, i.e. only where
            ``(position + 1) % m == 0``; they stay in use until the next ones.
          neighbour_mask: real tokens of the neighbours in use; None before the first.
        """
        context = Context(position=position, neighbour_mask=neighbour_mask)
        h = self._scan(self.stem, self.embed(token[:, None]), context)
        if self.config.retrieves:
            h = self.bridge_attention(h, context)
            chunk = self.bridge_chunk(h, position)
            if neighbours is not None and neighbour_mask is not None:
                encoded = self._encode(
                    neighbours[:, None], neighbour_mask[:, None], chunk[:, None]
                )
                context = context.replace(neighbours=encoded)
            if context.retrieves:
                h = self.bridge_cross(h, context)
            h = self.bridge_ffw(h)
        return self._finish(h, context)[:, 0]

    def _encode(self, neighbours: Array, mask: Array, chunks: Array) -> Array:
        if self.config.share_embedding:
            neighbours = self.embed(neighbours)
        return self.encoder(neighbours, mask, chunks)

    def _finish(self, h: Array, context: Context) -> Array:
        for group in self.groups:
            h = self._scan(group, h, context)
        h = self._scan(self.tail, h, context)
        logits = self.embed.logits(self.norm(h))
        return axes.constrain(logits, ("batch", "length", "vocab"))

    def _run(self, length: int, plain: int, cross: bool) -> nn.Module | None:
        if not length:
            return None
        body = nn.remat(Unit, prevent_cse=False) if self.config.remat else Unit
        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.config, plain, cross, self.decode_length)

    def _scan(self, run: nn.Module | None, h: Array, context: Context) -> Array:
        return h if run is None else run(h, context)[0]


def _visible(tokens: Array, segments: Array | None) -> Bool[Array, "batch n n"]:
    batch, n = tokens.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (batch, n, n))
    if segments is None:
        return causal
    return causal & (segments[:, :, None] == segments[:, None, :])
