"""Processes of a benchmark: measured by what they hold, and never left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from realm_retro.cli.benchmarks import children, tied
from realm_retro.errors import UserError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")


@pytest.fixture
def program(tmp_path):
    """Writes a module; gives what `children` needs to run it."""

    def write(code):
        (tmp_path / "program.py").write_text(textwrap.dedent(code))
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        env = children.environment(extra={"PYTHONPATH": path})
        return {"command": ["program"], "log": tmp_path / "log", "env": env}

    return write


@LINUX
def test_memory_is_of_the_process_alone(program):
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    little = children.measured(**program("import time; time.sleep(0.1)"))
    assert 1 < little.peak_mb < 60, "not what this process holds"
    much = children.measured(
        **program(
            """
            import time
            held = b"x" * (100 << 20)
            time.sleep(0.1)
            del held
            time.sleep(0.1)
            """
        )
    )
    assert 100 < much.peak_mb < 170
    assert 100 < much.own_mb <= much.peak_mb
    assert much.seconds > 0.2
    del held


@LINUX
def test_mapped_files_are_not_its_own(program, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (80 << 20))
    used = children.measured(
        **program(
            f"""
            import mmap, time
            with open({str(tmp_path / "file")!r}) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            sum(mapped[::4096])
            time.sleep(0.1)
            """
        )
    )
    assert used.peak_mb > 80
    assert used.own_mb < used.peak_mb - 70


def test_a_failure_is_told_in_its_own_words(program, tmp_path):
    known = program("import sys; print('as expected'); sys.exit('x: error: no disk')")
    for run in (children.measured, children.timeline):
        with pytest.raises(UserError) as caught:
            run(**known)
        assert "program ended with status 1: x: error: no disk" in str(caught.value)
        assert "as expected" in (tmp_path / "log").read_text()


def test_lines_are_timed(program):
    lines = children.timeline(
        **program(
            """
            import time
            print("one", flush=True)
            time.sleep(0.3)
            print("two", flush=True)
            """
        )
    )
    assert [line.text for line in lines] == ["one", "two"]
    assert 0.25 < lines[1].seconds - lines[0].seconds < 20
    assert children.first(lines, "wo") == lines[1].seconds
    with pytest.raises(UserError, match="never said 'three'"):
        children.first(lines, "three")


ENDLESS = "import time\nprint('here', flush=True)\nwhile True: time.sleep(0.1)"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_ends_with_its_block(program, stopped):
    known = program(ENDLESS)
    with children.started(**known, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "here\n"
        if stopped:
            process.send_signal(signal.SIGSTOP)
    assert process.returncode == -signal.SIGTERM


@LINUX
def test_a_process_stays_on_its_cpus(program):
    one = max(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)), flush=True)"
    with children.started(
        **program(code), cpus=[one], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.read() == f"[{one}]\n"
        process.wait()


@LINUX
def test_not_even_a_killed_parent_leaves_a_process(program, tmp_path):
    env = program(ENDLESS)["env"]
    (tmp_path / "parent.py").write_text(
        f"import subprocess, sys, signal\n"
        f"words = [sys.executable, '-m', {tied.__name__!r}, 'any', 'program']\n"
        f"child = subprocess.Popen(words, stdout=subprocess.PIPE)\n"
        f"child.stdout.readline()\n"
        f"child.send_signal(signal.SIGSTOP)\n"
        f"print(child.pid, flush=True)\n"
        f"child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.02)


def is_running(pid):
    """Whether it lives; one that ended may wait for somebody to take notice."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
