"""RETROfit (section 4.2): a trained plain decoder learns to retrieve.

The decoder's weights come from a run of its own; the neighbour encoder and chunked
cross-attention are new. Frozen, the decoder keeps every bit of its weights, and only
the new ones are trained.

A plain decoder is one run of layers, stacked on their first axis; a RETRO's layers lie
in the runs of `realm_retro.retro.model.runs`. `extend` goes from the one to the other,
and `decoder_of` back: what evaluation and sampling run as RETRO[OFF] is the program of
the plain decoder, so that its output is that decoder's bit for bit. (The compiler
rounds the same layers a little differently where they stand in other runs.)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from realm_retro.errors import UserError
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.model import runs
from realm_retro.typing import Array, Params, PyTree

# Modules that a plain decoder does not have, wherever they stand in the tree.
_NEW = {"encoder", "bridge_cross", "cross"}


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where a RETRO's weights come from (section ``init``).

    Attributes:
      run: a run of the plain decoder of the same sizes in the same workdir, whose
        newest checkpoint is started from; "" for random weights.
      frozen: train the neighbour encoder and chunked cross-attention alone.
    """

    run: str = ""
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.frozen and not self.run:
            raise UserError(
                "config.init.frozen=True keeps the decoder as it is; name the run that"
                " trained it in config.init.run"
            )


def check(init: InitConfig, config: RetroConfig) -> None:
    """Checks that something is left to train.

    Raises:
      UserError: everything of the model would be frozen.
    """
    if init.frozen and not config.retrieves:
        raise UserError(
            "config.init.frozen=True trains cross-attention and its encoder, but"
            " config.model.cca_layers is empty; name layers there"
        )


def plain(config: RetroConfig) -> RetroConfig:
    """The decoder alone, without what retrieves."""
    return dataclasses.replace(config, cca_layers=())


def trainable(params: PyTree) -> PyTree:
    """Tree of bools: True for what a plain decoder does not have."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(key, "key", None) in _NEW for key in path), params
    )


def extend(config: RetroConfig, decoder: Params, new: Params) -> Params:
    """A RETRO's parameters whose decoder is the plain one. Traceable.

    Args:
      config: the RETRO's.
      decoder: parameters of `plain(config)`.
      new: parameters of the RETRO, for all that the decoder does not have.
    """
    plan, source = runs(config), decoder["params"]
    stacked = source["stem"]["plain_0"]

    def layers(which: slice | int) -> PyTree:
        return jax.tree.map(lambda x: x[which], stacked)

    made = {**new["params"], "embed": source["embed"], "norm": source["norm"]}
    done = plan.stem
    if plan.stem:
        made["stem"] = {"plain_0": layers(slice(done))}
    if config.retrieves:
        bridge = layers(done)
        made["bridge_attention"] = bridge["attention"]
        made["bridge_ffw"] = bridge["ffw"]
        done += 1
    for number, (units, plain_layers) in enumerate(plan.groups):
        group, period = dict(made[f"groups_{number}"]), plain_layers + 1
        stop = done + units * period
        for i in range(period):
            name = f"plain_{i}" if i < plain_layers else "cca"
            own = layers(slice(done + i, stop, period))
            group[name] = {**group[name], **own}
        made[f"groups_{number}"], done = group, stop
    if plan.tail:
        made["tail"] = {"plain_0": layers(slice(done, None))}
    return {"params": made}


def decoder_of(config: RetroConfig, params: Params) -> Params:
    """The plain decoder within a RETRO: parameters of `plain(config)`. Traceable."""
    if not config.retrieves:
        return params
    plan, source = runs(config), params["params"]
    bridge = {"attention": source["bridge_attention"], "ffw": source["bridge_ffw"]}
    stacks = [jax.tree.map(lambda x: x[None], bridge)]
    if plan.stem:
        stacks.insert(0, source["stem"]["plain_0"])
    for number, (_, plain_layers) in enumerate(plan.groups):
        group = source[f"groups_{number}"]
        names = [*(f"plain_{i}" for i in range(plain_layers)), "cca"]
        units = [{part: group[name][part] for part in bridge} for name in names]
        stacks.append(jax.tree.map(_interleaved, *units))
    if plan.tail:
        stacks.append(source["tail"]["plain_0"])
    stem = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
    kept = {name: source[name] for name in ("embed", "norm")}
    return {"params": {**kept, "stem": {"plain_0": stem}}}


def _interleaved(*layers: Array) -> Array:
    """Places of a unit, each stacked over the units → all layers in their order."""
    return jnp.stack(layers, axis=1).reshape(-1, *layers[0].shape[1:])
