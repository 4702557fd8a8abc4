"""Who holds a lease, who may take it over, and what a late holder sees."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from realm_retro import atomic, leases


def claim(where, wanted=("shard-00000",), *, owner="me", seconds=60.0):
    return leases.claim_first(where, wanted, owner=owner, seconds=seconds)


def let_expire(path, seconds=120.0):
    """As if the last heartbeat were long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def only(where):
    (path,) = where.glob("*.json")
    return path


def test_a_claimed_lease_is_held_and_says_by_whom(tmp_path):
    name, lease = claim(tmp_path, owner="host-7")
    assert name == "shard-00000"
    assert lease.held()
    body = json.loads(only(tmp_path).read_text())
    assert (body["owner"], body["seconds"]) == ("host-7", 60.0)


def test_the_next_free_one_is_claimed(tmp_path):
    wanted = ["shard-00000", "shard-00001"]
    assert [claim(tmp_path, wanted)[0] for _ in wanted] == wanted
    assert claim(tmp_path, wanted) is None


def test_a_released_lease_is_free(tmp_path):
    _, lease = claim(tmp_path)
    lease.release()
    assert not lease.held()
    assert claim(tmp_path) is not None


def test_an_expired_lease_goes_to_exactly_one(tmp_path):
    _, late = claim(tmp_path)
    let_expire(only(tmp_path))
    taken = []
    barrier = threading.Barrier(8)

    def race():
        barrier.wait()
        taken.append(claim(tmp_path))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [found[1] for found in taken if found]
    assert winner.held()
    assert not late.held()


def test_a_late_heartbeat_does_not_take_the_lease_back(tmp_path):
    _, late = claim(tmp_path, seconds=0.04)
    let_expire(only(tmp_path))
    _, winner = claim(tmp_path)
    with late:
        time.sleep(0.05)  # beats several times
        assert not late.held()
    assert winner.held()
    late.release()
    assert winner.held()


def test_a_finished_lease_still_tells_a_sleeper_that_it_was_succeeded(tmp_path):
    _, sleeper = claim(tmp_path)
    let_expire(only(tmp_path))
    with claim(tmp_path)[1]:
        pass
    assert not sleeper.held()


def test_a_given_up_lease_does_not_revive_a_number(tmp_path):
    _, first = claim(tmp_path)
    let_expire(only(tmp_path))
    _, second = claim(tmp_path)
    second.release()
    # The first is expired again, and whoever comes takes the second number.
    assert claim(tmp_path) is not None
    assert not first.held()


def test_the_heart_keeps_a_lease_alive_and_stops_with_it(tmp_path):
    _, lease = claim(tmp_path, seconds=0.4)
    with lease:
        time.sleep(0.6)
        assert claim(tmp_path) is None
        assert leases.num_live(tmp_path) == 1
    time.sleep(0.5)
    assert leases.num_live(tmp_path) == 0
    assert claim(tmp_path) is not None


def test_expiry_is_what_the_holder_promised(tmp_path):
    claim(tmp_path, seconds=3600.0)
    let_expire(only(tmp_path))
    assert claim(tmp_path, seconds=1.0) is None


CLAIM = """
import pathlib, sys
from realm_retro import leases
folder = pathlib.Path(sys.argv[1])
leases.claim_first(folder, ["shard-00000"], owner="other", seconds=3600.0)
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_process_of_this_host_that_is_gone_holds_nothing(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "claimed\n"
        assert claim(tmp_path) is None
        assert leases.owners(tmp_path, ["shard-00000"]) == {"other"}
        process.kill()
    if leases._machine() is None:
        pytest.skip("no /proc here: a lease has to expire")
    assert leases.owners(tmp_path, ["shard-00000"]) == set()
    assert claim(tmp_path) is not None


def test_a_process_of_another_host_is_not_asked_after(tmp_path):
    claim(tmp_path, seconds=3600.0)
    path = only(tmp_path)
    body = json.loads(path.read_text())
    for machine in ("another", None):
        path.write_text(json.dumps({**body, "machine": machine, "pid": 2**22 + 1}))
        assert claim(tmp_path) is None
    path.write_text(json.dumps({**body, "pid": 2**22 + 1}))
    assert (claim(tmp_path) is None) == (body["machine"] is None)


def test_a_lease_that_cannot_be_read_lives_a_minute(tmp_path):
    path = tmp_path / "shard-00000.0001.json"
    path.write_text("{")
    assert claim(tmp_path) is None
    let_expire(path)
    assert claim(tmp_path) is not None


def test_a_lease_whose_folder_is_gone_is_lost(tmp_path):
    where = tmp_path / "leases"
    where.mkdir()
    with claim(where, seconds=0.04)[1] as lease:
        atomic.discard(where)
        time.sleep(0.03)
        assert not lease.held()
        lease.release()


def test_the_clock_is_the_file_systems(tmp_path):
    assert abs(atomic.clock(tmp_path) - time.time()) < 5
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_placing_is_exclusive_and_whole(tmp_path, links, monkeypatch):
    if not links:

        def refuse(*_):
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    final = tmp_path / "value.json"
    assert atomic.place_json({"by": 1}, final)
    assert not atomic.place_json({"by": 2}, final)
    assert json.loads(final.read_text()) == {"by": 1}
    assert os.listdir(tmp_path) == ["value.json"]
