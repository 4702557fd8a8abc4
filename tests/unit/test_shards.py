"""Several workers make one stage: every shard once, whatever happens to them."""

import contextlib
import os
import pathlib
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro import artifacts, atomic
from realm_retro.errors import UserError
from realm_retro.shards import Shard, Sharing, Work

SIZE = 4
SHARING = Sharing(lease_seconds=60.0, poll_seconds=0.01)


def parts(rows):
    return [
        Shard(start, min(start + SIZE, rows), (f"ids-{start}.npy", f"x-{start}.npy"))
        for start in range(0, rows, SIZE)
    ]


def content(shard):
    rows = np.arange(shard.start, shard.stop)
    return dict(zip(shard.files, (rows, np.sin(rows, dtype=np.float32)), strict=True))


def open_stage(directory, *, join=True, size=SIZE):
    return artifacts.Stage.open(
        directory,
        kind="things",
        format_version=1,
        config={"size": size},
        parents={},
        made_by="realm_retro.cli.embed",
        join=join,
    )


def work_of(directory, rows, report=print, join=True):
    return Work(
        open_stage(directory, join=join),
        parts(rows),
        label="things",
        unit="rows",
        sharing=SHARING,
        report=report,
    )


def make_all(work):
    for claims in work.rounds():
        for claim in claims:
            work.advance(claim.shard.stop - claim.shard.start)
            work.publish(claim, content(claim.shard), {"rows": len(work.shards)})
    return work.commit(lambda notes: {"notes": len(notes)})


def assert_whole(directory, rows):
    manifest = artifacts.load(
        directory, kind="things", format_version=1, made_by="realm_retro.cli.embed"
    )
    wanted = {name: x for shard in parts(rows) for name, x in content(shard).items()}
    assert manifest.files.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.load(manifest.path(name)), array)
    assert manifest.meta == {"notes": len(parts(rows))}
    assert sorted(os.listdir(directory)) == sorted(
        [artifacts.MANIFEST, artifacts.REQUEST, *wanted]
    )
    return manifest


