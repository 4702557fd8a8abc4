"""Batches on their way to the devices: made ahead, or with retrieval in the loop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from realm_retro.parallel import axes, hosts
from realm_retro.train.recipe import Live, Recipe
from realm_retro.typing import Batch, HostArray, JsonDict, PyTree

# How many batches lie ready beyond the one being used.
_PREFETCHED = 2


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where the loop gets its batches.

    Attributes:
      take: (step from 0, parameters before it) → its batch on the devices. Called once
        for each step, in order.
      carry: → JSON values that a checkpoint has to hold, for `open_feed`.
    """

    take: Callable[[int, PyTree], Batch]
    carry: Callable[[], JsonDict]


@contextlib.contextmanager
def open_feed(
    recipe: Recipe, mesh: Mesh, start: int, stop: int, carried: JsonDict | None = None
) -> Iterator[Feed]:
    """Batches of the steps start … stop − 1.

    Args:
      recipe: whose batches.
      mesh: where they go.
      start: first step, from 0.
      stop: the step after the last.
      carried: what `Feed.carry` gave at the checkpoint after step `start`, if any.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            if isinstance(recipe.batch_at, Live):
                yield _live(recipe, recipe.batch_at, mesh, stop, pool, carried or {})
            else:
                yield _ahead(recipe, recipe.batch_at, mesh, start, stop, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def _ahead(
    recipe: Recipe,
    batch_at: Callable[[int], Mapping[str, HostArray]],
    mesh: Mesh,
    start: int,
    stop: int,
    pool: ThreadPoolExecutor,
) -> Feed:
    """Batches that depend on nothing but the step."""
    steps = iter(range(start, stop))

    def submit(count: int) -> list[Future[Batch]]:
        return [
            pool.submit(lambda step=step: _place(recipe, batch_at(step), mesh))
            for step in itertools.islice(steps, count)
        ]

    ahead = collections.deque(submit(_PREFETCHED))

    def take(step: int, params: PyTree) -> Batch:
        batch = ahead.popleft().result()
        ahead.extend(submit(1))
        return {**batch, **_shared(recipe, step, params)}

    return Feed(take, carry=dict)


def _live(
    recipe: Recipe,
    live: Live,
    mesh: Mesh,
    stop: int,
    pool: ThreadPoolExecutor,
    carried: JsonDict,
) -> Feed:
    """Batches that are looked up with the weights; see `Live`."""
    if carried:
        live.resume(carried["state"])
    # What was found for the next step, or the promise of it.
    pending: dict[int, Future[JsonDict]] = {}
    if carried.get("found") is not None:
        pending[carried["step"]] = pool.submit(lambda: carried["found"])

    def ask(step: int, params: PyTree) -> None:
        asked = live.ask(step, params)
        pending[step] = pool.submit(lambda: live.find(step, asked))

    def take(step: int, params: PyTree) -> Batch:
        if step not in pending:
            ask(step, params)
        found = pending.pop(step).result()
        if live.depth and step + 1 < stop:
            # With the weights that are at hand: the device gets this before the step.
            ask(step + 1, params)
        batch = _place(recipe, live.batch(step, found), mesh)
        return {**batch, **_shared(recipe, step, params)}

    def carry() -> JsonDict:
        step, found = next(iter(pending.items()), (None, None))
        return {
            "state": live.carry(),
            "step": step,
            "found": found.result() if found else None,
        }

    return Feed(take, carry)


def abstract_batch(
    recipe: Recipe,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | AbstractMesh,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `Feed.take` gives, as shapes, dtypes and shardings; nothing is computed.

    Args:
      recipe: whose batches.
      shapes: of the global batch; what every batch shares has a sharding already.
      mesh: where they would go.

    Raises:
      ValueError: they are not the arrays that the recipe names.
    """
    own = {name: x for name, x in shapes.items() if x.sharding is None}
    _check_names(recipe, own)
    placed = {
        name: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=axes.sharding(recipe.batch_spec[name], x.shape, mesh),
        )
        for name, x in own.items()
    }
    return {**shapes, **placed}


def _shared(recipe: Recipe, step: int, params: PyTree) -> Batch:
    return recipe.shared(step, params) if recipe.shared else {}


def _place(recipe: Recipe, batch: Mapping[str, HostArray], mesh: Mesh) -> Batch:
    _check_names(recipe, batch)
    return {
        name: hosts.to_global(x, axes.sharding(recipe.batch_spec[name], x.shape, mesh))
        for name, x in batch.items()
    }


def _check_names(recipe: Recipe, batch: Mapping[str, Any]) -> None:
    if batch.keys() != recipe.batch_spec.keys():
        raise ValueError(f"batch {set(batch)} is not {set(recipe.batch_spec)}")
