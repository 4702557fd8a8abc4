"""A refresh in one call: it returns the version, or says why there will be none."""

import pytest
import toy_refresh as toy

from realm_retro import atomic
from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import folder, snapshots


def refreshed(root, step, **settings):
    return refresh.refresh_inline(
        root,
        step,
        toy.arrays(step),
        toy.make_embedder,
        toy.TARGET,
        poll_seconds=0.001,
        report=lambda _: None,
        **settings,
    )


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_its_own_snapshot_cannot_be_read_back(tmp_path, monkeypatch, damage):
    publish = snapshots.publish_snapshot

    def on_a_bad_disk(*args, **kwargs):
        snapshot = publish(*args, **kwargs)
        path = snapshot.manifest.path("params.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        if damage == "remove":
            atomic.discard(tmp_path / "snapshots" / folder.step_name(3))
        return snapshot

    monkeypatch.setattr(snapshots, "publish_snapshot", on_a_bad_disk)
    with pytest.raises(UserError, match="step-00000003") as error:
        refreshed(tmp_path, 3)
    assert "\n" not in str(error.value)


def test_a_newer_version_is_of_an_earlier_life(tmp_path):
    refreshed(tmp_path, 5)
    atomic.discard(tmp_path / "snapshots" / folder.step_name(5))
    with pytest.raises(ValueError, match="versions of step 5, after 3; call begin"):
        refreshed(tmp_path, 3)
    refresh.begin_training(tmp_path, step=3)
    assert refreshed(tmp_path, 3).step == 3


def finished(root, arrays, parents=toy.PARENTS):
    return refresh.finished_version(root, 3, arrays, parents=parents)


def test_a_finished_version_is_of_the_same_weights_and_passages(tmp_path):
    assert finished(tmp_path, toy.arrays(3)) is None
    version = refreshed(tmp_path, 3)
    assert finished(tmp_path, toy.arrays(3)) == version
    assert finished(tmp_path, toy.arrays(4)) is None
    assert finished(tmp_path, toy.arrays(3), {"passages": "b" * 64}) is None


@pytest.mark.parametrize("again", [finished, lambda root, arrays: refreshed(root, 3)])
def test_a_finished_version_with_a_flipped_bit_is_refused(tmp_path, again):
    path = refreshed(tmp_path, 3).manifest.path(toy.TARGET.names()[1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: is damaged .*; delete {tmp_path}"):
        again(tmp_path, toy.arrays(3))
