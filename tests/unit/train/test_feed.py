"""Batches with retrieval in the loop: whose weights ask, when, and what is saved."""

import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
import toy_training as toy

from realm_retro.train.feed import open_feed
from realm_retro.train.recipe import Live

STEPS = 6


class Log:
    """A `Live` that writes down how it is used; weights are numbers."""

    def __init__(self, depth):
        self.depth = depth
        self.calls = []
        self.threads = set()
        self.index = 0

    def live(self, **changes):
        functions = {
            "ask": self.ask,
            "find": self.find,
            "batch": self.batch,
            "carry": lambda: {"index": self.index},
            "resume": self.resume,
        }
        return Live(self.depth, **{**functions, **changes})

    def resume(self, carried):
        assert not self.calls, "resumed after it was used"
        self.index = carried["index"]

    def ask(self, step, params):
        assert threading.current_thread() is threading.main_thread()
        self.calls.append(("ask", step, params))
        return params, self.index

    def find(self, step, asked):
        self.threads.add(threading.current_thread())
        weights, index = asked
        return {"weights": weights, "index": index, "step": step}

    def batch(self, step, found):
        assert found["step"] == step
        self.calls.append(("batch", step))
        return {"found": np.array([step, found["weights"], found["index"]])}


def recipe_of(batch_at, spec=(None,)):
    return toy.make_recipe(batch_at=batch_at, batch_spec={"found": spec})


def feed_of(log, start=0, stop=STEPS, carried=None, **changes):
    recipe = recipe_of(log.live(**changes))
    return open_feed(recipe, toy.mesh_of(1, 1, 1), start, stop, carried)


def take(feed, start, stop):
    """[step, weights that asked, index asked]; weights of a step are ten times it."""
    taken = []
    for step in range(start, stop):
        batch = feed.take(step, 10 * step)
        assert isinstance(batch["found"], jax.Array)
        taken.append(np.asarray(batch["found"]).tolist())
    return taken


def test_depth_0_asks_with_the_weights_of_the_step():
    log = Log(0)
    with feed_of(log) as feed:
        assert take(feed, 0, STEPS) == [[s, 10 * s, 0] for s in range(STEPS)]
    expected = [[("ask", s, 10 * s), ("batch", s)] for s in range(STEPS)]
    assert log.calls == [call for pair in expected for call in pair]


def test_depth_1_asks_a_step_ahead_before_the_device_gets_the_step():
    log = Log(1)
    with feed_of(log) as feed:
        taken = take(feed, 0, STEPS)
    assert taken == [[s, 10 * max(0, s - 1), 0] for s in range(STEPS)]
    # The question of the next step is dispatched before the batch is handed over.
    expected = [
        ("ask", 0, 0),
        ("ask", 1, 0),
        ("batch", 0),
        ("ask", 2, 10),
        ("batch", 1),
    ]
    assert log.calls[:5] == expected
    assert [call[1] for call in log.calls if call[0] == "ask"] == list(range(STEPS))


@pytest.mark.parametrize("depth", [0, 1])
def test_looking_up_happens_in_another_thread(depth):
    log = Log(depth)
    with feed_of(log) as feed:
        take(feed, 0, 3)
    assert len(log.threads) == 1
    assert threading.main_thread() not in log.threads


def test_a_step_and_the_next_lookup_overlap():
    log, looked_up = Log(1), threading.Event()
    handed_over = threading.Event()

    def find(step, asked):
        if step == 1:
            assert handed_over.wait(30), "the step waited for the next one's lookup"
            looked_up.set()
        return log.find(step, asked)

    with feed_of(log, find=find) as feed:
        take(feed, 0, 1)
        assert not looked_up.is_set()
        handed_over.set()
        take(feed, 1, 2)
    assert looked_up.is_set()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", [1, 3, STEPS - 1])
