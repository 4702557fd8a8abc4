"""Programs in one process or in several on loopback, as launchers start `cli.train`."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import toy_pretraining

from realm_retro.parallel import hosts
from realm_retro.train.checkpoint import FOLDER

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 300.0
# Connections of the collectives, which the library tells of by itself.
_CHATTER = ("[Gloo]",)


def environments(folder, *, processes, devices):
    """What the launchers set, for each process: how it finds the others.

    Args:
      folder: where compiled programs are kept, for all that are started there.
      processes: how many there are.
      devices: of all together.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **toy_pretraining.quick(folder),
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "PYTHONUNBUFFERED": "1",
    }
    if processes == 1:
        return [common]
    common |= {
        hosts.COORDINATOR: f"localhost:{port}",
        hosts.NUM_PROCESSES: str(processes),
    }
    return [{**common, hosts.PROCESS_ID: str(i)} for i in range(processes)]


def command(folder, config, workdir):
    """The words of a training; writes its config file."""
    path = toy_pretraining.write_config(folder / f"{config.name}.py", config)
    words = [sys.executable, "-m", "realm_retro.cli.train"]
    return [*words, f"--config={path}", f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True)
class Running:
    """The processes of one program, and where their output goes."""

    processes: list[subprocess.Popen]
    logs: list[pathlib.Path]

    def said(self, index=0):
        """What a process has printed so far, errors included."""
        lines = self.logs[index].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(_CHATTER))

    def until(self, condition):
        """Waits for something that they do; none of them must end before."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.said(index)
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return found

    def terminate(self, index=-1):
        """SIGTERM to one of them."""
        self.processes[index].send_signal(signal.SIGTERM)

    def finish(self, status=0):
        """Waits for the end of all; returns what each has said."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        said = [self.said(index) for index in range(len(self.processes))]
        found = [process.poll() for process in self.processes]
        assert found == [status] * len(found), "\n".join(said)
        return said


@contextlib.contextmanager
def launcher(folder):
    """Yields what starts a program; none of its processes outlives the block."""
    started = []

    def start(words, *, processes, devices):
        logs = [folder / f"{len(started)}.{i}.log" for i in range(processes)]
        common = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = Running([], logs)
        started.append(running)
        every = environments(folder, processes=processes, devices=devices)
        for log, environment in zip(logs, every, strict=True):
            with log.open("w") as output:
                running.processes.append(
                    subprocess.Popen(
                        words,
                        env={**common, **environment},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return running

    try:
        yield start
    finally:
        for process in (p for running in started for p in running.processes):
            process.kill()
            process.wait()


def newest_checkpoint(config, workdir):
    """Step of the newest whole checkpoint; 0 where there is none."""
    folder = toy_pretraining.run_dir(config, workdir) / FOLDER
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)
