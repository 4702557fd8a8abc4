"""Floating-point operations of a RETRO training step, by formula.

The compiler's own count misses the trip counts of scanned layers, so it is not used.
"""

from __future__ import annotations

from realm_retro.retro.config import RetroConfig


def forward_flops(config: RetroConfig, *, tokens: int, window: int, k: int) -> float:
    """Multiply-adds × 2 of one forward pass, attention included, masks not exploited.

    Args:
      config: the model's shape.
      tokens: of the batch.
      window: tokens of a sequence (n).
      k: neighbours of each chunk; 0 for a plain decoder or RETRO[OFF].
    """
    d, m, r = config.model_dim, config.chunk_length, config.neighbour_length
    inner = config.num_heads * config.head_dim
    total = config.num_layers * _layer_flops(config, tokens=tokens, window=window)
    total += 2.0 * tokens * d * config.vocab_size
    if config.retrieves and k:
        e = config.encoder_dim
        e_inner = config.encoder_num_heads * config.encoder_head_dim
        encoded = tokens // m * k * r
        layer = 4 * e * e_inner + 4 * r * e_inner + 2 * e * config.encoder_ffw_dim
        cross = 2 * e * e_inner + (r + 3 * m) * e_inner
        new = encoded * config.encoder_layers * layer
        new += encoded * len(config.encoder_ca_layers) * cross
        new += tokens // m * m * len(config.encoder_ca_layers) * 2 * d * e_inner
        per_cca = 2 * tokens * d * inner + 2 * encoded * e * inner
        per_cca += tokens * (2 * k * r + m + r) * inner
        total += 2.0 * (new + len(config.cca_layers) * per_cca)
    return total


def training_flops(
    config: RetroConfig, *, tokens: int, window: int, k: int, frozen: bool = False
) -> float:
    """Forward and backward: three times the forward pass, recomputation not counted.

    Args:
      config: the model's shape.
      tokens: of the batch.
      window: tokens of a sequence (n).
      k: neighbours of each chunk.
      frozen: the decoder's weights get no gradient, and nothing goes back below the
        first cross-attention: one forward pass less of what is above it, two of what
        is below.
    """
    size = {"tokens": tokens, "window": window}
    total = 3.0 * forward_flops(config, **size, k=k)
    if frozen:
        below = (config.cca_layers[0] - 1) * _layer_flops(config, **size)
        total -= forward_flops(config, **size, k=0) + below
    return total


def _layer_flops(config: RetroConfig, *, tokens: int, window: int) -> float:
    """Of one plain layer of the decoder, forward."""
    inner = config.num_heads * config.head_dim
    # Per token: query, key, value, output; content and position logits, values.
    attention = 4 * config.model_dim * inner + 3 * window * inner
    return 2.0 * tokens * (attention + 2 * config.model_dim * config.ffw_dim)
