"""When the trainer takes a version, keeps it, refuses it, or waits for it."""

import pytest
import toy_refresh as toy

from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import Swapper, Target, folder
from realm_retro.retrieval.refresh import swapper as swapper_module


@pytest.fixture
def root(tmp_path):
    refresh.begin_training(tmp_path)
    return tmp_path


def make_version(root, step, target=toy.TARGET):
    return refresh.refresh_inline(
        root, step, toy.arrays(step), toy.make_embedder, target, report=lambda _: None
    )


def swapper_on(root, *, poll_seconds=0.0, **kwargs):
    said = []
    kwargs = {"parents": toy.PARENTS, **kwargs}
    swapper = Swapper(root, poll_seconds=poll_seconds, report=said.append, **kwargs)
    return swapper, said


def test_a_new_version_is_given_once(root):
    swapper, _ = swapper_on(root)
    assert swapper.poll(0) is None
    first = make_version(root, 0)
    assert swapper.poll(3) == first
    assert swapper.poll(4) is None
    assert swapper.staleness(4) == 4
    second = make_version(root, 5)
    assert swapper.poll(7) == second
    assert swapper.current == second
    assert swapper.staleness(7) == 2


def test_unfinished_work_is_not_given(root):
    refresh.publish_snapshot(root, 0, toy.arrays(0), parents=toy.PARENTS)
    worker = refresh.Worker(root, toy.make_embedder, toy.TARGET, report=lambda _: None)
    swapper, _ = swapper_on(root)
    for _ in range(toy.TARGET.num_shards):
        worker.step()
        assert swapper.poll(0) is None
    worker.step()
    assert swapper.poll(0).step == 0


def test_the_folder_is_looked_at_only_so_often(root):
    swapper, _ = swapper_on(root, poll_seconds=3600.0)
    assert swapper.poll(0) is None
    make_version(root, 0)
    assert swapper.poll(0) is None


def test_versions_of_the_future_are_not_taken(root):
    make_version(root, 50)
    swapper, _ = swapper_on(root)
    assert swapper.poll(49) is None
    assert swapper.poll(50).step == 50


def test_what_is_read_or_held_is_not_deleted(root):
    swapper, _ = swapper_on(root)
    make_version(root, 1)
    swapper.poll(1)
    swapper.hold([1])
    for step in (2, 3):
        make_version(root, step)
    swapper.poll(3)
    for step in (4, 5):
        make_version(root, step)
    assert folder.steps(root / "versions") == [1, 3, 4, 5]
    swapper.poll(5)
    swapper.hold([])
    for step in (6, 7):
        make_version(root, step)
    # 3 was current before 5: it is read until the new index is built.
    assert folder.steps(root / "versions") == [3, 5, 6, 7]
    swapper.adopt(swapper.current)
    assert folder.in_use(root) == {3, 5}
    swapper.poll(7)
    make_version(root, 8)
    assert folder.steps(root / "versions") == [5, 7, 8]


def test_adopting_marks(root):
    swapper, _ = swapper_on(root)
    swapper.adopt(make_version(root, 1))
    for step in (2, 3, 4):
        make_version(root, step)
    assert folder.steps(root / "versions") == [1, 3, 4]


@pytest.mark.parametrize(("damage", "verify"), [("cut", False), ("flip", True)])
def test_a_damaged_version_is_refused_once_and_the_next_one_taken(root, damage, verify):
    swapper, said = swapper_on(root, verify=verify)
    make_version(root, 1)
    swapper.poll(1)
    path = make_version(root, 2).manifest.path(toy.TARGET.names()[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content[: -1 if damage == "cut" else None]))
    assert [swapper.poll(2) for _ in range(3)] == [None] * 3
    (line,) = said
    assert str(path) in line
    assert "the index in use stays (step 1)" in line
    assert swapper.current.step == 1
    make_version(root, 3)
    assert swapper.poll(3).step == 3


def test_a_version_of_other_passages_is_an_error(root):
    make_version(root, 1, Target(num_rows=5, parents={"passages": "b" * 64}))
    swapper, _ = swapper_on(root)
    with pytest.raises(UserError, match="was made from passages bbbbbbbbbbbb, this"):
        swapper.poll(1)


