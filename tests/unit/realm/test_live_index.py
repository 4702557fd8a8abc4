"""Which index is asked when: made first, refreshed, swapped, carried over a stop."""

import functools
import json
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from realm_examples import small_realm

from realm_retro.arrays import ShardedArray
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.realm import live_index, search
from realm_retro.realm.live_index import LiveIndex
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import RefreshConfig, Worker
from realm_retro.train.recipe import LoopState
from realm_retro.train.state import TrainState

ROWS, DIM = 22, 3
PARENTS = {"passages": "a" * 64}
CONFIG = small_realm()
PATIENCE = 30.0


def params_of(step, dtype=jnp.float32):
    """A tower whose vectors tell which step they are of."""
    kernel = jnp.linspace(0.1, 2.0, DIM) + step
    other = {"kernel": jnp.zeros(2)}
    return {"document": {"dense": {"kernel": kernel.astype(dtype)}}, "query": other}


def make_embedder(arrays):
    assert list(arrays) == ["document/dense/kernel"]
    kernel = arrays["document/dense/kernel"]

    def embed(start, stop):
        return np.sin(np.arange(start, stop, dtype=np.float32)[:, None] * kernel)

    return embed


def build_index(vectors):
    return search.build_index(np.asarray(vectors[:], np.float32))


def expected(step):
    kernel = np.asarray(params_of(step)["document"]["dense"]["kernel"])
    return np.sin(np.arange(ROWS, dtype=np.float32)[:, None] * kernel)


class Training:
    """A training's side of an index, step by step."""

    def __init__(
        self,
        root,
        *,
        mode="inline",
        every=3,
        embed=None,
        build=None,
        depth=0,
        keep_checkpoints=2,
        **more,
    ):
        self.lines = []
        settings = RefreshConfig(every=every, shard_rows=8, poll_seconds=0.005, **more)
        self.target = settings.target(ROWS, PARENTS)
        self.root = root
        self.index = LiveIndex(
            root,
            config=CONFIG,
            settings=settings,
            mode=mode,
            target=self.target,
            make_embedder=embed or make_embedder,
            build=build or build_index,
            depth=depth,
            keep_checkpoints=keep_checkpoints,
            report=self.lines.append,
        )

    def start(self, step=0):
        return self.index.current(step, params_of(step))

    def after(self, step, params=None, should_stop=lambda: False):
        state = TrainState(step, params or params_of(step), None)
        self.index.after_step(LoopState(step, state, self.root, should_stop))

    def steps(self, first, last):
        """Takes steps; the index's step that each of them asks."""
        asked = []
        for step in range(first, last):
            asked.append(self.start(step).version.step)
            self.after(step + 1)
        return asked

    def worker(self):
        return Worker(self.root, make_embedder, self.target, report=lambda line: None)

    def work(self):
        """What a worker beside it does, to the next version."""
        worker = self.worker()
        while worker.step() is not refresh.Did.VERSION:
            time.sleep(0.001)

    def published(self, step):
        """Waits for a snapshot."""
        deadline = time.monotonic() + PATIENCE
        while not (self.root / "snapshots" / f"step-{step:08d}").exists():
            assert time.monotonic() < deadline, "it is never published"
            time.sleep(0.005)

    def until(self, step, wanted):
        """Looks between steps until the index of step `wanted` is in use."""
        deadline = time.monotonic() + PATIENCE
        while self.start(step).version.step != wanted:
            assert time.monotonic() < deadline, "it is never taken"
            time.sleep(0.01)
            self.after(step)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "refresh"


def assert_is(in_use, step):
    """The index in use finds what the tower of `step` makes nearest."""
    vectors = refresh.load_vectors(in_use.version)[:]
    np.testing.assert_allclose(vectors, expected(step), atol=1e-6)
    queries = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    best = np.argmax(queries @ expected(step).T, axis=1)
    assert in_use.index.search(queries, 1).ids[:, 0].tolist() == best.tolist()
    assert in_use.version.step == step


