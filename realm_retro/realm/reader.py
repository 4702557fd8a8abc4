"""The span reader of fine-tuning (ORQA, Lee et al. 2019; section 4.2 of REALM).

Every run of at most `span_width` tokens of a passage is a candidate answer. Spans are
numbered by width, then by place: see `spans`.
"""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.nn.bert import Bert
from realm_retro.nn.layers import LayerNorm, Projection
from realm_retro.realm import packing
from realm_retro.realm.config import RealmConfig
from realm_retro.typing import Array, Bool, Float, HostArray, Int, Params

# Of the norm in the span scorer; the published readers have it, unlike all other norms.
EPSILON = 1e-3


class SpanReader(nn.Module):
    """Scores every span of at most `span_width` tokens (ORQA, Lee et al. 2019)."""

    config: RealmConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
    ) -> Float[Array, "batch spans"]:
        """Scores spans by their first and last hidden state.

        Args:
          ids: joint inputs; any at padding.
          mask: True on real tokens.
          token_types: segments; all 0 where it is None.

        Returns:
          float32 scores in the order of `spans`, legal or not (`legal_spans`).
        """
        config, length = self.config, ids.shape[1]
        hidden = Bert(config.bert, name="bert")(ids, mask, token_types)
        ends = Projection(
            (2, config.span_hidden), ("embed", None, None), bias=True, name="span_ends"
        )(hidden.astype(jnp.float32))
        first, last = ends[:, :, 0], ends[:, :, 1]
        # One slice for each width: adding shifted rows needs no gather.
        x = jnp.concatenate(
            [
                first[:, : length - shift] + last[:, shift:]
                for shift in range(min(config.span_width, length))
            ],
            axis=1,
        )
        x = LayerNorm(epsilon=EPSILON, name="span_norm")(jax.nn.relu(x))
        score = Projection((1,), (None, None), bias=True, name="span_score")
        return score(x)[..., 0]


def spans(length: int, width: int) -> HostArray:
    """All spans of 1 to `width` tokens: int32 [spans, 2], [start, end); by width."""
    return np.concatenate(
        [
            np.stack([np.arange(length - w + 1), np.arange(w, length + 1)], axis=1)
            for w in range(1, min(width, length) + 1)
        ]
    ).astype(np.int32)


def legal_spans(
    allowed: Bool[Array, "batch length"], width: int
) -> Bool[Array, "batch spans"]:
    """Which of `spans` lie wholly in the allowed tokens, which are one run a row."""
    table = spans(allowed.shape[-1], width)
    return allowed[:, table[:, 0]] & allowed[:, table[:, 1] - 1]


def score_spans(
    config: RealmConfig,
    params: Params,
    query: Int[Array, "*axes q"],
    length: Int[Array, "*axes"],
    body: Int[Array, "*axes n"],
    body_length: Int[Array, "*axes"],
) -> tuple[Float[Array, "*axes spans"], Bool[Array, "*axes spans"]]:
    """Scores of all spans of questions beside passages; see `packing.joint_inputs`.

    Args:
      config: the model's.
      params: a tree with the part ``reader``.
      query: wordpieces of questions.
      length: how many are real.
      body: wordpieces of passages' bodies.
      body_length: how many are real.

    Returns:
      float32 scores in the order of `spans` over the joint input, and which spans
      lie in the body (the body starts at position ``length + 2``).
    """
    ids, mask, types = packing.joint_inputs(query, length, body, body_length)
    tokens = ids.shape[-1]
    inside = packing.body_mask(length, body_length, tokens)
    ids, mask, types, inside_ = (
        x.reshape(-1, tokens) for x in (ids, mask, types, inside)
    )
    found = SpanReader(config).apply({"params": params["reader"]}, ids, mask, types)
    scores = cast(Array, found)
    legal = legal_spans(inside_, config.span_width)
    shape = (*inside.shape[:-1], scores.shape[-1])
    return scores.reshape(shape), legal.reshape(shape)
