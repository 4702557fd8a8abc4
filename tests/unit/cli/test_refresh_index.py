"""What the worker's command says, and when it ends."""

import toy_refresh as toy

from realm_retro.cli import refresh_index
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import RefreshConfig

SETTINGS = RefreshConfig(shard_rows=toy.SHARD_ROWS, poll_seconds=0.01)


def work(root, *, make=toy.make_embedder, max_idle_seconds=0.05):
    refresh_index.work(
        root, make, toy.TARGET, SETTINGS, max_idle_seconds=max_idle_seconds
    )


def publish(root, step):
    refresh.publish_snapshot(root, step, toy.arrays(step), parents=toy.PARENTS)


def test_it_says_what_it_did(tmp_path, capsys):
    publish(tmp_path, 7)
    work(tmp_path)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("refresh: 22 passages, worker ")
    assert last.startswith("refresh: 6 shards with 22 vectors (")
    assert last.endswith("1 versions published")


def test_after_the_training_it_says_so_and_ends(tmp_path, capsys):
    publish(tmp_path, 7)
    refresh.end_training(tmp_path)
    work(tmp_path, max_idle_seconds=0)
    assert "training_ended says that the training is over" in capsys.readouterr().out
    assert refresh.newest_version(tmp_path) is None


def test_what_was_dropped_is_counted(tmp_path, capsys):
    def make(weights):
        embed = toy.make_embedder(weights)

        def slow(start, stop):
            if weights["bias"][0] == 0:
                publish(tmp_path, 100)
            return embed(start, stop)

        return slow

    publish(tmp_path, 0)
    work(tmp_path, make=make)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "7 shards with 26 vectors" in last
    assert last.endswith("1 outdated versions dropped")


def test_the_workers_folder_may_not_be_there_yet(tmp_path, capsys):
    work(tmp_path / "w" / "refresh")
    assert "nothing to do for 0 s: this worker ends" in capsys.readouterr().out


def test_a_worker_says_what_it_waits_for(tmp_path, capsys):
    work(tmp_path)
    waits = capsys.readouterr().out.splitlines()[1]
    assert waits == (
        "refresh: waiting for a training to publish a snapshot in"
        f" {tmp_path}/snapshots, for 0.05 s (--max_idle_seconds)"
    )
    publish(tmp_path, 7)
    work(tmp_path)
    assert "waiting" not in capsys.readouterr().out
