"""What a trainer hands over, and what stays of it."""

import numpy as np
import pytest
import toy_refresh as toy

from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import folder, jobs


def publish(root, step, arrays=None, **kwargs):
    values = toy.arrays(step) if arrays is None else arrays
    return refresh.publish_snapshot(root, step, values, parents=toy.PARENTS, **kwargs)


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_was_published_is_read(tmp_path):
    arrays = {
        "query/kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "count": np.array(3, np.int32),
        "half": np.ones(2, np.float16),
    }
    written = publish(tmp_path, 7, arrays, meta={"schedule": {"last": 7}})
    read = refresh.newest_snapshot(tmp_path, parents=toy.PARENTS)
    assert read == written
    assert (read.step, read.meta) == (7, {"schedule": {"last": 7}})
    found = read.arrays()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_there_may_be_none(tmp_path):
    assert refresh.newest_snapshot(tmp_path / "nowhere") is None


def test_newest_of_those_up_to_a_step(tmp_path):
    for step in (5, 100, 30):
        publish(tmp_path, step, keep=9)
    assert refresh.newest_snapshot(tmp_path).step == 100
    assert refresh.newest_snapshot(tmp_path, at_most=99).step == 30
    assert refresh.newest_snapshot(tmp_path, at_most=4) is None


def test_a_half_written_snapshot_is_not_seen(tmp_path):
    private = tmp_path / "snapshots" / folder.private_name(3)
    private.mkdir(parents=True)
    (private / "params.safetensors").write_bytes(b"half")
    assert refresh.newest_snapshot(tmp_path) is None
    publish(tmp_path, 4)
    assert not private.exists(), "the next one sweeps it away"


def test_a_dtype_without_a_name_in_the_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="w has dtype complex128"):
        publish(tmp_path, 1, {"w": np.zeros(2, complex)})
    assert not list((tmp_path / "snapshots").iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_a_damaged_snapshot_is_refused(tmp_path, damage):
    path = publish(tmp_path, 3).manifest.path("params.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "cut":
        path.write_bytes(bytes(content[:-1]))
    else:
        path = path.parent / "manifest.json"
        path.write_text(path.read_text().replace("{", "", 1))
    assert str(path) in refusal(refresh.newest_snapshot, tmp_path)


def test_a_snapshot_of_other_passages_is_refused(tmp_path):
    publish(tmp_path, 3)
    wanted = {"passages": "b" * 64}
    message = refusal(refresh.newest_snapshot, tmp_path, parents=wanted)
    assert "was made from passages aaaaaaaaaaaa" in message


def test_the_same_again_changes_nothing(tmp_path):
    first = publish(tmp_path, 3)
    before = first.manifest.directory.stat().mtime
    assert publish(tmp_path, 3) == first
    assert first.manifest.directory.stat().mtime == before


def test_others_at_the_same_step_replace_it_and_what_was_made_of_it(tmp_path):
    first = publish(tmp_path, 3)
    job = jobs.begin(tmp_path, first, toy.TARGET, must_finish=False)
    (tmp_path / "versions" / "step-00000003").mkdir(parents=True)
    second = publish(tmp_path, 3, toy.arrays(4))
    assert second.fingerprint != first.fingerprint
    np.testing.assert_array_equal(second.arrays()["bias"], toy.arrays(4)["bias"])
    assert not job.directory.exists()
    assert not (tmp_path / "versions" / "step-00000003").exists()


def test_the_newest_stay_and_those_in_work(tmp_path):
    begun = publish(tmp_path, 1)
    jobs.begin(tmp_path, begun, toy.TARGET, must_finish=False)
    for step in (2, 3, 4):
        publish(tmp_path, step, keep=2)
    assert folder.steps(tmp_path / "snapshots") == [1, 3, 4]


def test_a_training_that_goes_on_forgets_its_earlier_future(tmp_path):
    for step in (50, 100, 150):
        publish(tmp_path, step, keep=9)
        jobs.begin(
            tmp_path,
            refresh.open_snapshot(tmp_path, step),
            toy.TARGET,
            must_finish=False,
        )
    for step in (50, 100, 150):
        (tmp_path / "versions" / folder.step_name(step)).mkdir(parents=True)
    refresh.end_training(tmp_path)
    assert refresh.training_ended(tmp_path)
    refresh.begin_training(tmp_path, step=100)
    assert not refresh.training_ended(tmp_path)
    assert folder.steps(tmp_path / "snapshots") == [50, 100]
    assert folder.steps(tmp_path / "versions") == [50, 100]
    assert [step for step, _ in folder.jobs(tmp_path)] == [50, 100]


def test_a_bucket_is_refused():
    message = refusal(refresh.newest_snapshot, "gs://bucket/w/refresh")
    assert "shared file system" in message


def test_a_damaged_mark_is_named(tmp_path):
    refresh.mark_using(tmp_path, [3], owner="trainer")
    assert folder.in_use(tmp_path) == {3}
    path = tmp_path / "using" / "trainer.json"
    for text in ("[", "[" * 100_000, '{"steps": [Infinity]}'):
        path.write_text(text)
        assert str(path) in refusal(folder.in_use, tmp_path)
