"""A RETRO training step, with and without retrieval, beside retro-pytorch's.

  pip install -e '.[bench]'
  python tests/benchmarks/bench_retro.py [--rounds=5] [--json=FILE]

Both models have the same sizes: width 512, 8 decoder layers of 8 heads × 64, chunked
cross-attention in layers 3 and 6, 2 encoder layers of width 512, chunks of 64, two
neighbours of 128 tokens, sequences of 512, batch 4, a vocabulary of 8,192. A step is
forward, backward and AdamW, in float32. retro-pytorch is a peer for speed only: its
relative positions in cross-attention differ from the paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import numpy as np
import paired

from realm_retro import host_memory
from realm_retro.parallel.mesh import make_mesh
from realm_retro.retro import recipe
from realm_retro.retro.config import RetroConfig
from realm_retro.train import loop, step
from realm_retro.train import state as states
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Recipe

BATCH, LENGTH, M, K, VOCAB = 4, 512, 64, 2, 8192


def ours(*, retrieves: bool) -> Callable[[], object]:
    """One call is one step of our own training loop's step function."""
    model = RetroConfig(
        vocab_size=VOCAB,
        num_layers=8,
        model_dim=512,
        num_heads=8,
        head_dim=64,
        ffw_dim=2048,
        chunk_length=M,
        cca_layers=(3, 6) if retrieves else (),
        encoder_layers=2,
        encoder_dim=512,
        encoder_num_heads=8,
        encoder_head_dim=64,
        encoder_ffw_dim=2048,
        encoder_ca_layers=(1,),
        compute_dtype="float32",
    )
    mesh = make_mesh()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": np.ones((BATCH, LENGTH), bool),
        "segments": np.zeros((BATCH, LENGTH), np.int32),
    }
    if retrieves:
        shape = (BATCH, LENGTH // M, K, 2 * M)
        batch["neighbours"] = rng.integers(1, VOCAB, shape, dtype=np.int32)
        batch["neighbour_mask"] = np.ones(shape, bool)
    made = Recipe(
        description="benchmark",
        init=recipe.init_fn(model),
        loss=recipe.loss_fn(model, mesh),
        batch_at=lambda step: batch,
        batch_spec=recipe.batch_spec(model),
        tokens_per_step=BATCH * LENGTH,
        flops_per_step=0.0,
        fingerprint="",
    )
    rule, abstract = loop.plan(made, TrainConfig(steps=1000), OptimizerConfig(), mesh)
    run = step.make_train_step(made, rule, abstract, mesh, seed=0, accumulation=1)
    held = {"state": states.init_state(made.init, rule, abstract, 0)}
    on_device = jax.device_put(batch)

    def one() -> None:
        held["state"], metrics = run(held["state"], on_device)
        jax.block_until_ready((held["state"], metrics))

    return one


def retro_pytorch(*, retrieves: bool) -> Callable[[], object]:
    """One call is one step of the peer."""
    import autofaiss
    import torch

    # The peer imports this for its own index, which is not measured; the autofaiss that
    # installs beside numpy 2 has it no more.
    if not hasattr(autofaiss, "build_index"):
        autofaiss.build_index = None
    from retro_pytorch import RETRO

    torch.manual_seed(0)
    model = RETRO(
        num_tokens=VOCAB,
        chunk_size=M,
        max_seq_len=LENGTH,
        enc_dim=512,
        enc_depth=2,
        dec_dim=512,
        dec_depth=8,
        dec_cross_attn_layers=(3, 6),
        heads=8,
        dim_head=64,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(1, VOCAB, (BATCH, LENGTH + 1))
    shape = (BATCH, LENGTH // M, K, 2 * M)
    retrieved = torch.randint(1, VOCAB, shape) if retrieves else None

    def one() -> None:
        optimizer.zero_grad()
        # Without retrieval it returns the loss of each token.
        model(tokens, retrieved, return_loss=True).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return one


def main() -> None:
    """Measures and prints; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    host_memory.reuse_freed_blocks()
    times = paired.seconds(
        {
            "realm_retro, retrieval": ours(retrieves=True),
            "retro-pytorch, retrieval": retro_pytorch(retrieves=True),
            "realm_retro, plain": ours(retrieves=False),
            "retro-pytorch, plain": retro_pytorch(retrieves=False),
        },
        rounds=arguments.rounds,
    )
    ratios = {
        "step with retrieval, ours / theirs": paired.ratio(
            times, "realm_retro, retrieval", "retro-pytorch, retrieval"
        ),
        "plain step, ours / theirs": paired.ratio(
            times, "realm_retro, plain", "retro-pytorch, plain"
        ),
        "our retrieval / our plain step": paired.ratio(
            times, "realm_retro, retrieval", "realm_retro, plain"
        ),
    }
    paired.report("RETRO training step", times, ratios, path=arguments.json)


if __name__ == "__main__":
    main()
