"""What a suite works on: the artefacts of a workdir, in a folder that it may spoil."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, processes, quickstart_stages
from realm_retro.cli.benchmarks import children
from realm_retro.typing import Config

# The run's name in a suite's folder.
NAME = "benchmark"
RESULTS = "benchmarks"

# What a training writes beside its run: a suite's folder has its own.
_OWN = {"refresh", "indexes", "runs", RESULTS}
# Files under these never change once they have their name.
_FINAL = {"checkpoints", "snapshots", "versions"}


def changed(config: Config, **sections: Any) -> Config:
    """A copy with other values: ``changed(config, name="b", train={"steps": 9})``."""
    values = config_lib.as_dict(config)
    for name, value in sections.items():
        if isinstance(value, dict):
            value = {**(values.get(name) or {}), **value}
        values[name] = value
    return ml_collections.ConfigDict(values)


def config_file(config: Config, folder: epath.Path) -> epath.Path:
    """Writes a config with all its changes as a file that commands take.

    Args:
      config: of plain values.
      folder: where ``config.py`` is written.
    """
    path = folder / "config.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({config_lib.as_dict(config)!r})\n"
    )
    return path


def log_file(workdir: epath.Path, suite: str) -> epath.Path:
    """An empty file for what the processes of a suite say."""
    folder = workdir / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.log"
    path.write_text("")
    return path


def complete(config: Config, workdir: epath.Path) -> None:
    """Runs the stages that the training of a config needs and that have not finished.

    Raises:
      UserError: a stage failed.
    """
    for stage, output in _stages(config):
        if (workdir / output).exists():
            continue
        common.say(f"{workdir} has no {output.partition('/')[0]}: running {stage}")
        with tempfile.TemporaryDirectory() as folder:
            processes.run(
                [
                    sys.executable,
                    "-m",
                    f"realm_retro.cli.{stage}",
                    f"--config={config_file(config, epath.Path(folder))}",
                    f"--workdir={workdir}",
                ],
                environment=children.environment(workdir / ".cache" / "jax"),
            )


@contextlib.contextmanager
def scratch(
    workdir: epath.Path, names: Sequence[str] | None = None
) -> Iterator[epath.Path]:
    """A workdir that is gone at the end, with the artefacts of another.

    Args:
      workdir: whose artefacts it sees; nothing in it is changed.
      names: of the artefacts; None for all, and for the runs.
    """
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=workdir) as folder:
        place = epath.Path(folder)
        found = workdir.iterdir() if names is None else [workdir / n for n in names]
        for path in found:
            if path.name[0] != "." and path.name not in _OWN and path.is_dir():
                _link(path, place / path.name)
        (place / "runs").mkdir()
        if names is None and (workdir / "runs").exists():
            for run in (workdir / "runs").iterdir():
                if run.name != NAME:
                    _link(run, place / "runs" / run.name)
        yield place


def clone(source: epath.Path, target: epath.Path) -> None:
    """Copies a suite's folder, to go on from the same state again and again.

    Large files that nobody changes are linked where the file system can.
    """

    def copy(one: str, other: str) -> None:
        if _FINAL & set(os.path.relpath(one, source).split(os.sep)):
            with contextlib.suppress(OSError):
                os.link(one, other)
                return
        shutil.copy2(one, other)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def _link(source: epath.Path, target: epath.Path) -> None:
    os.symlink(os.path.realpath(source), target)


def _stages(config: Config) -> list[tuple[str, str]]:
    """(module, output) of what comes before the training, in order."""
    if not quickstart_stages.is_realm(config):
        road = quickstart_stages.retro(config)[:4]
        # A plain decoder retrieves nothing.
        last = len(road) if config.model.get("cca_layers") else 1
        return [(stage.module, stage.output) for stage in road[:last]]
    found = [("prepare", "passages/manifest.json")]
    salient = config_lib.section(config, "pretrain").get("masking", "salient")
    if config.task == "realm_pretrain" and salient == "salient":
        found.append(("tag_spans", "spans/manifest.json"))
    return found


def size(folder: epath.Path) -> int:
    """Bytes of all files of a folder on this machine."""
    # Not epath's own search, which looks into no folder of a folder.
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)
