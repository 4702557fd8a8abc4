"""One worker, step by step: what it chooses, publishes, refuses and leaves behind."""

import os

import numpy as np
import pytest
import toy_refresh as toy

from realm_retro import atomic
from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import Did, Target, Worker, folder, jobs, versions


@pytest.fixture
def root(tmp_path):
    refresh.begin_training(tmp_path)
    return tmp_path


def publish(root, step, **kwargs):
    return refresh.publish_snapshot(
        root, step, toy.arrays(step), parents=toy.PARENTS, **kwargs
    )


def worker_on(root, make=toy.make_embedder, target=toy.TARGET, **kwargs):
    said = []
    worker = Worker(root, make, target, report=said.append, **kwargs)
    return worker, said


def work(worker):
    """Everything that there is to do; the number of calls that did something."""
    count = 0
    while worker.step() in (Did.SHARD, Did.VERSION):
        count += 1
    return count


def assert_version(root, step, target=toy.TARGET):
    version = refresh.newest_version(root, parents=target.parents)
    assert version.step == step
    vectors = refresh.load_vectors(version)
    assert (vectors.shape, vectors.dtype) == (version.shape, target.dtype)
    wanted = toy.expected(step, target.num_rows).astype(target.dtype)
    np.testing.assert_array_equal(vectors[:], wanted)
    return version


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# One version after the other


def test_a_snapshot_becomes_a_version(root):
    snapshot = publish(root, 100)
    worker, said = worker_on(root)
    assert refresh.newest_version(root) is None
    assert work(worker) == toy.TARGET.num_shards + 1
    version = assert_version(root, 100)
    assert version.manifest.parents == {
        **toy.PARENTS,
        "snapshot": snapshot.fingerprint,
    }
    assert (worker.totals.shards, worker.totals.rows) == (6, toy.ROWS)
    assert said[0] == "embedding with the snapshot of step 100"
    assert said[1].startswith("index of step 100: 22 vectors in")
    assert not os.listdir(root / "building")
    assert os.listdir(root / "versions") == ["step-00000100"]


def test_without_a_snapshot_there_is_nothing_to_do(root):
    worker, said = worker_on(root)
    assert worker.step() is Did.NOTHING
    assert said == []