def test_the_first_index_is_made_of_the_weights_at_hand(root):
    training = Training(root)
    first = training.start()
    assert_is(first, 0)
    assert training.start() is first
    assert "embedding 22 passages" in training.lines[0]


def test_inline_refreshes_between_steps_on_time(root):
    training = Training(root)
    assert training.steps(0, 8) == [0, 0, 0, 3, 3, 3, 6, 6]
    assert_is(training.start(8), 6)
    assert "step 3: index of step 3 in use, next after 3 steps" in training.lines


def test_never_keeps_the_first(root):
    training = Training(root, mode="never")
    assert training.steps(0, 8) == [0] * 8
    assert_is(training.start(8), 0)


def test_a_stale_mark_of_the_end_is_taken_away_and_set_again(root):
    refresh.end_training(root)
    training = Training(root)
    training.start()
    assert not refresh.training_ended(root)
    training.index.end()
    assert refresh.training_ended(root)


def test_workers_are_handed_snapshots_and_the_training_goes_on(root):
    training = Training(root, mode="workers")
    assert training.steps(0, 9) == [0] * 9, "nobody works, nobody waits"
    assert refresh.newest_snapshot(root).step in (6, 9)
    training.index.end()  # waits for what is being published
    newest = refresh.newest_snapshot(root)
    assert newest.step == 9
    np.testing.assert_array_equal(
        newest.arrays()["document/dense/kernel"],
        params_of(9)["document"]["dense"]["kernel"],
    )


def test_a_snapshot_is_a_copy(root):
    # The next step takes the memory of the weights that were published.
    training = Training(root, mode="workers", every=1)
    training.start()
    params = params_of(1)
    training.after(1, params)
    params["document"]["dense"]["kernel"].delete()
    training.index.end()
    assert refresh.newest_snapshot(root).step == 1


def test_a_workers_version_is_taken_when_it_is_whole(root):
    training = Training(root, mode="workers")
    training.steps(0, 3)
    training.published(3)
    worker = training.worker()
    for _ in range(training.target.num_shards):
        assert worker.step() is refresh.Did.SHARD
        time.sleep(0.01)
        training.after(3)
        assert training.start(3).version.step == 0, "its shards are not all there"
    assert worker.step() is refresh.Did.VERSION
    training.until(4, 3)
    assert_is(training.start(4), 3)
    assert any(line.startswith("step 4: index of step 3") for line in training.lines)


def test_a_half_written_version_is_not_looked_at(root):
    training = Training(root, mode="workers")
    training.steps(0, 3)
    half = root / "versions" / ".step-00000003.0123456789ab"
    half.mkdir()
    (half / "vectors-00000-of-00003.npy").write_bytes(b"\x93NUMPY")
    for _ in range(5):
        time.sleep(0.01)
        training.after(3)
    assert training.start(3).version.step == 0


def test_a_damaged_version_is_refused_in_one_line(root):
    training = Training(root, mode="workers")
    training.steps(0, 3)
    training.published(3)
    training.work()
    path = root / "versions" / "step-00000003" / "vectors-00000-of-00003.npy"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(5):
        time.sleep(0.01)
        training.after(3)
    assert training.start(3).version.step == 0
    said = [line for line in training.lines if "truncated" in line]
    assert len(said) == 1
    assert "the index in use stays (step 0)" in said[0]


def test_a_flipped_bit_is_found_in_the_thread_that_builds(root):
    training = Training(root, mode="workers")
    training.steps(0, 3)
    training.published(3)
    training.work()
    path = root / "versions" / "step-00000003" / "vectors-00000-of-00003.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    deadline = time.monotonic() + PATIENCE
    while not (said := [line for line in training.lines if "is damaged" in line]):
        assert time.monotonic() < deadline, "it is never noticed"
        time.sleep(0.01)
        training.after(3)
    assert len(said) == 1
    assert str(path) in said[0]
    assert "the index in use stays (step 0)" in said[0]
    assert_is(training.start(3), 0)
    # The next one is taken.
    training.steps(4, 6)
    training.published(6)
    training.work()
    training.until(7, 6)
    assert_is(training.start(7), 6)


