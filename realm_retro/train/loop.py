"""The one training loop. It knows no model: it is handed a `Recipe`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro.artifacts import Stage
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.train import optim
from realm_retro.train import state as states
from realm_retro.train.bad_steps import BadSteps
from realm_retro.train.checkpoint import Checkpoints
from realm_retro.train.config import TrainConfig
from realm_retro.train.feed import Feed, open_feed
from realm_retro.train.metrics import Meter, MetricsLog, format_line
from realm_retro.train.optim import Optimizer, OptimizerConfig
from realm_retro.train.recipe import LoopState, Recipe
from realm_retro.train.state import TrainState
from realm_retro.train.step import StepFn, make_train_step
from realm_retro.typing import JsonDict

KIND = "run"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.train"

# How many steps are dispatched beyond the one whose metrics are fetched.
_DISPATCHED = 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      finished: whether the run is complete; False after SIGTERM.
      step: the last checkpoint's.
      seconds: spent in training, over all starts of the run.
    """

    finished: bool
    step: int
    seconds: float


def train(
    recipe: Recipe,
    run_dir: epath.PathLike,
    *,
    config: TrainConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the last step.

    The result is the same, bit for bit on one machine, however often the run was
    interrupted: the state is saved whole, and batches and random keys are functions
    of (seed, step).

    Args:
      recipe: what to train, on what.
      run_dir: the folder of the run; created if needed.
      config: steps, batches, logging.
      optimizer: learning rate and so on.
      mesh: the devices; may differ from that of an earlier start.
      seed: of the initial weights and of dropout.
      settings: whatever else determines the weights (the model's sizes): another
        value is refused in the same `run_dir`.
      report: takes lines for the user, in the main process.

    Raises:
      UserError: `run_dir` is a run with other settings; a step went wrong (see
        `TrainConfig.on_bad_step`; the last good checkpoint stays); the disk is full.
    """
    report = report if hosts.is_main() else _ignore
    decisive = {
        **(settings or {}),
        "seed": seed,
        "train": config.decisive,
        "optimizer": dataclasses.asdict(optimizer),
    }
    stage, started = _open(run_dir, decisive, recipe.fingerprint), time.perf_counter()
    if stage.finished:
        _check_manifest(stage.directory)
        report(f"{stage.directory}: training is complete ({config.steps} steps)")
        return Outcome(True, config.steps, 0.0)
    report(recipe.description)
    _note_uneven(config, mesh, report)
    with _forgiving(stage), Checkpoints(stage.directory, keep=config.keep) as saved:
        rule, abstract = plan(recipe, config, optimizer, mesh)
        done, carried = saved.latest() or 0, None
        if done:
            state, meta = saved.restore(done, abstract)
            started -= meta["seconds"]
            carried = meta.get("carried")
            report(f"{stage.directory}: going on from step {done}")
        else:
            state = states.init_state(recipe.init, rule, abstract, seed)
            if recipe.weights:
                state = states.with_weights(state, recipe.weights(), abstract)
            saved.prepare(state)

        def save(step: int, state: TrainState, carried: JsonDict) -> None:
            if hosts.is_main():
                stage.note("saving", {"step": step})  # see _forgiving
            seconds = time.perf_counter() - started
            saved.save(step, state, {"seconds": seconds, "carried": carried})

        step_fn = make_train_step(
            recipe,
            rule,
            abstract,
            mesh,
            seed=seed,
            accumulation=config.accumulation,
            max_loss_ratio=config.max_loss_ratio,
        )
        with (
            _records(stage.directory, done, config.steps, report) as record,
            open_feed(recipe, mesh, done, config.steps, carried) as feed,
        ):
            bad_steps = BadSteps(
                stage.directory, config, recipe.examples, resumed_at=done, report=report
            )
            meter = Meter(recipe, mesh, config, judge=bad_steps.judge, report=record)
            done = _loop(
                recipe, config, stage.directory, step_fn, state, done, save, meter, feed
            )
    outcome = Outcome(done == config.steps, done, time.perf_counter() - started)
    if outcome.finished and hosts.is_main():
        stage.commit({"steps": done, "seconds": outcome.seconds})
    return outcome


def _loop(
    recipe: Recipe,
    config: TrainConfig,
    run_dir: epath.Path,
    step_fn: StepFn,
    state: TrainState,
    done: int,
    save: Callable[[int, TrainState, JsonDict], None],
    meter: Meter,
    feed: Feed,
) -> int:
    """Takes the steps after `done` and returns the last one that was saved."""
    dispatched = collections.deque()
    with hosts.preemption() as reached:
        asked_to_stop = _latched(reached)
        if done:
            # Again: what a hook waits for it may have left when it was told to stop.
            for hook in recipe.hooks:
                hook(LoopState(done, state, run_dir, asked_to_stop))
            if asked_to_stop():
                return done
        for step in range(done + 1, config.steps + 1):
            batch = feed.take(step - 1, state.params)
            # 1. Dispatch. The call returns before the device has done anything, and
            #    the old state's memory is given away with it. (The first one compiles.)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, batch)
            meter.start()
            # 2. Only then look back, at a step whose successors the device already
            #    has: it never idles while the host waits here, and the host cannot
            #    run away with batches and memory.
            dispatched.append((step, metrics))
            if len(dispatched) > _DISPATCHED:
                meter.add(*dispatched.popleft())
            for hook in recipe.hooks:
                hook(LoopState(step, state, run_dir, asked_to_stop))
            # 3. Save between steps: before the next one takes the state's memory, and
            #    after all metrics were looked at, so that no checkpoint follows a bad
            #    step that ends the training. The copy has to wait for the device;
            #    writing it does not hold up the next steps.
            stopping = asked_to_stop()
            if stopping or step == config.steps or step % config.checkpoint_every == 0:
                while dispatched:
                    meter.add(*dispatched.popleft())
                save(step, state, feed.carry())
                done = step
            if stopping:
                break
    return done


def _latched(reached: Callable[[int], bool]) -> Callable[[], bool]:
    """Whether the run was told to stop; once it was, it is.

    Several processes agree on one of the numbers that they count with (see
    `hosts.preemption`), so each of them asks equally often.
    """
    calls, stopped = itertools.count(1), False

    def asked_to_stop() -> bool:
        nonlocal stopped
        stopped = stopped or reached(next(calls))
        return stopped

    return asked_to_stop


def _open(run_dir: epath.PathLike, settings: JsonDict, data: str) -> Stage:
    # The others find the request of the main process, and compare.
    with hosts.main_first("run folder"):
        try:
            return Stage.open(
                run_dir,
                kind=KIND,
                format_version=FORMAT_VERSION,
                config=settings,
                parents={"data": data},
                made_by=MADE_BY,
                claim=hosts.is_main(),
            )
        except UserError as error:
            again = "or give this run its own --config.name"
            raise UserError(f"{error}, {again}") from None


def _check_manifest(run_dir: epath.Path) -> None:
    try:
        artifacts.load(
            run_dir, kind=KIND, format_version=FORMAT_VERSION, made_by=MADE_BY
        )
    except UserError as error:
        # Deleting the folder, as for other artefacts, would delete the training.
        problem = str(error).partition(";")[0]
        raise UserError(
            f"{problem}; delete {run_dir / artifacts.MANIFEST} and run the same command"
            " again, it goes on from the last checkpoint"
        ) from None


@contextlib.contextmanager
def _forgiving(stage: Stage) -> Iterator[None]:
    """Forgets a run's settings if it fails before its first checkpoint.

    The user can then mend a setting and start again under the same name. Once a save
    has begun, noted in the stage, the settings stay.
    """
    if hosts.is_main():
        with stage.released_on_error():
            yield
    else:
        yield


def plan(
    recipe: Recipe, config: TrainConfig, optimizer: OptimizerConfig, mesh: Mesh
) -> tuple[Optimizer, TrainState]:
    """The update rule, and the state's shapes and shardings; nothing is computed."""
    boxed = jax.eval_shape(recipe.init, jax.random.key(0))
    params = states.abstract_params(recipe.init, mesh)
    everything = jax.tree.map(lambda _: True, params)
    rule = optim.make_optimizer(
        optimizer,
        steps=config.steps,
        trainable=recipe.trainable(params) if recipe.trainable else everything,
        decayed=optim.decay_mask(boxed),
    )
    return rule, states.abstract_state(params, rule)


@contextlib.contextmanager
def _records(
    run_dir: epath.Path, done: int, steps: int, report: Callable[[str], None]
) -> Iterator[Callable[[JsonDict], None]]:
    """Yields what writes a record to the log files and, as a line, to the user."""
    if not hosts.is_main():
        yield _ignore
        return
    with MetricsLog(run_dir, resumed_at=done) as log:

        def write(record: JsonDict) -> None:
            log.write(record)
            report(format_line(record, steps))

        yield write


def _note_uneven(
    config: TrainConfig, mesh: Mesh, report: Callable[[str], None]
) -> None:
    rows = config.batch_size // config.accumulation
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        report(
            f"note: {rows} rows at a time (config.train.batch_size / accumulation) do"
            f" not divide over {devices} data and fsdp devices: some do the same work"
        )


def _ignore(_: object) -> None:
    pass
