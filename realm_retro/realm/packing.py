"""Wordpieces to the inputs of a BERT, with jax.numpy: on the host or inside a step.

Three layouts (Guu et al. 2020, section 3.2; lengths are without special tokens):

    query     [CLS] x [SEP]
    document  [CLS] title [SEP] body [SEP]
    joint     [CLS] x [SEP] body [SEP]

The title goes into the retrieval vector only, never beside the query. Every static
length is the sum of its parts, so nothing is ever cut here. Leading axes are free.
"""

from __future__ import annotations

import jax.numpy as jnp

from realm_retro.realm.config import CLS_ID, PAD_ID, SEP_ID
from realm_retro.typing import Array, Bool, Int


def query_inputs(
    query: Int[Array, "*axes q"], length: Int[Array, "*axes"]
) -> tuple[Int[Array, "*axes q+2"], Bool[Array, "*axes q+2"]]:
    """``[CLS] x [SEP]``.

    Args:
      query: wordpieces, any integer dtype; anything behind their length.
      length: how many are real.

    Returns:
      ids, int32 and 0 at padding, and the mask of real tokens.
    """
    place = jnp.arange(query.shape[-1] + 2).reshape((1,) * length.ndim + (-1,))
    end = length[..., None] + 1
    ids = jnp.where(place == 0, CLS_ID, _shifted(query, place.shape[-1], 1))
    ids = jnp.where(place == end, SEP_ID, ids)
    mask = place <= end
    return jnp.where(mask, ids, PAD_ID), mask


def document_inputs(
    title: Int[Array, "*axes t"],
    title_length: Int[Array, "*axes"],
    body: Int[Array, "*axes n"],
    body_length: Int[Array, "*axes"],
) -> tuple[Int[Array, "*axes t+n+3"], Bool[Array, "*axes t+n+3"]]:
    """``[CLS] title [SEP] body [SEP]``; the null document is ``[CLS] [SEP]``.

    Args:
      title: wordpieces, any integer dtype; anything behind their length.
      title_length: how many are real.
      body: as `title`.
      body_length: as `title_length`. The null document has two lengths of 0.

    Returns:
      ids, int32 and 0 at padding, and the mask of real tokens.
    """
    ids, mask, _ = _pair(title, title_length, body, body_length)
    null = (title_length == 0) & (body_length == 0)
    extra = null[..., None] & _places(ids, 2)
    return jnp.where(extra, PAD_ID, ids), mask & ~extra


def joint_inputs(
    query: Int[Array, "*axes q"],
    length: Int[Array, "*axes"],
    body: Int[Array, "*axes n"],
    body_length: Int[Array, "*axes"],
) -> tuple[
    Int[Array, "*axes q+n+3"], Bool[Array, "*axes q+n+3"], Int[Array, "*axes q+n+3"]
]:
    """``[CLS] x [SEP] body [SEP]``; without a body ``[CLS] x [SEP] [SEP]``.

    Args:
      query: wordpieces, any integer dtype; anything behind their length.
      length: how many are real.
      body: as `query`.
      body_length: as `length`; 0 for the null document.

    Returns:
      ids (int32, 0 at padding), the mask of real tokens, and token types: 1 on the
      body and its [SEP], else 0.
    """
    return _pair(query, length, body, body_length)


def body_mask(
    length: Int[Array, "*axes"], body_length: Int[Array, "*axes"], tokens: int
) -> Bool[Array, "*axes tokens"]:
    """True on the body's own tokens in `joint_inputs`: not [CLS], x, [SEP] or padding.

    Args:
      length: of the query, without special tokens.
      body_length: of the body, likewise.
      tokens: of the joint input.
    """
    place = jnp.arange(tokens).reshape((1,) * length.ndim + (-1,))
    start = length[..., None] + 2
    return (place >= start) & (place < start + body_length[..., None])


def second_segment(ids: Int[Array, "*axes n"]) -> Int[Array, "*axes n"]:
    """Token types of packed ids: 1 behind the first [SEP], padding included."""
    separators = (ids == SEP_ID).astype(jnp.int32)
    return jnp.minimum(jnp.cumsum(separators, axis=-1) - separators, 1)


def _pair(
    first: Array, first_length: Array, second: Array, second_length: Array
) -> tuple[Array, Array, Array]:
    tokens = first.shape[-1] + second.shape[-1] + 3
    place = jnp.arange(tokens).reshape((1,) * first_length.ndim + (-1,))
    middle = first_length[..., None] + 1
    end = middle + second_length[..., None] + 1
    # The second part moves by a distance of its own in each row.
    index = jnp.clip(place - middle - 1, 0, max(second.shape[-1] - 1, 0))
    moved = (
        jnp.take_along_axis(second.astype(jnp.int32), index, axis=-1)
        if second.shape[-1]
        else jnp.zeros_like(index)
    )
    ids = jnp.where(place < middle, _shifted(first, tokens, 1), moved)
    ids = jnp.where(place == 0, CLS_ID, ids)
    ids = jnp.where((place == middle) | (place == end), SEP_ID, ids)
    mask = place <= end
    types = (mask & (place > middle)).astype(jnp.int32)
    return jnp.where(mask, ids, PAD_ID), mask, types


def _shifted(x: Array, size: int, by: int) -> Array:
    """`x` moved right by `by` along its last axis, padded to `size`."""
    after = size - x.shape[-1] - by
    return jnp.pad(x.astype(jnp.int32), [(0, 0)] * (x.ndim - 1) + [(by, after)])


def _places(ids: Array, place: int) -> Array:
    index = jnp.arange(ids.shape[-1]) == place
    return index.reshape((1,) * (ids.ndim - 1) + (-1,))
