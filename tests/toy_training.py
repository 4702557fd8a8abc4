"""A two-layer language model that trains in a second, for tests of the loop.

Run as a program, it trains in a folder, so that a test can kill it:

  python tests/toy_training.py RUN_DIR [seconds each batch takes [mesh sizes]]
      [steps=N] [bad=STEP]
"""

import contextlib
import dataclasses
import functools
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import toy_faults
from jax.experimental.compilation_cache import compilation_cache

from realm_retro.errors import UserError
from realm_retro.nn.losses import cross_entropy
from realm_retro.parallel import axes, hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.train.config import TrainConfig
from realm_retro.train.loop import train
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Recipe

VOCAB, WIDTH, HIDDEN, ROWS, LENGTH = 32, 16, 64, 8, 12
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=3)


class Toy(nn.Module):
    """Predicts each token from the one before it."""

    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        def dense(features, names, name):
            return nn.Dense(
                features,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.uniform(0.3), names
                ),
                bias_init=nn.with_logical_partitioning(
                    nn.initializers.zeros, (names[1],)
                ),
                dtype=self.dtype,
                name=name,
            )

        table = nn.with_logical_partitioning(
            nn.initializers.uniform(0.3), ("vocab", "embed")
        )
        h = nn.Embed(VOCAB, WIDTH, embedding_init=table, dtype=self.dtype)(tokens)
        h = axes.constrain(h, ("batch", "length", "embed_act"))
        h = nn.gelu(dense(HIDDEN, ("embed", "mlp"), "up")(h))
        h = axes.constrain(h, ("batch", "length", "mlp"))
        h = nn.Dropout(self.dropout, deterministic=not self.dropout)(h)
        h = dense(WIDTH, ("mlp", "embed"), "down")(h)
        return dense(VOCAB, ("embed", "vocab"), "out")(h)


def batch_at(step, rows=ROWS):
    """Noisy counting, in rows of unequal length: weights differ between rows."""
    rng = np.random.default_rng((7, step))
    start = rng.integers(VOCAB, size=(rows, 1))
    noise = rng.integers(2, size=(rows, LENGTH + 1))
    tokens = (start + 3 * np.arange(LENGTH + 1) + noise) % VOCAB
    lengths = rng.integers(1, LENGTH + 1, size=(rows, 1))
    return {
        "tokens": tokens.astype(np.int32),
        "mask": np.arange(LENGTH) < lengths,
    }


def make_recipe(*, dropout=0.1, dtype=jnp.float32, **changes):
    model = Toy(dropout, dtype)

    def init(key):
        tokens = jnp.zeros((1, LENGTH), jnp.int32)
        return model.init({"params": key, "dropout": key}, tokens)["params"]

    def loss(params, batch, key):
        tokens = batch["tokens"]
        logits = model.apply({"params": params}, tokens[:, :-1], rngs={"dropout": key})
        total, weight = cross_entropy(logits, tokens[:, 1:], batch["mask"])
        right = (logits.argmax(-1) == tokens[:, 1:]) & batch["mask"]
        return total, weight, {"accuracy": (right.sum().astype(jnp.float32), weight)}

    recipe = Recipe(
        description="toy: two layers",
        init=init,
        loss=loss,
        batch_at=batch_at,
        batch_spec={"tokens": ("batch", None), "mask": ("batch", "length")},
        tokens_per_step=ROWS * LENGTH,
        flops_per_step=1e6,
        fingerprint="toy data",
    )
    return dataclasses.replace(recipe, **changes)


def make_config(steps=20, **changes):
    defaults = {"batch_size": ROWS, "log_every": 1, "checkpoint_every": 5}
    return TrainConfig(steps=steps, **{**defaults, **changes})


def run(
    run_dir,
    recipe=None,
    *,
    mesh=None,
    steps=20,
    settings=None,
    optimizer=OPTIMIZER,
    report=lambda line: None,
    **changes,
):
    """Trains the toy in `run_dir`; `changes` are fields of TrainConfig."""
    return train(
        recipe or make_recipe(),
        run_dir,
        config=make_config(steps, **changes),
        optimizer=optimizer,
        mesh=mesh or mesh_of(1, 1, 1),
        seed=3,
        settings=settings,
        report=report,
    )


@contextlib.contextmanager
def quick_compiles(tmp_path_factory):
    """The toy runs for milliseconds: compile it fast rather than well, and once."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    quick = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (folder, None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }
    try:
        for name, (value, _) in quick.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, (_, default) in quick.items():
            jax.config.update(name, default)
        compilation_cache.reset_cache()


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshConfig(data, fsdp, tensor), devices)


def main(*words):
    plain = [word for word in words if "=" not in word]
    options = dict(word.split("=") for word in words if "=" in word)
    run_dir, pause, *sizes = [*plain, "0"] if len(plain) == 1 else plain
    hosts.initialise()

    def slowly(step):
        time.sleep(float(pause))
        return batch_at(step)

    bad = {int(options["bad"]): np.nan} if "bad" in options else {}
    recipe = make_recipe(batch_at=slowly)
    outcome = run(
        run_dir,
        toy_faults.poisoned(recipe, bad) if bad else recipe,
        mesh=mesh_of(*(int(size) for size in sizes)) if sizes else None,
        steps=int(options.get("steps", 20)),
        report=functools.partial(print, flush=True),
    )
    print(f"ended after {outcome.step}", flush=True)
    return 0 if outcome.finished else 143


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        print(error, flush=True)
        sys.exit(2)