def test_what_is_carried_goes_on_where_it_stopped(depth, at):
    straight = Log(depth)
    with feed_of(straight) as feed:
        before = take(feed, 0, at)
        straight.index = 7  # the index is swapped after the step `at`
        carried = json.loads(json.dumps(feed.carry()))
        expected = before + take(feed, at, STEPS)
    assert carried["state"] == {"index": 7}

    again = Log(depth)
    with feed_of(again, start=at, carried=carried) as feed:
        assert before + take(feed, at, STEPS) == expected
    # With depth 1 the batch after the checkpoint was looked up before the swap.
    indexes = [row[2] for row in expected]
    assert indexes == [0] * (at + depth) + [7] * (STEPS - at - depth)


def test_saving_twice_and_going_on_gives_the_same():
    log = Log(1)
    with feed_of(log) as feed:
        taken = take(feed, 0, 2)
        assert feed.carry() == feed.carry()
        taken += take(feed, 2, STEPS)
    assert taken == [[s, 10 * max(0, s - 1), 0] for s in range(STEPS)]


def test_after_the_last_step_nothing_is_pending():
    log = Log(1)
    with feed_of(log) as feed:
        take(feed, 0, STEPS)
        assert feed.carry() == {"state": {"index": 0}, "step": None, "found": None}
    again = Log(1)
    with feed_of(again, start=STEPS, carried=feed.carry()):
        pass
    assert not again.calls


@pytest.mark.parametrize("depth", [0, 1])
def test_an_error_of_the_lookup_comes_up(depth):
    log = Log(depth)

    def find(step, asked):
        if step == 2:
            raise OSError("the index is gone")
        return log.find(step, asked)

    with feed_of(log, find=find) as feed:
        take(feed, 0, 2)
        with pytest.raises(OSError, match="the index is gone"):
            take(feed, 2, 3)


def test_leaving_early_does_not_look_up_what_nobody_takes():
    log, begun, go_on = Log(1), threading.Event(), threading.Event()

    def find(step, asked):
        if step == 1:
            begun.set()
            assert go_on.wait(30)
        return log.find(step, asked)

    class Crash(Exception):
        pass

    def leave():
        with feed_of(log, find=find) as feed:
            take(feed, 0, 1)
            assert begun.wait(30)
            go_on.set()
            raise Crash

    with pytest.raises(Crash):
        leave()
    assert ("batch", 1) not in log.calls


def test_arrays_that_the_recipe_does_not_name_are_refused():
    log = Log(0)

    def extra(step, found):
        return {**log.batch(step, found), "more": np.zeros(1)}

    with feed_of(log, batch=extra) as feed, pytest.raises(ValueError, match="more"):
        take(feed, 0, 1)


def test_batches_of_the_step_alone_are_made_ahead():
    asked, ready = [], threading.Semaphore(0)

    def batch_at(step):
        asked.append(step)
        ready.release()
        return {"found": np.array([step])}

    with open_feed(recipe_of(batch_at), toy.mesh_of(1, 1, 1), 2, STEPS) as feed:
        for _ in range(2):
            assert ready.acquire(timeout=30)
        assert asked == [2, 3], "two lie ready before the first is taken"
        taken = [int(feed.take(step, None)["found"][0]) for step in range(2, STEPS)]
        assert feed.carry() == {}
    assert taken == asked == list(range(2, STEPS))


@pytest.mark.parametrize("depth", [0, 1, None])
def test_shared_arrays_are_those_of_the_step(depth):
    log, given = Log(depth or 0), jax.numpy.arange(3)
    asked = []

    def shared(step, params):
        asked.append((step, params))
        return {"index": given}

    batch_at = log.live() if depth is not None else lambda step: {"found": np.ones(1)}
    recipe = dataclasses.replace(recipe_of(batch_at), shared=shared)
    with open_feed(recipe, toy.mesh_of(1, 1, 1), 0, 3) as feed:
        for step in range(3):
            batch = feed.take(step, 10 * step)
            assert batch.keys() == {"found", "index"}
            assert batch["index"] is given, "nothing is copied"
    assert asked == [(0, 0), (1, 10), (2, 20)]
