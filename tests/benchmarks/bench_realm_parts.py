"""Where a REALM pre-training step's time goes: mask, embed, search, gather, encode.

  python tests/benchmarks/bench_realm_parts.py --config=configs/realm/quickstart.py \
      --workdir=W [--config.pretrain.index=scann …]

W has been through prepare, tag_spans and train (its run is not touched; the index is
built anew from the weights that a run starts with). Each part is waited for, one after
the other; in training the first four run beside the step before (``depth=1``).
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import ml_collections
from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, realm_recipes
from realm_retro.parallel import axes, hosts
from realm_retro.parallel.mesh import make_mesh
from realm_retro.train import loop, step
from realm_retro.train import state as states
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig
from realm_retro.train.recipe import Live

ROUNDS = flags.DEFINE_integer(
    "rounds", 7, "Steps that are timed, after one that is not."
)

PARTS = {
    "mask": "choose sentences and spans, mask them (host)",
    "embed": "embed the queries",
    "search": "search the index, take copies out (host)",
    "gather": "fetch candidates from the store, move the batch (host)",
    "encode": "forward, backward, AdamW",
}


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Times the parts of some steps and prints their medians."""
    mesh = make_mesh()
    train = config_lib.build(TrainConfig, config.train, name="config.train")
    optimizer = config_lib.build(
        OptimizerConfig, config.optimizer, name="config.optimizer"
    )
    with tempfile.TemporaryDirectory() as scratch:
        recipe = realm_recipes.pretrain(config, _aside(workdir, scratch), mesh)
        assert isinstance(recipe.batch_at, Live)
        assert recipe.weights is not None
        rule, abstract = loop.plan(recipe, train, optimizer, mesh)
        state = states.init_state(recipe.init, rule, abstract, 0)
        state = states.with_weights(state, recipe.weights(), abstract)
        step_fn = step.make_train_step(
            recipe, rule, abstract, mesh, seed=0, accumulation=train.accumulation
        )
        rows = []
        for i in range(1 + ROUNDS.value):
            seconds, state = _one(
                recipe.batch_at, recipe.batch_spec, mesh, step_fn, i, state
            )
            rows.append(seconds)
    rows = rows[1:]
    whole = statistics.median(sum(row.values()) for row in rows)
    common.say(f"{ROUNDS.value} steps of {train.batch_size}, {recipe.description}")
    for name, words in PARTS.items():
        values = [row[name] for row in rows]
        median = statistics.median(values)
        common.say(
            f"  {name:<7} {1e3 * median:9.1f} ms  {median / whole:6.1%}"
            f"  [{1e3 * min(values):.1f}, {1e3 * max(values):.1f}]  {words}"
        )


def _one(live: Live, spec, mesh, step_fn, number: int, state):
    """Seconds of each part of one step, and the state after it."""
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable):
        started = time.perf_counter()
        result = jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - started
        return result

    def asked():
        vectors, index = live.ask(number, state.params)
        return jax.block_until_ready(vectors), index

    # The first question masks and embeds; asked again, the masked queries are there.
    first = time.perf_counter()
    asked()
    both = time.perf_counter() - first
    started = time.perf_counter()
    question = asked()
    seconds["embed"] = time.perf_counter() - started
    seconds["mask"] = max(0.0, both - seconds["embed"])
    found = timed("search", functools.partial(live.find, number, question))
    batch = timed(
        "gather",
        lambda: {
            name: hosts.to_global(x, axes.sharding(spec[name], x.shape, mesh))
            for name, x in live.batch(number, found).items()
        },
    )
    state, _ = timed("encode", lambda: step_fn(state, batch))
    return seconds, state


def _aside(workdir: epath.Path, scratch: str) -> epath.Path:
    """A workdir whose artefacts are those of `workdir`, and whose index is its own."""
    for name in ("corpus", "passages", "spans"):
        pathlib.Path(scratch, name).symlink_to(pathlib.Path(workdir).resolve() / name)
    return epath.Path(scratch)


if __name__ == "__main__":
    common.run(main, name="bench_realm_parts")
