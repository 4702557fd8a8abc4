"""Sampling with live retrieval at each chunk boundary (section 2.4 at inference).

All rows of a batch start at position 0, so their chunks end at the same positions,
whatever the lengths of their prompts: a row takes its prompt's tokens while it has
some, and sampled ones from then on. The last token of chunk u may use Ret(C_u)
already, so the order at a boundary is: write the token, retrieve, encode, then run
the model for that same token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.errors import UserError
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.model import Retro
from realm_retro.retro.sampling import sample
from realm_retro.typing import Array, HostArray, PyTree


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The ``generate`` section of a config.

    Attributes:
      max_tokens: new tokens of each row, at most.
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      seed: of the sampling.
      neighbours: retrieved for each chunk; 0 is RETRO[OFF].
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0
    neighbours: int = 2

    def __post_init__(self):
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("neighbours", self.neighbours >= 0, "at least 0 (off)"),
        )
        for name, right, limit in checks:
            if not right:
                raise UserError(
                    f"config.generate.{name} is {getattr(self, name)}; must be {limit}"
                )


class Retrieved(NamedTuple):
    """Neighbours of one completed chunk of each row.

    Attributes:
      ids: int64 [batch, k], chunk ids, −1 where missing.
      scores: float32 [batch, k].
      tokens: int32 [batch, k, r].
      mask: bool [batch, k, r].
    """

    ids: HostArray
    scores: HostArray
    tokens: HostArray
    mask: HostArray


class Generated(NamedTuple):
    """What came out.

    Attributes:
      tokens: one int32 array a row: prompt, then new tokens; without BOS and EOS.
      new: how many of them are new.
      retrieved: for each completed chunk, in order, what was retrieved for it.
    """

    tokens: list[HostArray]
    new: list[int]
    retrieved: list[Retrieved]


# Tokens int32 [batch, m] of a completed chunk → its neighbours.
RetrieveFn = Callable[[HostArray], Retrieved]


def generate(
    model: RetroConfig,
    params: PyTree,
    prompts: list[HostArray],
    config: GenerateConfig,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    retrieve: RetrieveFn | None,
    on_chunk: Callable[[], object] = lambda: None,
) -> Generated:
    """Continues prompts until EOS or ``config.max_tokens`` new tokens each.

    Args:
      model: the model's shape.
      params: its weights.
      prompts: int tokens of each row, without BOS; may be empty.
      config: sampling.
      bos_id: put before each prompt, as in training.
      eos_id: ends a row.
      pad_id: fills a row after its end.
      retrieve: called with each completed chunk; None is RETRO[OFF].
      on_chunk: called after each chunk, e.g. a progress bar's `update`.
    """
    m = model.chunk_length
    starts = np.array([1 + len(prompt) for prompt in prompts])
    limits = starts + config.max_tokens
    length = -(-int(limits.max()) // m) * m
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : starts[row]] = [bos_id, *prompt]
    decoder = Retro(model, decode_length=length)
    sampling = (config.temperature, config.top_k, config.top_p)
    ends, done = limits.copy(), np.zeros(len(prompts), bool)
    retrieved: list[Retrieved] = []
    cache: PyTree = {}
    near: Retrieved | None = None
    for start in range(0, length, m):
        # This pass writes tokens start … start + m − 1. It first runs the last token
        # of the chunk before, with the neighbours that chunk has just got.
        given = jnp.asarray(starts - start)
        block, cache = _advance(
            decoder,
            sampling,
            params,
            cache,
            jnp.asarray(tokens[:, start : start + m]),
            jnp.asarray(tokens[:, start - 1]) if start else None,
            jnp.int32(start),
            given,
            None if near is None else near.tokens,
            None if near is None else near.mask,
            jnp.int32(config.seed),
        )
        tokens[:, start : start + m] = block
        ends = _ends(tokens, starts, limits, start + m, eos_id)
        done = ends <= start + m
        on_chunk()
        if done.all():
            break
        if retrieve is not None:
            near = retrieve(tokens[:, start : start + m])
            retrieved.append(near)
    return Generated(
        tokens=[row[1:end] for row, end in zip(tokens, ends, strict=True)],
        new=[int(end - start) for end, start in zip(ends, starts, strict=True)],
        retrieved=retrieved,
    )


def _ends(
    tokens: HostArray, starts: HostArray, limits: HostArray, known: int, eos_id: int
) -> HostArray:
    """Where each row's text ends: before its first sampled EOS, or at its limit."""
    places = np.arange(tokens.shape[1])[None, :]
    is_end = (tokens == eos_id) & (places >= starts[:, None]) & (places < known)
    first = np.where(is_end.any(axis=1), is_end.argmax(axis=1), tokens.shape[1])
    return np.minimum(first, limits)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _advance(
    decoder: Retro,
    sampling: tuple[float, int, float],
    params: PyTree,
    cache: PyTree,
    block: Array,
    last: Array | None,
    start: Array,
    given: Array,
    neighbours: Array | None,
    mask: Array | None,
    seed: Array,
) -> tuple[Array, PyTree]:
    """Writes one chunk: boundary token first, then m − 1 plain steps.

    Args:
      decoder: the model, with room in its cache.
      sampling: temperature, top-k, top-p.
      params: the weights.
      cache: of all steps before; empty at the start.
      block: int32 [batch, m], the prompt's tokens of this chunk.
      last: int32 [batch], the token before this chunk; None at the start.
      start: position of the chunk's first token.
      given: int [batch], how many tokens from `start` on belong to the prompt.
      neighbours: of the chunk before, int32 [batch, k, r].
      mask: their real tokens.
      seed: of the sampling.

    Returns:
      The chunk with sampled tokens in it, and the cache, which lacks its last token.
    """
    temperature, top_k, top_p = sampling
    rows = jnp.arange(block.shape[0])

    def run(cache, token, position, **neighbours):
        logits, changed = decoder.apply(
            {**params, **cache},
            token,
            position,
            **neighbours,
            method="step",
            mutable=["cache"],
        )
        return logits, changed

    def choose(logits, position):
        # Keys of (row, position): a row gives the same text in any batch.
        key = jax.random.fold_in(jax.random.key(seed), position)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        sampled = sample(
            logits, keys, temperature=temperature, top_k=top_k, top_p=top_p
        )
        i = position - start
        return jnp.where(i < given, block[:, i], sampled)

    def step(carry, i):
        cache, token = carry
        logits, cache = run(cache, token, start + i, neighbour_mask=mask)
        following = choose(logits, start + i + 1)
        return (cache, following), following

    if last is None:
        first, begin = block[:, 0], 1
        # Outside the scan: it creates the cache, whose structure a scan must keep.
        logits, cache = run(cache, first, start, neighbour_mask=mask)
        second = choose(logits, start + 1)
        head, token = [first, second], second
    else:
        logits, cache = run(
            cache, last, start - 1, neighbours=neighbours, neighbour_mask=mask
        )
        token, begin = choose(logits, start), 0
        head = [token]
    (cache, _), rest = jax.lax.scan(
        step, (cache, token), begin + jnp.arange(block.shape[1] - len(head))
    )
    return jnp.concatenate([jnp.stack(head, axis=1), rest.T], axis=1), cache


def passages(near: Retrieved, row: int) -> Iterator[tuple[int, float]]:
    """(chunk id, score) of one row's neighbours that are there, best first."""
    for chunk, score in zip(near.ids[row], near.scores[row], strict=True):
        if chunk >= 0:
            yield int(chunk), float(score)
