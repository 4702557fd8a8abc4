"""A process beside a stage: it is started again, given up, and never left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from realm_retro.cli import processes
from realm_retro.errors import UserError


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def counting(path, then):
    """Adds its number to a file, a line each, and goes on with `then`."""
    return python(
        f"import os, sys, time, signal\nf = open({str(path)!r}, 'a')\n"
        f"f.write(str(os.getpid()) + '\\n')\nf.close()\n{then}"
    )


def until_lines(path, count):
    """A stage that ends when the file has so many lines."""
    return python(
        f"""
        import os, time
        path = {str(path)!r}
        while not os.path.exists(path) or len(open(path).readlines()) < {count}:
            time.sleep(0.01)
        """
    )


def run(stage, beside, **settings):
    quick = {"pause_seconds": 0.05, "grace_seconds": 0.05, **settings}
    companion = processes.Companion(beside, **quick)
    processes.run(stage, companion=companion)
    return companion


def is_gone(path):
    for line in path.read_text().splitlines():
        try:
            os.kill(int(line), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_it_ends_with_the_stage(tmp_path):
    path = tmp_path / "started"
    started = time.monotonic()
    companion = run(until_lines(path, 1), counting(path, "time.sleep(600)"))
    assert time.monotonic() - started < 60
    assert len(path.read_text().splitlines()) == 1
    assert is_gone(path)
    assert companion.peak_mb > 1
    assert companion.error is None


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("", ""),
        ("sys.exit(3)", "failed (exit status 3) for the reason above; it is started"),
        ("os.kill(os.getpid(), 9)", "was killed, perhaps for memory; it is started"),
    ],
)
def test_one_that_ends_is_started_again(tmp_path, capsys, then, said):
    path = tmp_path / "started"
    run(until_lines(path, 2), counting(path, then), tries=9)
    assert len(path.read_text().splitlines()) >= 2
    assert is_gone(path)
    shown = capsys.readouterr().out
    assert said in shown
    assert bool(shown) == bool(said)


def test_one_that_fails_again_and_again_ends_the_stage(tmp_path):
    path = tmp_path / "started"
    with pytest.raises(
        UserError, match=r"failed \(exit status 3\).*, 3 times"
    ) as error:
        run(python("import time; time.sleep(600)"), counting(path, "sys.exit(3)"))
    assert "\n" not in str(error.value)
    assert len(path.read_text().splitlines()) == 3


def test_a_stage_that_fails_ends_it_too(tmp_path):
    path = tmp_path / "started"
    stage = [
        *until_lines(path, 1)[:2],
        until_lines(path, 1)[2] + "\nraise SystemExit(2)",
    ]
    with pytest.raises(UserError, match="exit status 2"):
        run(stage, counting(path, "time.sleep(600)"))
    assert is_gone(path)


def test_one_that_is_about_to_end_is_not_interrupted(tmp_path):
    path, end = tmp_path / "started", tmp_path / "end"
    then = f"time.sleep(1); open({str(end)!r}, 'w').close()"
    run(until_lines(path, 1), counting(path, then), grace_seconds=60.0)
    assert end.exists()


def test_ctrl_c_ends_both(tmp_path):
    path = tmp_path / "started"
    code = f"""
        import signal, sys
        from realm_retro.cli import processes
        signal.signal(signal.SIGINT, signal.default_int_handler)
        long = {counting(path, "time.sleep(600)")!r}
        companion = processes.Companion(long)
        with processes.terminated_like_ctrl_c():
            try:
                processes.run(long, companion=companion)
            except KeyboardInterrupt:
                sys.exit(130)
    """
    with subprocess.Popen(python(code)) as driver:
        while not path.exists() or len(path.read_text().splitlines()) < 2:
            time.sleep(0.01)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 130
    assert is_gone(path)


def test_a_stage_that_does_not_end_is_killed(tmp_path):
    path = tmp_path / "started"
    stubborn = counting(path, "signal.signal(15, signal.SIG_IGN); time.sleep(600)")
    code = f"""
        import sys
        from realm_retro.cli import processes
        processes._GRACE_SECONDS, processes._END_SECONDS = 0.5, 0.5
        with processes.terminated_like_ctrl_c():
            try:
                processes.run({stubborn!r})
            except KeyboardInterrupt:
                sys.exit(130)
    """
    with subprocess.Popen(python(code)) as driver:
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 130
    assert is_gone(path)
