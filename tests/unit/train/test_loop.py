import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
import toy_training as toy

from realm_retro.errors import UserError
from realm_retro.train.checkpoint import Checkpoints
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import FILE


def records(run_dir):
    return [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]


def saved(run_dir):
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.latest()


def test_it_learns_and_says_so(tmp_path):
    lines = []
    outcome = toy.run(tmp_path, steps=60, log_every=20, report=lines.append)
    assert outcome.finished
    assert outcome.step == 60
    losses = [record["loss"] for record in records(tmp_path)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.3
    assert lines[0] == "toy: two layers"
    assert lines[-1].startswith(f"step 60/60  loss {losses[-1]:.3f}  accuracy 0.")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["meta"]["steps"] == 60
    assert manifest["parents"] == {"data": "toy data"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    toy.run(run_dir, steps=4)
    return run_dir


def test_a_complete_run_returns_at_once(finished):
    def must_not_run(*_):
        raise AssertionError("the run is complete")

    lines = []
    recipe = toy.make_recipe(init=must_not_run, batch_at=must_not_run)
    outcome = toy.run(finished, recipe, steps=4, report=lines.append)
    assert outcome.finished
    assert outcome.step == 4
    assert lines == [f"{finished}: training is complete (4 steps)"]


def test_a_run_killed_before_its_manifest_is_completed(tmp_path):
    toy.run(tmp_path, steps=4)
    (tmp_path / "manifest.json").unlink()
    outcome = toy.run(tmp_path, steps=4)
    assert outcome.finished
    assert (tmp_path / "manifest.json").exists()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5}, "train.steps: 4 there, 5 here"),
        ({"batch_size": 16}, "train.batch_size: 8 there, 16 here"),
        ({"settings": {"model": {"width": 3}}}, "model: None there"),
        ({"recipe": toy.make_recipe(fingerprint="other")}, "data: toy data there"),
    ],
)
def test_other_settings_are_refused(finished, changes, said):
    with pytest.raises(UserError, match=rf"{said}.*--config\.name"):
        toy.run(finished, **{"steps": 4, **changes})


def test_settings_may_be_mended_until_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="warmup_steps=3 exceeds"):
        toy.run(tmp_path, steps=2)

    def hook(at):
        if at.step == 4:
            raise UserError("a hook failed")

    with pytest.raises(UserError, match="a hook failed"):
        toy.run(tmp_path, toy.make_recipe(hooks=(hook,)), steps=5, checkpoint_every=2)
    with pytest.raises(UserError, match=r"train\.steps: 5 there, 6 here"):
        toy.run(tmp_path, steps=6)


def test_how_a_run_is_watched_may_change(finished):
    outcome = toy.run(
        finished,
        steps=4,
        log_every=3,
        checkpoint_every=7,
        keep=1,
        accumulation=2,
        on_bad_step="skip",
        max_loss_ratio=3.0,
    )
    assert outcome.finished


@dataclasses.dataclass
class Seen:
    """What was there when the hook of a step was called."""

    step: int
    state_step: int
    compiled: int
    reported: int
    asked: int


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of 12 steps, saved after 6, and what each hook saw."""
    lines, compiled, asked, seen = [], [], [], []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def batch_at(step):
        asked.append((step, threading.current_thread()))
        return toy.batch_at(step)

    def hook(at):
        counts = len(compiled), len(lines) - 1, len(asked)
        seen.append(Seen(at.step, int(at.state.step), *counts))

    recipe = toy.make_recipe(batch_at=batch_at, hooks=(hook,))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run_dir = tmp_path_factory.mktemp("watched")
        toy.run(run_dir, recipe, steps=12, checkpoint_every=6, report=lines.append)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return seen, asked, compiled


def test_nothing_compiles_after_the_first_step(watched):
    seen, _, compiled = watched
    assert seen[0].compiled > 0
    assert {at.compiled for at in seen} == {len(compiled)}


def test_metrics_are_fetched_only_after_later_steps_are_dispatched(watched):
    # A save after step 6 waits for the device; there alone they are fetched at once.
    for at in watched[0]:
        assert at.reported == max(at.step - 2, 6 if at.step > 6 else 0)


def test_hooks_see_each_new_state(watched):
    assert [at.step for at in watched[0]] == list(range(1, 13))
    assert [at.state_step for at in watched[0]] == list(range(1, 13))


def test_batches_are_built_ahead_in_another_thread_and_no_further(watched):
    seen, asked, _ = watched
    assert [step for step, _ in asked] == list(range(12))
    assert threading.main_thread() not in {thread for _, thread in asked}
    assert all(at.asked <= min(at.step + 2, 12) for at in seen)
    assert not any(t.name.startswith("batches") for t in threading.enumerate())


def test_an_error_in_a_batch_comes_out_as_it_is(tmp_path):
    def batch_at(step):
        if step == 3:
            raise UserError("the shard is gone")
        return toy.batch_at(step)

    with pytest.raises(UserError, match=r"^the shard is gone$"):
        toy.run(tmp_path, toy.make_recipe(batch_at=batch_at))


def test_a_batch_must_hold_what_the_recipe_says(tmp_path):
    def batch_at(step):
        return {"tokens": toy.batch_at(step)["tokens"]}

    with pytest.raises(ValueError, match="mask"):
        toy.run(tmp_path, toy.make_recipe(batch_at=batch_at))


def test_uneven_rows_are_said(tmp_path):
    lines = []
    toy.run(
        tmp_path,
        mesh=toy.mesh_of(4, 2, 1),
        steps=3,
        accumulation=2,
        report=lines.append,
    )
    assert lines[1].startswith("note: 4 rows at a time")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"log_every": -1}, "log_every=-1"),
        ({"batch_size": 8, "accumulation": 3}, "accumulation=3 pieces"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"on_bad_step": "ignore"}, "on_bad_step='ignore'; choose stop, skip"),
        ({"max_loss_ratio": 0.5}, "max_loss_ratio=0.5 must be above 1"),
        ({"max_bad_steps": 0}, "max_bad_steps=0 must be at least 1"),
    ],
)
def test_train_config(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**{"steps": 1, **changes})


def test_a_hook_that_waits_ends_at_sigterm_and_is_called_again_first(tmp_path):
    called, waits = [], [True]

    def hook(at):
        called.append(at.step)
        if at.step == 3 and waits:
            signal.raise_signal(signal.SIGTERM)
            while not at.should_stop():
                time.sleep(0.001)

    recipe = toy.make_recipe(hooks=(hook,))
    outcome = toy.run(tmp_path, recipe, steps=5)
    assert (outcome.finished, outcome.step, saved(tmp_path)) == (False, 3, 3)
    # It waits again where the run goes on, and may be stopped again.
    outcome = toy.run(tmp_path, recipe, steps=5)
    assert (outcome.finished, outcome.step) == (False, 3)
    waits.clear()
    assert toy.run(tmp_path, recipe, steps=5).finished
    assert called == [1, 2, 3, 3, 3, 4, 5]


def test_two_trainings_do_not_share_a_folder(tmp_path):
    """The second one is refused while the first runs, and may go on after it."""
    command = [sys.executable, toy.__file__, str(tmp_path), "0.2"]
    with subprocess.Popen(command) as first:
        while not (tmp_path / FILE).exists():
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is writing it"):
            toy.run(tmp_path)
        first.kill()
    assert toy.run(tmp_path).finished
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 21))
