"""BERT (Devlin et al. 2019): the bidirectional encoder of passages and queries.

Post-norm layers, learned absolute positions, biases everywhere. Layers are scanned:
their weights are stacked on a first axis ``layers``.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from realm_retro.nn.layers import LayerNorm, Projection, parameter
from realm_retro.parallel import axes
from realm_retro.typing import Array, Bool, Float, Int

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")

_AXES = ("batch", "length", "embed_act")
# Finite, so that a row without any token gives finite numbers and not NaN.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT.

    Attributes:
      vocab_size: rows of the token embedding.
      width: size of a hidden state (d).
      num_layers: layers.
      num_heads: heads; they divide `width`.
      hidden: width inside the feed-forward block.
      max_positions: rows of the position embedding, the longest input in tokens.
      num_token_types: rows of the segment embedding.
      activation: one of `ACTIVATIONS`; ``gelu`` is the exact one, with erf.
      epsilon: of the layer norms.
      compute_dtype: dtype of the products; weights, softmax and norms are float32.
      remat: keep the layers' inputs alone for the backward pass and compute the rest
        anew: a third more work, and a fraction of the memory.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    compute_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.width=}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation={self.activation!r} is not one of {known}")


class Bert(nn.Module):
    """Token ids to hidden states; see the module docstring."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Encodes a batch.

        Args:
          ids: token ids; any at padding.
          mask: True on real tokens. Hidden states of the others mean nothing.
          token_types: segments; all 0 where it is None.

        Returns:
          The last layer's hidden states, in the compute dtype.
        """
        x = Embeddings(self.config, name="embeddings")(ids, token_types)
        # The scan itself keeps XLA from merging the two computations.
        layer = nn.remat(Layer, prevent_cse=False) if self.config.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (Flax types)
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.config, name="layers")(x, mask)[0]


class Embeddings(nn.Module):
    """The sum of token, position and segment embeddings, normed."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
    ) -> Float[Array, "batch length width"]:
        """Looks up and adds."""
        config, length = self.config, ids.shape[1]
        if length > config.max_positions:
            raise ValueError(f"{length} tokens, but {config.max_positions} positions")
        tokens = self._table("tokens", config.vocab_size, "vocab")
        positions = self._table("positions", config.max_positions, "positions")
        segments = self._table("segments", config.num_token_types, None)
        if token_types is None:
            segment = segments[None, None, 0]
        else:
            segment = jnp.take(segments, token_types, axis=0)
        x = jnp.take(tokens, ids, axis=0) + positions[None, :length] + segment
        x = LayerNorm(_dtype(config), config.epsilon, name="norm")(x)
        return axes.constrain(x, _AXES)

    def _table(self, name: str, rows: int, axis: str | None) -> Array:
        init = nn.initializers.truncated_normal(0.02)
        return parameter(self, name, init, (axis, "embed"), (rows, self.config.width))


class Layer(nn.Module):
    """Self-attention and feed-forward, each added to its input and then normed."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
    ) -> tuple[Float[Array, "batch length width"], None]:
        """One step of the scan over layers."""
        config, dtype = self.config, _dtype(self.config)
        y = SelfAttention(config, name="attention")(x, mask)
        x = LayerNorm(dtype, config.epsilon, name="attention_norm")(x + y)
        y = Projection((config.hidden,), ("embed", "mlp"), dtype, bias=True, name="up")(
            x
        )
        y = _activate(y, config.activation)
        y = Projection(
            (config.width,), ("mlp", "embed"), dtype, bias=True, name="down"
        )(y)
        x = LayerNorm(dtype, config.epsilon, name="output_norm")(x + y)
        return axes.constrain(x, _AXES), None


class SelfAttention(nn.Module):
    """Multi-head attention of each token to all real tokens of its row."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch length width"]:
        """Queries, keys and values come from one product, three times as wide."""
        config, dtype = self.config, _dtype(self.config)
        head_dim = config.width // config.num_heads
        qkv = Projection(
            (3, config.num_heads, head_dim),
            ("embed", None, "heads", "head_dim"),
            dtype,
            bias=True,
            name="qkv",
        )(x)
        # Heads move before length by hand: on CPU the two batched products below are
        # then plain matrix products over contiguous memory.
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
        q = q * head_dim**-0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32)
        bias = jnp.where(mask, 0.0, _MASKED)[:, None, None, :]
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(dtype)
        y = jnp.moveaxis(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)
        return Projection(
            (config.width,),
            ("heads", "head_dim", "embed"),
            dtype,
            contract=2,
            bias=True,
            name="output",
        )(y)


def _activate(x: Array, name: str) -> Array:
    if name == "relu":
        return jax.nn.relu(x)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    # jax.nn.gelu goes through erfc, which takes twice as long on CPU. In float32 the
    # cancellation in 1 + erf stays below 1e-7.
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def _dtype(config: BertConfig) -> jnp.dtype:
    return jnp.dtype(config.compute_dtype)
