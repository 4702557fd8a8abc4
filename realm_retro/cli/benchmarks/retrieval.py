"""Suite ``retrieval``: what looking candidates up adds to a REALM step.

A training takes blocks of steps in turn: in some, candidates are looked up one step
ahead, beside the step (``config.pretrain.depth=1``); in the others the batches that
were found before are given. What a step with lookup takes longer is retrieval's share.

Between the blocks the parts of one lookup are waited for, one after the other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli.benchmarks import report, steps, workdirs
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.cli.benchmarks.steps import Alternation
from realm_retro.errors import UserError
from realm_retro.parallel import axes, hosts
from realm_retro.train.recipe import Live, LoopState, Recipe
from realm_retro.typing import Config, HostArray, JsonDict, PyTree

T = TypeVar("T")

TARGET = 0.10
_GIVEN, _LOOKED_UP = "candidates given", "candidates looked up one step ahead"
_PARTS = {
    "mask": "choose sentences and spans, mask them (host)",
    "embed": "embed the queries",
    "search": "search the index, take copies out (host)",
    "gather": "fetch candidates from the store, move the batch",
}


def measure(
    config: Config, workdir: epath.Path, *, num_steps: int, rounds: int
) -> Report:
    """Runs the suite.

    Args:
      config: of a REALM pre-training that searches on the host.
      workdir: its passages and spans are used, or made.
      num_steps: steps of a timed block.
      rounds: pairs of blocks.

    Raises:
      UserError: the config is of another kind, or a stage failed.
    """
    check(config, "retrieval")
    workdirs.complete(config, workdir)
    lookup = _Lookup()
    alternation = Alternation(
        (_GIVEN, _LOOKED_UP),
        steps=num_steps,
        rounds=rounds,
        # The first batch of a block was asked for in the block before.
        untimed=1,
        switch=lookup.between,
    )
    config = workdirs.changed(
        config,
        name=workdirs.NAME,
        pretrain={"depth": 1, "refresh": "never"},
        train=steps.settings(config, alternation.last),
    )
    with workdirs.scratch(workdir) as scratch:
        wrap = functools.partial(lookup.wrap, alternation=alternation)
        steps.run(config, scratch, wrap)
    return _report(config, alternation, lookup, num_steps)


def check(config: Config, suite: str) -> None:
    """Refuses a config that has no retrieval on the host in its steps.

    Raises:
      UserError: it is of another task, or searches on the devices.
    """
    task = config.get("task", "retro")
    if task != "realm_pretrain":
        raise UserError(
            f"--suite={suite} needs a config of task realm_pretrain, not {task}; take"
            " for instance configs/realm/quickstart.py"
        )
    placement = config.pretrain.get("placement", "host")
    if suite == "retrieval" and placement != "host":
        raise UserError(
            f"--suite={suite}: config.pretrain.placement={placement} searches inside"
            " the step, where nothing can be taken out; set it to host"
        )


@dataclasses.dataclass
class _Lookup:
    """Puts given batches in the place of looked-up ones, and times the parts.

    Attributes:
      parts: part → seconds of each round.
    """

    parts: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in _PARTS}
    )
    _live: Live | None = None
    _place: Callable[[Mapping[str, HostArray]], Any] = dict
    _found: collections.deque = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=4)
    )

    def wrap(self, recipe: Recipe, mesh: Mesh, alternation: Alternation) -> Recipe:
        """The recipe with batches of both kinds."""
        live, spec = recipe.batch_at, recipe.batch_spec
        assert isinstance(live, Live)
        self._live = live
        self._place = lambda batch: {
            name: hosts.to_global(x, axes.sharding(spec[name], x.shape, mesh))
            for name, x in batch.items()
        }

        def given(step: int) -> bool:
            # It is asked for in the step before: that one's block pays for it.
            return step > 0 and alternation.condition(step - 1) == _GIVEN

        # The first block has to have something to be given.
        first = min(alternation.block, self._found.maxlen or 0)

        def ask(step: int, params: PyTree) -> Any:
            return None if step >= first and given(step) else live.ask(step, params)

        def find(step: int, asked: Any) -> JsonDict:
            return {} if asked is None else live.find(step, asked)

        def batch(step: int, found: JsonDict) -> Mapping[str, HostArray]:
            if found:
                self._found.append(live.batch(step, found))
            else:
                self._found.rotate()
            return self._found[-1]

        switched = dataclasses.replace(live, depth=1, ask=ask, find=find, batch=batch)
        return dataclasses.replace(
            recipe, batch_at=switched, hooks=(*recipe.hooks, alternation)
        )

    def between(self, condition: str, loop: LoopState) -> None:
        """Times the parts once a round, when no lookup is under way."""
        if condition != _LOOKED_UP:
            return
        assert self._live is not None
        # A step that the training never comes to.
        number = 1_000_000 + loop.step
        seconds = _one(self._live, self._place, number, loop.state.params)
        for name, value in seconds.items():
            self.parts[name].append(value)


def _one(
    live: Live, place: Callable[[Mapping[str, HostArray]], Any], number: int, params
) -> dict[str, float]:
    """Seconds of each part of one lookup, each waited for."""

    def ask() -> tuple[Any, Any]:
        vectors, index = live.ask(number, params)
        return jax.block_until_ready(vectors), index

    # The first question masks and embeds; asked again, the masked queries are there.
    _, both = _timed(ask)
    asked, embed = _timed(ask)
    found, search = _timed(lambda: live.find(number, asked))
    _, gather = _timed(lambda: jax.block_until_ready(place(live.batch(number, found))))
    return {
        "mask": max(0.0, both - embed),
        "embed": embed,
        "search": search,
        "gather": gather,
    }


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def _report(
    config: Config, alternation: Alternation, lookup: _Lookup, num_steps: int
) -> Report:
    given, looked_up = (alternation.seconds[name] for name in (_GIVEN, _LOOKED_UP))
    # The first of them, in the round that is not timed, compiled.
    parts = {name: values[1:] for name, values in lookup.parts.items()}
    waited = [sum(values) for values in zip(*parts.values(), strict=True)]
    return Report(
        title="Retrieval's share of a REALM pre-training step",
        series=[
            Series(f"step, {_GIVEN}", "s", given),
            Series(f"step, {_LOOKED_UP}", "s", looked_up),
            Series(
                "retrieval's share of the step",
                "ratio",
                report.share(looked_up, given),
                at_most=TARGET,
            ),
            *_part_series(parts),
            Series(
                "what its share would be if the step waited",
                "ratio",
                [w / (w + step) for w, step in zip(waited, given, strict=True)],
            ),
        ],
        settings={
            "steps_of_a_block": num_steps,
            "batch_size": config.train.batch_size,
            "model": config_lib.as_dict(config.model),
            "pretrain": config_lib.as_dict(config.pretrain),
        },
    )


def _part_series(parts: Mapping[str, Sequence[float]]) -> list[Series]:
    return [
        Series(f"{name}: {words}", "s", parts[name]) for name, words in _PARTS.items()
    ]
