r"""Runs every stage of RETRO, from text to samples, and prints what came out.

Each stage is a process of its own, so that its seconds and its peak memory are its
own. A stage whose output is there, made with these settings, is not started again;
one that was cut off resumes where it was.

Reads:  what the config names.
Writes: every artefact of the road into the workdir, and quickstart.json (how long
        each stage took, how much memory it held).

Example:
  python -m realm_retro.cli.quickstart \
      --config=configs/retro/quickstart.py --workdir=quickstart
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

import realm_retro
from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.cli import common, processes, quickstart_report
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

LEDGER = "quickstart.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A module under `realm_retro.cli` and the output that shows that it finished.

    Attributes:
      name: the module's name.
      output: file in the workdir, where ``{name}`` is the run's name.
    """

    name: str
    output: str


STAGES = (
    Stage("prepare", "chunks/manifest.json"),
    Stage("embed", "embeddings/manifest.json"),
    Stage("build_index", "index/manifest.json"),
    Stage("find_neighbours", "neighbours/manifest.json"),
    Stage("train", "runs/{name}/manifest.json"),
    Stage("evaluate", "runs/{name}/evaluation.json"),
    Stage("generate", "runs/{name}/generation.json"),
)


class Ledger:
    """What the stages used, kept in the workdir so that a second run can show it.

    An entry holds the fingerprint of the settings and of the stage's output. It counts
    only while both are still the same.
    """

    def __init__(self, workdir: epath.Path, settings: str):
        self._path = workdir / LEDGER
        self._settings = settings
        self.entries: dict[str, JsonDict] = {}
        # It only saves time: a damaged one costs a quick look at every stage.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.entries = dict(json.loads(self._path.read_text())["stages"])

    def finished(self, name: str, output: epath.Path) -> bool:
        """Whether the stage finished with these settings and its output is there."""
        found = fingerprint_of_output(output)
        entry = self.entries.get(name, {})
        return found is not None and (entry.get("settings"), entry.get("output")) == (
            self._settings,
            found,
        )

    def start(self, name: str) -> None:
        """Counts an attempt before it is made, so that a killed one is known."""
        attempts = self.entries.get(name, {}).get("attempts", 0)
        self._put(name, {"attempts": attempts + 1})

    def finish(
        self,
        name: str,
        *,
        before: str | None,
        output: epath.Path,
        usage: processes.Usage,
    ) -> None:
        """Keeps what a stage used and the fingerprint of its output.

        Args:
          name: the stage.
          before: fingerprint of its output before it was started. Where that has not
            changed, the stage only said that it had finished: older numbers stay.
          output: what it wrote.
          usage: what it used.
        """
        found = fingerprint_of_output(output)
        new: JsonDict = {"settings": self._settings, "output": found, "attempts": 0}
        if found != before:
            new["seconds"] = round(usage.seconds, 1)
            new["peak_mb"] = round(usage.peak_mb)
            new["resumed"] = self.entries[name]["attempts"] > 1
        self._put(name, new)

    def _put(self, name: str, values: JsonDict) -> None:
        self.entries[name] = {**self.entries.get(name, {}), **values}
        temporary = self._path.parent / f"{LEDGER}.tmp"
        temporary.write_text(json.dumps({"stages": self.entries}, indent=1))
        temporary.replace(self._path)


def main(config: Any, workdir: epath.Path) -> None:
    """Runs what is not finished, then prints the report."""
    workdir.mkdir(parents=True, exist_ok=True)
    settings = artifacts.fingerprint_of(
        {"config": config_lib.as_dict(config), "version": realm_retro.__version__}
    )

    def command(stage: str) -> list[str]:
        flags = [*sys.argv[1:], *_extra_flags(stage, workdir)]
        return [sys.executable, "-m", f"realm_retro.cli.{stage}", *flags]

    outputs = {
        stage.name: workdir / stage.output.format(name=config.name) for stage in STAGES
    }
    with processes.only_one(workdir) as lock, processes.terminated_like_ctrl_c():
        ledger = Ledger(workdir, settings)
        run_stages(
            outputs,
            command=command,
            ledger=ledger,
            environment=stage_environment(workdir),
            keep_open=lock,
        )
        results = quickstart_report.read(
            workdir, name=config.name, stages=ledger.entries
        )
    common.say(quickstart_report.render(results))


def run_stages(
    outputs: Mapping[str, epath.Path],
    *,
    command: Callable[[str], Sequence[str]],
    ledger: Ledger,
    environment: Mapping[str, str],
    keep_open: int | None = None,
) -> None:
    """Runs the stages that are not finished, in order.

    Args:
      outputs: stage → the file that it writes last.
      command: stage → program and arguments; asked for when the stages before it have
        finished.
      ledger: knows what finished, and takes what was measured.
      environment: of the processes.
      keep_open: a file descriptor that they inherit.

    Raises:
      UserError: a stage failed.
    """
    ran = False
    for number, (name, output) in enumerate(outputs.items(), start=1):
        title = f"[{number}/{len(outputs)}] {name}"
        # What follows a stage that ran must look at its parents again.
        if not ran and ledger.finished(name, output):
            common.say(f"{title}: finished before")
            continue
        ran = True
        common.say(title)
        before = fingerprint_of_output(output)
        words = command(name)
        ledger.start(name)
        usage = processes.run(words, environment=environment, keep_open=keep_open)
        if not output.exists():
            raise UserError(f"stage {name} ended without writing {output}")
        ledger.finish(name, before=before, output=output, usage=usage)


def fingerprint_of_output(output: epath.Path) -> str | None:
    """Hash of the file; None where there is none."""
    return artifacts.sha256(output) if output.exists() else None


def stage_environment(workdir: epath.Path) -> dict[str, str]:
    """The environment of every stage; what the user has set stays as it is."""
    defaults = {
        # A resumed stage need not compile again.
        "JAX_COMPILATION_CACHE_DIR": os.fspath(workdir / ".cache" / "jax"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {**defaults, **os.environ}


def _extra_flags(stage: str, workdir: epath.Path) -> list[str]:
    return [f"--prompt={_held_out_beginning(workdir)}"] if stage == "generate" else []


def _held_out_beginning(workdir: epath.Path) -> str:
    """The first chunk of the first held-out document that has a second one.

    Any language and any corpus has one, the model has never seen it, and as a whole
    chunk it is retrieved for at once.
    """
    from realm_retro.data import chunk_store

    chunks = chunk_store.ChunkStore.open(workdir / "chunks", verify=False)
    held_out = chunks.chunks_of(chunk_store.VALIDATION)
    if not len(held_out):
        return "The"
    documents = chunks.document[held_out]
    goes_on = documents[:-1] == documents[1:]
    first = held_out[int(goes_on.argmax())] if goes_on.any() else held_out[0]
    return chunks.text(int(first)).replace("\0", " ")


def entry() -> None:
    """Console script ``realm-retro-quickstart``."""
    common.run(main, name="quickstart")


if __name__ == "__main__":
    entry()