def let_expire(claim):
    """As if its last heartbeat were long ago."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(claim.lease._path, (0, 0))


def test_threads_make_each_shard_once(tmp_path):
    rows, count = 82, 6
    barrier = threading.Barrier(count)
    works, manifests = [], []

    def run():
        with work_of(tmp_path, rows) as work:
            works.append(work)
            barrier.wait()
            manifests.append(make_all(work))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(tmp_path, rows)
    assert sum(work.totals.shards for work in works) == len(parts(rows))
    assert sum(work.totals.rows for work in works) == rows
    assert sum(work.totals.lost for work in works) == 0
    assert [m is not None for m in manifests].count(True) == 1, "one commits"


class Actor:
    """A worker that is told when to do what, and may fall asleep or die."""

    def __init__(self, directory, rows):
        self.work = work_of(directory, rows, report=lambda line: None)
        self.claims = []
        self.asleep = False

    def claim(self):
        if (claim := self.work.claim()) is not None:
            self.claims.append(claim)

    def publish(self):
        if self.claims:
            claim = self.claims.pop(0)
            self.work.publish(claim, content(claim.shard), {})

    def fall_silent(self):
        """Its heart stops, and its leases are as if that were long ago."""
        self.asleep = True
        for claim in self.claims:
            claim.close(release=False)
            let_expire(claim)

    def awake(self):
        return set() if self.asleep else {claim.number for claim in self.claims}


ACTS = st.sampled_from(["claim", "claim", "publish", "sleep", "die", "leave"])


@given(
    rows=st.integers(1, 4 * SIZE),
    steps=st.lists(st.tuples(st.integers(0, 2), ACTS), max_size=25),
)
@settings(max_examples=25, deadline=None)
def test_any_order_of_joining_sleeping_and_dying(rows, steps):
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        actors = [Actor(directory, rows) for _ in range(3)]
        seen = {}
        for which, act in steps:
            actor = actors[which]
            if act == "claim" and not actor.asleep:
                actor.claim()
            elif act == "publish":  # a sleeper wakes to do it
                actor.publish()
            elif act == "sleep":
                actor.fall_silent()
            elif act == "die":
                actor.fall_silent()
                actors[which] = Actor(directory, rows)
            elif act == "leave":
                actor.work.__exit__()
                actors[which] = Actor(directory, rows)
            held = [actor.awake() for actor in actors]
            assert sum(map(len, held)) == len(set().union(*held)), "a shard held twice"
            for path in directory.glob("*.npy"):
                found = path.stat()
                identity = (found.st_ino, found.st_mtime_ns)
                assert seen.setdefault(path.name, identity) == identity, "written twice"
        for actor in actors:
            actor.fall_silent()
        with work_of(directory, rows) as last:
            make_all(last)
        manifest = (directory / artifacts.MANIFEST).read_bytes()
        for actor in actors:  # sleepers wake when all is over
            while actor.claims:
                actor.publish()
            assert actor.work.commit(lambda notes: {}) is None
            actor.work.__exit__()
        assert (directory / artifacts.MANIFEST).read_bytes() == manifest
        assert_whole(directory, rows)


def test_a_lost_shard_is_counted_and_said(tmp_path):
    said = []
    with work_of(tmp_path, 9, report=said.append) as sleeper:
        claim = sleeper.claim()
        claim.close(release=False)
        let_expire(claim)
        with work_of(tmp_path, 9) as other:
            other.claim()
            assert not sleeper.publish(claim, content(claim.shard), {})
    assert sleeper.totals.lost == 1
    assert said == [
        "things: shard 0 went to another process, this one was silent for more than"
        " 60 s"
    ]


def test_a_shard_that_is_left_is_free_at_once(tmp_path):
    with work_of(tmp_path, 9) as leaver:
        assert [leaver.claim().number for _ in range(2)] == [0, 1]
    with work_of(tmp_path, 9) as other:
        make_all(other)
    assert other.totals.shards == 3


def test_one_waits_for_the_other_and_says_so(tmp_path):
    said = []
    with (
        work_of(tmp_path, 9) as other,
        work_of(tmp_path, 9, report=said.append) as mine,
    ):
        claim = other.claim()
        rounds = mine.rounds()
        for mine_too in next(rounds):
            mine.publish(mine_too, content(mine_too.shard), {})
        assert [*next(rounds)] == []
        assert [*next(rounds)] == []
        other.publish(claim, content(claim.shard), {})
        assert [*rounds] == []
        mine.commit(lambda notes: {"notes": len(notes)})
    (line,) = said
    assert line.startswith(f"things: waiting for 1 shards held by {other.owner};")
    assert_whole(tmp_path, 9)


def test_the_bar_counts_what_all_have_made(tmp_path, capfd):
    with work_of(tmp_path, 9) as idle:
        with work_of(tmp_path, 9) as busy:
            make_all(busy)
        assert make_all(idle) is None
    bars = capfd.readouterr().err.strip().split("\r")
    assert [bar for bar in bars if "9.00/9.00" in bar and "100%" in bar][1:], bars
    assert idle.totals.shards == 0


def test_what_was_made_before_is_not_made_again(tmp_path):
    with work_of(tmp_path, 9) as first:
        claim = first.claim()
        first.publish(claim, content(claim.shard), {})
    with work_of(tmp_path, 9) as second:
        make_all(second)
    assert second.totals.shards == 2
    assert_whole(tmp_path, 9)


def test_a_finished_shard_whose_file_was_deleted_is_made_again(tmp_path):
    with work_of(tmp_path, 9) as first:
        claim = first.claim()
        first.publish(claim, content(claim.shard), {})
    (tmp_path / claim.shard.files[1]).unlink()
    let_expire(claim)
    with work_of(tmp_path, 9) as second:
        make_all(second)
    assert second.totals.shards == 3
    assert_whole(tmp_path, 9)


@pytest.mark.parametrize("torn", [False, True])
def test_a_file_without_a_record(tmp_path, torn):
    """Its writer was killed, or sleeps, between the file and its record."""
    with work_of(tmp_path, 3) as work:
        claim = work.claim()
        array = content(claim.shard)[claim.shard.files[0]]
        # Another device may round another way: theirs was first, and stays.
        np.save(tmp_path / claim.shard.files[0], array[: 2 if torn else 3] + 1)
        work.publish(claim, content(claim.shard), {})
        work.commit(lambda notes: {})
    manifest = artifacts.load(
        tmp_path, kind="things", format_version=1, made_by="realm_retro.cli.embed"
    )
    found = np.load(manifest.path(claim.shard.files[0]))
    np.testing.assert_array_equal(found, array if torn else array + 1)


def test_a_bucket_is_worked_at_by_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "local", lambda path: None)
    with pytest.raises(UserError, match="--join needs a file system with atomic"):
        work_of(tmp_path, 9)
    with work_of(tmp_path, 9, join=False) as work:
        assert make_all(work) is not None
    assert work.totals.shards == 3
    assert_whole(tmp_path, 9)


def test_those_who_come_with_other_settings_are_refused(tmp_path):
    with (
        work_of(tmp_path, 9),
        pytest.raises(UserError, match="size: 4 there, 5 here"),
    ):
        open_stage(tmp_path, size=5)


def test_a_mistake_before_the_first_shard_can_be_mended(tmp_path):
    stage = open_stage(tmp_path, join=False)

    def fail():
        with (
            stage.released_on_error(),
            Work(stage, parts(9), label="things", unit="rows") as work,
        ):
            work.claim()
            raise UserError("this dtype is too narrow")

    with pytest.raises(UserError):
        fail()
    open_stage(tmp_path, size=5)


def test_who_joins_does_not_forget_the_settings_of_others(tmp_path):
    stage = open_stage(tmp_path)
    with pytest.raises(UserError), stage.released_on_error():
        raise UserError("no such folder on this host")
    with pytest.raises(UserError, match="other settings"):
        open_stage(tmp_path, size=5)