def test_an_error_while_publishing_comes_up(root):
    training = Training(root, mode="workers", every=1)
    training.start()

    def publish():
        training.after(1, params_of(1, jnp.bfloat16))
        training.index.end()

    with pytest.raises(ValueError, match="bfloat16; publish it as float32"):
        publish()


def test_the_training_waits_rather_than_ask_what_is_too_stale(root):
    training = Training(root, mode="workers", every=100, max_staleness=3)
    assert training.steps(0, 3) == [0, 0, 0]
    helper = threading.Thread(target=training.work)
    helper.start()
    training.after(4)
    helper.join()
    assert_is(training.start(4), 4)
    assert any("waits for an index of step 1 or later" in x for x in training.lines)


class Asked:
    """Says that SIGTERM came when it was asked so often."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_the_wait_ends_when_the_process_is_told_to_stop(root):
    training = Training(root, mode="workers", every=100, max_staleness=3)
    training.steps(0, 3)
    training.after(4, should_stop=Asked(3))  # returns, though no worker is there
    assert training.start(4).version.step == 0
    saved = carried(training)

    # Where it goes on it waits anew before it takes a step.
    again = Training(root, mode="workers", every=100, max_staleness=3)
    again.index.resume(saved)
    helper = threading.Thread(target=again.work)
    helper.start()
    again.after(4)
    helper.join()
    assert_is(again.start(4), 4)


def test_the_wait_for_a_slow_build_ends_too(root):
    slow, done = threading.Event(), threading.Event()

    def build(vectors):
        if slow.is_set():
            assert done.wait(PATIENCE)
        return build_index(vectors)

    training = Training(root, mode="workers", every=100, max_staleness=3, build=build)
    training.start()
    slow.set()
    helper = threading.Thread(target=training.work)
    helper.start()
    training.after(4, should_stop=lambda: training.index._building is not None)
    helper.join()
    assert training.start(4).version.step == 0
    done.set()
    training.after(4)
    assert_is(training.start(4), 4)


@pytest.mark.parametrize("mode", ["inline", "workers"])
@pytest.mark.parametrize("depth", [0, 1])
def test_no_search_asks_an_index_beyond_the_limit(root, mode, depth):
    limit, more = 3, {"max_staleness": 3, "depth": depth}
    training = Training(root, mode=mode, every=100, **more)
    asked = {0: training.start().version.step}
    helper = threading.Thread(
        target=lambda: training.worker().run(poll_seconds=0.001), daemon=True
    )
    helper.start()
    for step in range(1, 12):
        # What `train.feed` does: the search of a step is `depth` steps ahead.
        training.after(step)
        asked[step + depth] = training.start(step + depth).version.step
    training.index.end()
    helper.join(PATIENCE)
    staleness = [step - version for step, version in asked.items()]
    assert max(staleness) == limit
    assert min(staleness) >= 0


class Damaged:
    """In the place of `open_version`: finds the first so many versions damaged."""

    def __init__(self, times):
        self.whole, self.left, self.steps = refresh.open_version, times, []

    def __call__(self, root, step, **more):
        self.left -= 1
        if self.left >= 0:
            self.steps.append(step)
            raise UserError(f"step {step} is damaged")
        return self.whole(root, step, **more)


@pytest.fixture
def work_on(root):
    """Starts a worker that goes on until the training ends."""
    helpers = []

    def start(training):
        worker = training.worker()
        run = functools.partial(worker.run, poll_seconds=0.001)
        helpers.append(threading.Thread(target=run, daemon=True))
        helpers[-1].start()

    yield start
    refresh.end_training(root)
    for helper in helpers:
        helper.join(PATIENCE)


def test_a_damaged_version_does_not_let_a_step_ask_what_is_too_stale(
    root, monkeypatch, work_on
):
    damaged = Damaged(2)
    monkeypatch.setattr(refresh, "open_version", damaged)
    training = Training(root, mode="workers", every=100, max_staleness=3)
    training.steps(0, 3)
    work_on(training)
    training.after(4)
    assert damaged.steps == [4, 4]
    assert_is(training.start(4), 4)
    said = [line for line in training.lines if "is damaged; the index in use" in line]
    assert len(said) == 2


def test_the_wait_for_a_version_that_is_whole_ends_too(root, monkeypatch, work_on):
    monkeypatch.setattr(refresh, "open_version", Damaged(1_000_000))
    training = Training(root, mode="workers", every=100, max_staleness=3)
    training.steps(0, 3)
    work_on(training)
    training.after(4, should_stop=Asked(20))
    assert training.start(4).version.step == 0


def test_what_another_process_cannot_read_is_used_by_none(root, monkeypatch):
    training = Training(root, mode="workers")
    training.steps(0, 3)
    training.published(3)
    training.work()
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "gather", lambda good: np.asarray([good, False]))
        deadline = time.monotonic() + PATIENCE
        while not (said := [x for x in training.lines if "process 1 of this" in x]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
            training.after(3)
    assert len(said) == 1
    assert "the index in use stays (step 0)" in said[0]
    assert_is(training.start(3), 0)
    # The next one is taken.
    training.steps(4, 6)
    training.published(6)
    training.work()
    training.until(7, 6)


def test_a_newer_index_that_is_too_stale_is_not_enough(root):
    training = Training(root, mode="workers", every=2, max_staleness=4)
    training.steps(0, 3)
    training.published(2)
    training.work()
    helper = threading.Thread(target=training.work)
    helper.start()
    training.after(8)
    helper.join()
    assert_is(training.start(8), 8)


def test_a_slow_build_does_not_make_it_too_stale(root):
    slow = threading.Event()

    def build(vectors):
        if slow.is_set():
            time.sleep(0.3)  # as a large index takes
        return build_index(vectors)

    training = Training(root, mode="workers", every=100, max_staleness=2, build=build)
    training.start()
    slow.set()
    arrays = {"document/dense/kernel": params_of(1)["document"]["dense"]["kernel"]}
    refresh.publish_snapshot(root, 1, arrays, parents=PARENTS)
    training.work()
    training.after(2)
    assert training.start(2).version.step == 0, "it is being built"
    training.after(3)
    assert training.start(3).version.step == 1


def carried(training):
    return json.loads(json.dumps(training.index.carry()))


def must_not_embed(arrays):
    raise AssertionError("the index is there already")


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_training_goes_on_with_the_index_of_its_checkpoint(root, at):
    training = Training(root)
    before = training.steps(0, at)
    saved = carried(training)
    training.steps(at, 9)  # what the kill takes back

    again = Training(root, embed=must_not_embed)
    again.index.resume(saved)
    assert_is(again.start(at), saved["version"])
    steps = [v.name for v in (root / "versions").iterdir()]
    assert max(steps) <= f"step-{at:08d}", "versions of the lost steps are gone"

    again = Training(root)
    again.index.resume(saved)
    assert before + again.steps(at, 9) == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_nothing_carried_starts_from_nothing(root):
    training = Training(root)
    assert training.index.carry() == {}
    training.index.resume({})
    assert_is(training.start(), 0)


def test_indexes_of_checkpoints_outlive_refreshes(root):
    training = Training(root, every=1)
    training.steps(0, 2)
    first = carried(training)
    training.steps(2, 7)
    second = carried(training)
    training.steps(7, 12)
    for saved in (first, second):
        assert refresh.open_version(root, saved["version"]).step == saved["version"]
    # A third checkpoint takes the place of the first, but only when it is whole.
    carried(training)
    training.steps(12, 15)
    assert refresh.open_version(root, first["version"])
    carried(training)
    training.steps(15, 18)
    with pytest.raises(UserError, match="missing"):
        refresh.open_version(root, first["version"])
    assert refresh.open_version(root, second["version"])


def test_the_only_checkpoint_keeps_its_index_until_the_next_is_whole(root):
    training = Training(root, every=1, keep_checkpoints=1)
    training.steps(0, 2)
    first = carried(training)
    training.steps(2, 7)
    carried(training)  # a kill while this one is being written
    training.steps(7, 12)
    again = Training(root, every=1, keep_checkpoints=1)
    again.index.resume(first)
    assert_is(again.start(2), first["version"])


def test_a_swap_reads_the_probes_alone_in_the_loops_thread(root, monkeypatch):
    read, whole = [], ShardedArray.__getitem__

    def spy(vectors, rows):
        found = whole(vectors, rows)
        if threading.current_thread() is threading.main_thread():
            read.append(len(found))
        return found

    monkeypatch.setattr(live_index, "_PROBES", 5)
    training = Training(root, mode="workers", target_overlap=0.5, shortest=1)
    training.steps(0, 3)
    training.index.probe = jnp.ones((4, DIM))
    training.published(3)
    training.work()
    monkeypatch.setattr(ShardedArray, "__getitem__", spy)
    training.until(4, 3)
    assert read == [5, 5], "of the old one and of the new one"
    assert "kept" in training.lines[-1]


def test_after_going_on_the_older_checkpoint_keeps_its_index_too(root):
    training = Training(root, every=1)
    training.steps(0, 2)
    first = carried(training)
    training.steps(2, 4)
    second = carried(training)
    again = Training(root, every=1)
    again.index.resume(second)
    again.steps(4, 9)
    # The newer one turns out to be damaged, and the user deletes it.
    older = Training(root, every=1)
    older.index.resume(first)
    assert_is(older.start(2), 2)


def test_an_index_that_is_gone_is_one_clear_line(root):
    training = Training(root)
    training.steps(0, 4)
    saved = carried(training)
    (root / "versions" / "step-00000003").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"step-00000003.*--config\.name") as error:
        Training(root).index.resume(saved)
    assert "\n" not in str(error.value)


def test_the_index_of_another_training_is_refused(root):
    training = Training(root)
    training.steps(0, 4)
    saved = carried(training)
    # Another one in the same folder has come to the same step with other weights.
    refresh.begin_training(root, step=0)
    refresh.refresh_inline(
        root,
        3,
        {"document/dense/kernel": np.ones(DIM, np.float32)},
        make_embedder,
        training.target,
    )
    with pytest.raises(UserError, match=r"not the index.*--config\.name") as error:
        Training(root).index.resume(saved)
    assert "\n" not in str(error.value)


def test_an_index_of_other_passages_is_refused(root):
    training = Training(root)
    training.steps(0, 4)
    saved = carried(training)
    other = LiveIndex(
        root,
        config=CONFIG,
        settings=RefreshConfig(),
        mode="inline",
        target=RefreshConfig().target(ROWS, {"passages": "b" * 64}),
        make_embedder=must_not_embed,
        build=build_index,
    )
    with pytest.raises(UserError, match="made from passages aaaa") as error:
        other.resume(saved)
    assert "\n" not in str(error.value)


def test_an_adaptive_interval_follows_the_probe_and_is_carried(root):
    adaptive = {"target_overlap": 0.5, "shortest": 1, "longest": 50, "every": 2}

    def started():
        training = Training(root, **adaptive)
        training.index.probe = jnp.ones((4, DIM))
        return training

    training = started()
    training.steps(0, 2)
    [said] = [line for line in training.lines if "top 10 kept" in line]
    interval = training.index.carry()["schedule"]["interval"]
    assert interval in (1, 2, 3, 4)
    assert said.endswith(f"next after {interval} steps")
    saved = carried(training)
    expected = training.steps(2, 14)

    again = started()
    again.index.resume(saved)
    assert again.steps(2, 14) == expected


def test_without_a_probe_the_interval_stays(root):
    training = Training(root, target_overlap=0.5, shortest=1, longest=50)
    assert training.steps(0, 7) == [0, 0, 0, 3, 3, 3, 6]
    assert not any("kept" in line for line in training.lines)