@pytest.mark.parametrize("rows", [1, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_number_of_rows(root, rows, dtype):
    target = Target(num_rows=rows, parents=toy.PARENTS, dtype=dtype, shard_rows=4)
    publish(root, 1)
    work(worker_on(root, target=target)[0])
    assert assert_version(root, 1, target).shape == (rows, toy.DIM)


def test_the_newest_snapshot_is_taken_and_older_ones_never_again(root):
    for step in (100, 200):
        publish(root, step)
    worker, _ = worker_on(root)
    work(worker)
    assert folder.steps(root / "versions") == [200]
    assert worker.step() is Did.NOTHING


def test_between_shards_it_turns_to_the_newest(root):
    publish(root, 100)
    worker, said = worker_on(root)
    assert worker.step() is Did.SHARD
    publish(root, 200)
    work(worker)
    assert folder.steps(root / "versions") == [200]
    assert "step 100 is outdated: dropped with 1 of 6 shards" in said
    assert worker.totals.dropped == 1
    assert not os.listdir(root / "building")


def test_snapshots_that_come_faster_than_versions_do_not_starve_it(root):
    worker, _ = worker_on(root)
    made = []
    for step in range(100, 100 + 40):
        publish(root, step)
        if worker.step() is Did.VERSION:
            made.append(refresh.newest_version(root).step)
    # One is dropped, the next one finished: 7 calls each, and one for the dropped.
    assert made == [101, 109, 117, 125, 133]
    assert_version(root, 133)


def test_another_worker_finishes_what_has_to_be_finished(root):
    first, _ = worker_on(root)
    publish(root, 100)
    first.step()
    publish(root, 200)
    first.step()  # drops 100: from now on 200 is finished in any case
    for step in (300, 400, 500):
        publish(root, step)
    other, said = worker_on(root)
    work_until_version(other)
    assert_version(root, 200)
    assert said[0] == "embedding with the snapshot of step 200"
    work(other)
    assert_version(root, 500)


def work_until_version(worker):
    while worker.step() is not Did.VERSION:
        pass


# Several workers


def test_workers_join_and_share(root):
    publish(root, 100)
    workers = [worker_on(root)[0] for _ in range(3)]
    busy = True
    while busy:
        busy = [w for w in workers if w.step() in (Did.SHARD, Did.VERSION)]
    assert [w.totals.shards for w in workers] == [2, 2, 2]
    assert sum(w.totals.versions for w in workers) == 1
    assert_version(root, 100)


def test_a_shard_that_another_published_meanwhile_is_counted(root):
    publish(root, 100)
    first, _ = worker_on(root)

    def make(weights):
        def embed(start, stop):
            if start == 0:
                # The other believes that this one is dead.
                for lease in root.rglob("shard-00000.*.json"):
                    os.utime(lease, (0, 0))
                assert first.step() is Did.SHARD
            return toy.make_embedder(weights)(start, stop)

        return embed

    second, said = worker_on(root, make)
    work(second)
    assert second.totals.lost == 1
    assert any("shard-00000 went to another worker" in line for line in said)
    assert_version(root, 100)


def test_the_second_publication_of_a_shard_changes_nothing(root):
    job = jobs.begin(root, publish(root, 1), toy.TARGET, must_finish=False)
    ours, theirs = toy.expected(1)[:4], toy.expected(2)[:4]
    assert job.publish(0, ours, held=lambda: True) == "published"
    assert job.publish(0, theirs, held=lambda: True) == "duplicate"
    assert job.publish(1, theirs, held=lambda: False) == "lost"
    assert job.missing() == [1, 2, 3, 4, 5]
    assert not [n for n in os.listdir(job.directory) if n.startswith(".")]
    np.testing.assert_array_equal(np.load(job.directory / toy.TARGET.names()[0]), ours)


def test_a_shard_for_a_finished_job_goes_nowhere(root):
    job = jobs.begin(root, publish(root, 1), toy.TARGET, must_finish=False)
    work(worker_on(root)[0])
    with pytest.raises(jobs.Superseded):
        job.publish(0, toy.expected(1)[:4], held=lambda: True)
    with pytest.raises(jobs.Superseded):
        jobs.begin(root, refresh.open_snapshot(root, 1), toy.TARGET, must_finish=False)
    assert not os.listdir(root / "building")


def test_two_that_publish_the_same_version_publish_one(root):
    snapshot = publish(root, 1)
    job = jobs.begin(root, snapshot, toy.TARGET, must_finish=False)
    for shard in job.missing():
        start, stop = toy.TARGET.rows(shard)
        job.publish(shard, toy.expected(1)[start:stop], held=lambda: True)

    def once(by):
        return versions.publish_version(
            root,
            1,
            toy.TARGET,
            shards=job.directory,
            snapshot_fingerprint=snapshot.fingerprint,
            meta={"published_by": by},
        )

    assert [once("a"), once("b")] == [True, False]
    assert assert_version(root, 1).manifest.meta["published_by"] == "a"
    assert os.listdir(root / "versions") == ["step-00000001"]


def test_a_half_written_shard_does_not_count(root):
    job = jobs.begin(root, publish(root, 1), toy.TARGET, must_finish=False)
    (job.directory / f".{toy.TARGET.names()[0]}.0123456789ab").write_bytes(b"half")
    assert job.missing() == list(range(6))
    work(worker_on(root)[0])
    assert_version(root, 1)


def test_other_settings_in_the_same_folder_are_refused(root):
    publish(root, 1)
    worker_on(root)[0].step()
    target = Target(num_rows=toy.ROWS, parents=toy.PARENTS, dim=toy.DIM, shard_rows=5)
    message = refusal(worker_on(root, target=target)[0].step)
    assert "another worker makes shard_rows=4, this one 5" in message


def test_shards_of_different_widths_are_refused(root):
    publish(root, 1)
    target = Target(num_rows=8, parents=toy.PARENTS, shard_rows=4)

    def make(_):
        return lambda start, stop: np.zeros((stop - start, 2 + start), np.float32)

    message = refusal(work, worker_on(root, make, target)[0])
    assert "start all with the same --config" in message
    assert refresh.newest_version(root) is None


# What is refused


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(root, value):
    publish(root, 1)

    def make(_):
        return lambda start, stop: np.full((stop - start, toy.DIM), value, np.float32)

    worker, _ = worker_on(root, make)
    message = refusal(worker.step)
    assert "the embedder of step 1 gives vectors that are not finite" in message
    assert "4 of rows 0…3, the first is 0" in message
    assert not list(root.rglob("shard-*.json")), "the lease was given back"


def test_vectors_too_large_for_the_dtype_are_refused(root):
    publish(root, 1)
    target = Target(num_rows=4, parents=toy.PARENTS, dtype="float16")

    def make(_):
        return lambda start, stop: np.full((stop - start, toy.DIM), 1e5, np.float32)

    assert "config.refresh.dtype=float16" in refusal(
        worker_on(root, make, target)[0].step
    )


@pytest.mark.parametrize("shape", [(3, toy.DIM), (4, 5)])
def test_an_embedder_of_another_shape_is_a_bug(root, shape):
    publish(root, 1)
    worker, _ = worker_on(root, lambda _: lambda start, stop: np.zeros(shape))
    with pytest.raises(ValueError, match="the embedder gave"):
        worker.step()


def test_a_snapshot_of_other_passages_ends_the_worker(root):
    refresh.publish_snapshot(root, 1, toy.arrays(1), parents={"passages": "b" * 64})
    message = refusal(worker_on(root)[0].step)
    assert "passages bbbbbbbbbbbb, this worker has aaaaaaaaaaaa" in message


def test_a_damaged_snapshot_is_passed_over_once(root):
    path = publish(root, 100).manifest.path("params.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of a number: the file is read without an error
    path.write_bytes(bytes(content))
    worker, said = worker_on(root)
    assert [worker.step() for _ in range(3)] == [Did.NOTHING] * 3
    (line,) = said
    assert line.endswith("waiting for another snapshot")
    assert worker.totals.refused == 1
    publish(root, 100)  # the trainer goes on from a checkpoint and publishes it anew
    work(worker)
    assert_version(root, 100)


def test_no_passages_are_refused():
    assert "no passage" in refusal(Target, num_rows=0, parents={})


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_version_is_refused(root, damage):
    publish(root, 1)
    work(worker_on(root)[0])
    path = refresh.newest_version(root).manifest.path(toy.TARGET.names()[2])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content[: -1 if damage == "cut" else None]))
    assert str(path) in refusal(refresh.newest_version, root)


# What stays


def test_the_newest_versions_stay_and_those_in_use(root):
    worker, _ = worker_on(root, keep=2)
    for step in (1, 2, 3, 4):
        publish(root, step)
        work(worker)
        if step == 1:
            refresh.mark_using(root, [1], owner="trainer")
    assert folder.steps(root / "versions") == [1, 3, 4]
    refresh.mark_using(root, [], owner="trainer")
    publish(root, 5)
    work(worker)
    assert folder.steps(root / "versions") == [4, 5]


def test_open_vectors_outlive_their_version(root):
    publish(root, 1)
    work(worker_on(root)[0])
    vectors = refresh.load_vectors(refresh.newest_version(root))
    atomic.discard(root / "versions" / "step-00000001")
    np.testing.assert_array_equal(vectors[:], toy.expected(1))


def test_leftovers_of_the_killed_are_swept(root):
    old = root / "versions" / folder.private_name(1)
    new = root / "versions" / folder.private_name(900)
    for private in (old, new, root / "building" / ".trash-0123"):
        private.mkdir()
    publish(root, 1)
    work(worker_on(root)[0])
    assert not old.exists()
    assert not (root / "building" / ".trash-0123").exists()
    assert new.exists(), "somebody may be at work on it"


# The life of a worker


def test_it_runs_until_the_training_ends(root):
    publish(root, 1)
    calls = []

    def make(weights):
        def embed(start, stop):
            calls.append(start)
            if start == 8:
                refresh.end_training(root)
            return toy.make_embedder(weights)(start, stop)

        return embed

    worker, said = worker_on(root, make)
    worker.run(poll_seconds=0.001)
    assert calls == [0, 4, 8]
    assert said[-1] == "the training has ended: this worker ends"


def test_it_ends_when_nothing_happens(root):
    publish(root, 1)
    worker, said = worker_on(root)
    worker.run(max_idle_seconds=0.05, poll_seconds=0.005)
    assert_version(root, 1)
    assert "this worker ends" in said[-1]


# In the trainer's process


def inline(root, step, make=toy.make_embedder, **kwargs):
    return refresh.refresh_inline(
        root, step, toy.arrays(step), make, toy.TARGET, report=lambda _: None, **kwargs
    )


def test_inline_is_the_same_in_one_call(root):
    version = inline(root, 100, meta={"x": 1})
    assert version.manifest == assert_version(root, 100).manifest
    assert refresh.newest_snapshot(root).meta == {"x": 1}
    assert inline(root, 200).step == 200


def test_inline_does_not_make_a_version_twice(root):
    first = inline(root, 100)

    def make(_):
        raise AssertionError("embeds again")

    assert inline(root, 100, make) == first


def test_inline_goes_on_where_it_was_cut_off(root):
    calls = []

    def make(weights):
        def embed(start, stop):
            calls.append(start)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return toy.make_embedder(weights)(start, stop)

        return embed

    with pytest.raises(KeyboardInterrupt):
        inline(root, 100, make)
    inline(root, 100, make)
    assert calls == [0, 4, 8, 12, 12, 16, 20]
    assert_version(root, 100)


def test_inline_does_not_work_in_the_past(root):
    publish(root, 200)
    with pytest.raises(ValueError, match="begin_training"):
        inline(root, 100)
