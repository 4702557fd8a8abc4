"""When a snapshot is due, and how the interval follows the embedder's speed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro import config as config_lib
from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import RefreshConfig, Schedule
from realm_retro.retrieval.refresh.schedule import next_interval


def due_steps(schedule, steps):
    found = []
    for step in range(1, steps + 1):
        if schedule.due(step):
            found.append(step)
            schedule = schedule.published(step)
    return found


def test_every_so_many_steps():
    assert due_steps(refresh.every(4), 13) == [4, 8, 12]


def test_an_embedder_that_slows_down_is_published_ever_more_rarely():
    schedule = refresh.adaptive(first=10, shortest=5, longest=80, target_overlap=0.9)
    published, speeds = [0], {}
    for step in range(1, 600):
        if not schedule.due(step):
            continue
        steps = step - published[-1]
        # Of the top k one in ten is lost in 5 steps at first, in ever more later.
        lost = min(1.0, sum(0.02 / (1 + s / 20) for s in range(published[-1], step)))
        schedule = schedule.published(step).measured(1 - lost, steps=steps)
        published.append(step)
        speeds[step] = lost
    gaps = np.diff(published)
    assert (gaps >= 5).all()
    assert (gaps <= 80).all()
    assert gaps[0] == 10
    assert gaps[1] == 6, "it was too fast for the first interval"
    assert gaps[-1] == 80
    assert (np.diff(gaps[1:]) >= 0).all()


@pytest.mark.parametrize(
    ("overlap", "interval"),
    [(0.9, 100), (0.8, 50), (0.0, 50), (0.92, 125), (0.95, 200), (1.0, 200)],
)
def test_one_measurement_changes_it_at_most_twofold(overlap, interval):
    found = next_interval(
        100, overlap, steps=100, target=0.9, shortest=1, longest=10_000
    )
    assert found == interval


@given(
    st.integers(1, 500),
    st.floats(0, 1),
    st.integers(1, 5000),
    st.floats(0.01, 0.99),
)
def test_it_stays_within_its_bounds(interval, overlap, steps, target):
    found = next_interval(
        interval, overlap, steps=steps, target=target, shortest=20, longest=300
    )
    assert 20 <= found <= 300


def test_a_fixed_schedule_ignores_measurements():
    schedule = refresh.every(4)
    assert schedule.measured(0.0, steps=4) == schedule


def test_a_schedule_goes_on_where_it_was():
    fixed = refresh.every(4).published(8)
    assert refresh.every(4).resumed(fixed.as_meta()) == fixed
    assert refresh.every(6).resumed(fixed.as_meta()) == Schedule(6, last=8)
    moving = refresh.adaptive(first=10, shortest=5, longest=80, target_overlap=0.9)
    moved = moving.published(10).measured(0.0, steps=10)
    assert moved.interval == 5
    assert moving.resumed(moved.as_meta()) == moved


@pytest.mark.parametrize(
    "make",
    [
        lambda: refresh.every(0),
        lambda: refresh.adaptive(first=4, shortest=5, longest=9, target_overlap=0.5),
        lambda: refresh.adaptive(first=10, shortest=5, longest=9, target_overlap=0.5),
        lambda: refresh.adaptive(first=6, shortest=5, longest=9, target_overlap=1.0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


# The overlap


def loop_overlap(queries, stale, fresh, k):
    shares = []
    for query in queries:
        best = [
            set(sorted(range(len(stale)), key=lambda i: (-(query @ rows[i]), i))[:k])
            for rows in (stale, fresh)
        ]
        shares.append(len(best[0] & best[1]) / k)
    return np.mean(shares)


def test_overlap_is_what_a_loop_counts():
    rng = np.random.default_rng(0)
    queries, stale = rng.integers(-4, 5, (7, 5)), rng.integers(-4, 5, (30, 5))
    fresh = stale + rng.integers(-1, 2, stale.shape)
    found = refresh.topk_overlap(queries, stale, fresh, k=6)
    assert found == pytest.approx(loop_overlap(queries, stale, fresh, 6))
    assert 0.2 < found < 0.95


def test_overlap_of_the_same_is_one_and_of_opposites_none():
    rng = np.random.default_rng(1)
    queries, passages = rng.normal(size=(4, 8)), rng.normal(size=(20, 8))
    assert refresh.topk_overlap(queries, passages, passages, k=5) == 1.0
    assert refresh.topk_overlap(queries, passages, -passages, k=5) == 0.0
    assert refresh.topk_overlap(queries, passages, -passages, k=50) == 1.0


def test_an_empty_probe_is_an_error():
    empty, two = np.zeros((0, 3)), np.zeros((2, 3))
    for arguments in ((empty, two, two), (two, empty, empty), (two, two, empty)):
        with pytest.raises(ValueError, match="passage"):
            refresh.topk_overlap(*arguments, k=3)


# The section of the config


def settings(**values):
    return config_lib.build(RefreshConfig, values, name="config.refresh")


def test_the_config_makes_the_schedule_and_the_target():
    assert settings(every=7).schedule() == refresh.every(7)
    adapting = settings(every=70, target_overlap=0.8, shortest=9, longest=99)
    assert adapting.schedule() == Schedule(70, 0, 0.8, 9, 99)
    target = settings(dtype="float16", shard_rows=5).target(11, {"passages": "a"})
    assert (target.num_shards, target.dtype) == (3, "float16")
    assert target.rows(2) == (10, 11)


@pytest.mark.parametrize(
    "value",
    [
        {"every": 0},
        {"dtype": "bfloat16"},
        {"keep": 1},
        {"lease_seconds": 0.0},
        {"poll_seconds": -1.0},
        {"shard_rows": 0},
        {"max_staleness": -1},
        {"target_overlap": 1.5},
        {"every": 10_000, "target_overlap": 0.9},
    ],
)
def test_impossible_settings_are_named(value):
    with pytest.raises(UserError, match=next(iter(value))):
        settings(**value)