def test_staleness_needs_an_index(root):
    with pytest.raises(ValueError, match="no version"):
        swapper_on(root)[0].staleness(3)


def wait(swapper, root, step, limit, **kwargs):
    published = []

    def publish():
        published.append(step)
        refresh.publish_snapshot(root, step, toy.arrays(step), parents=toy.PARENTS)

    version = swapper.wait_for_fresh(
        step, max_staleness=limit, publish=publish, **kwargs
    )
    return version, published


def finishing(root):
    """A worker that runs each time the trainer looks whether it should stop."""
    worker = refresh.Worker(root, toy.make_embedder, toy.TARGET, report=lambda _: None)

    def should_stop():
        worker.step()
        return False

    return should_stop


def test_fresh_enough_does_not_wait(root):
    swapper, said = swapper_on(root)
    swapper.adopt(make_version(root, 100))
    assert wait(swapper, root, 110, 10) == (None, [])
    assert said == []


def test_a_version_that_lies_ready_is_taken_without_waiting(root):
    swapper, said = swapper_on(root)
    swapper.adopt(make_version(root, 100))
    make_version(root, 105)
    version, published = wait(swapper, root, 111, 10)
    assert (version.step, published, said) == (105, [], [])


def test_too_stale_waits_for_the_snapshot_that_is_there(root):
    swapper, said = swapper_on(root)
    swapper.adopt(make_version(root, 100))
    refresh.publish_snapshot(root, 103, toy.arrays(103), parents=toy.PARENTS)
    version, published = wait(swapper, root, 111, 10, should_stop=finishing(root))
    assert (version.step, published) == (103, [])
    (line,) = said
    assert line.startswith("step 111: waits for an index of step 101 or later")
    assert "of step 100, max_staleness is 10" in line


def test_too_stale_without_a_snapshot_publishes_one(root):
    swapper, said = swapper_on(root)
    version, published = wait(swapper, root, 7, 0, should_stop=finishing(root))
    assert (version.step, published) == (7, [7])
    assert "there is none" in said[0]


def test_waiting_says_that_no_worker_is_there_and_can_be_stopped(root):
    swapper, said = swapper_on(root)
    asked = iter([False, False, True])
    version, _ = wait(swapper, root, 7, 5, should_stop=lambda: next(asked))
    assert version is None
    assert (
        "no worker is alive; start: python -m realm_retro.cli.refresh_index" in said[0]
    )


def damage(version):
    path = version.manifest.path(toy.TARGET.names()[0])
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damaged_at", [7, 5])
def test_a_refused_version_is_not_waited_for(root, damaged_at):
    # Of the step that waits, and of an earlier one that is new enough.
    swapper, said = swapper_on(root)
    swapper.adopt(make_version(root, 0))
    damage(make_version(root, damaged_at))
    asked = iter(range(200))
    work = finishing(root)

    def should_stop():
        work()
        return next(asked) == 199

    version, published = wait(swapper, root, 7, 3, should_stop=should_stop)
    assert published == [7]
    assert version.step == 7
    assert "the index in use stays (step 0)" in said[0]


def test_an_index_that_is_asked_ahead_is_older_by_that(root):
    swapper, said = swapper_on(root)
    swapper.adopt(make_version(root, 100))
    assert wait(swapper, root, 109, 10, ahead=1) == (None, [])
    version, _ = wait(swapper, root, 110, 10, ahead=1, should_stop=finishing(root))
    assert version.step == 110
    assert "step 110: waits for an index of step 101 or later" in said[0]


def test_one_that_follows_takes_what_it_is_told_and_leaves_no_mark(root):
    make_version(root, 1)
    make_version(root, 2)
    swapper, _ = swapper_on(root, marks=False)
    assert swapper.follow(1).step == 1
    assert swapper.current.step == 1
    swapper.hold([2])
    assert folder.in_use(root) == set()


def test_one_that_does_not_see_the_folder_says_so(root, monkeypatch):
    monkeypatch.setattr(swapper_module, "_SEEN_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"step-00000003.*all of them share"):
        swapper_on(root)[0].follow(3)
