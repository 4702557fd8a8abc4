"""Generation with caches against the whole forward pass, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retro_examples import random_params, small_config

from realm_retro.errors import UserError
from realm_retro.retro import generate
from realm_retro.retro.generate import GenerateConfig
from realm_retro.retro.model import Retro

PAD, BOS, EOS = 0, 2, 3
# As few layers as have both kinds, before and after a chunked cross-attention.
CONFIG = small_config(num_layers=3, cca_layers=(2,), encoder_layers=1)
M, R, K = CONFIG.chunk_length, CONFIG.neighbour_length, 2
PROMPTS = [np.array(p, np.int32) for p in ([5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [])]
DATABASE = np.random.default_rng(0).integers(4, CONFIG.vocab_size, (20, R))


def params():
    return {"params": random_params(CONFIG)}


def retrieve(tokens):
    """A made-up search that depends on every token of the chunk."""
    ids = np.stack([tokens.sum(1) % 20, tokens @ np.arange(1, M + 1) % 20], axis=1)
    ids[:, 1] = np.where(tokens[:, 0] % 3 == 0, -1, ids[:, 1])
    near = DATABASE[np.maximum(ids, 0)].astype(np.int32)
    mask = np.broadcast_to((ids >= 0)[..., None], near.shape)
    return generate.Retrieved(ids, ids.astype(np.float32), near, mask)


def run(prompts, *, retrieve=retrieve, **settings):
    settings = {"max_tokens": 10, "temperature": 0.0, "top_p": 1.0, **settings}
    return generate.generate(
        CONFIG,
        params(),
        prompts,
        GenerateConfig(**settings),
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        retrieve=retrieve,
    )


def slow_greedy(prompt, max_tokens, retrieve):
    """The whole forward pass for each token, nothing cached."""
    forward = jax.jit(Retro(CONFIG).apply)
    tokens, room = [BOS, *prompt], -(-(1 + len(prompt) + max_tokens) // M)
    for _ in range(max_tokens):
        padded = np.zeros((1, room * M), np.int32)
        padded[0, : len(tokens)] = tokens
        near = np.zeros((1, room, K, R), np.int32)
        mask = np.zeros((1, room, K, R), bool)
        for u in range(len(tokens) // M if retrieve else 0):
            found = retrieve(padded[:, u * M : (u + 1) * M])
            near[:, u], mask[:, u] = found.tokens, found.mask
        inputs = (padded, None, near, mask) if retrieve else (padded,)
        best = int(forward(params(), *inputs)[0, len(tokens) - 1].argmax())
        if best == EOS:
            break
        tokens.append(best)
    return tokens[1:]


@pytest.mark.parametrize("search", [retrieve, None], ids=["ON", "OFF"])
def test_cached_generation_equals_the_whole_forward_pass(search):
    made = run(PROMPTS, retrieve=search)
    for row, prompt in enumerate(PROMPTS):
        assert made.tokens[row].tolist() == slow_greedy(prompt, 10, search)
        assert made.tokens[row][: len(prompt)].tolist() == prompt.tolist()
        assert made.new[row] == len(made.tokens[row]) - len(prompt)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_length_of_others():
    together = run(PROMPTS, temperature=1.0, seed=3)
    alone = run(PROMPTS[:1], temperature=1.0, seed=3)
    assert together.tokens[0].tolist() == alone.tokens[0].tolist()


def test_the_seed_decides():
    first, again, other = (
        run(PROMPTS, temperature=2.0, max_tokens=25, seed=seed).tokens
        for seed in (1, 1, 2)
    )
    assert [t.tolist() for t in first] == [t.tolist() for t in again]
    assert [t.tolist() for t in first] != [t.tolist() for t in other]


def test_retrieval_sees_each_whole_chunk_once_and_in_order():
    seen = []

    def watch(tokens):
        seen.append(tokens.copy())
        return retrieve(tokens)

    made = run(PROMPTS, retrieve=watch)
    row = [BOS, *made.tokens[1].tolist()]
    assert len(seen) == len(made.retrieved) == len(row) // M
    for u, tokens in enumerate(seen):
        assert tokens[1].tolist() == row[u * M : (u + 1) * M]


def test_max_tokens_and_eos_end_a_row():
    made = run(PROMPTS, temperature=2.0, max_tokens=25, seed=5)
    for tokens, new, prompt in zip(made.tokens, made.new, PROMPTS, strict=True):
        assert new <= 25
        assert EOS not in tokens[len(prompt) :]


def test_ends_before_the_first_sampled_eos():
    tokens = np.array([[BOS, EOS, 5, EOS, 6, EOS]], np.int32)
    starts, limits = np.array([2]), np.array([6])
    ends = generate._ends(tokens, starts, limits, 6, EOS)
    assert ends.tolist() == [3]  # the prompt's own EOS does not count


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1)],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=f"config.generate.{name}"):
        GenerateConfig(**{name: value})


def test_passages_skips_the_missing():
    near = generate.Retrieved(
        np.array([[4, -1]]),
        np.array([[0.5, -np.inf]]),
        jnp.zeros((1, 2, R)),
        jnp.zeros((1, 2, R)),
    )
    assert list(generate.passages(near, 0)) == [(4, 0.5)]
