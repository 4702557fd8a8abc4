r"""Runs every stage of a config's road, and prints what came out.

RETRO goes from text to samples. REALM, chosen by config.task, goes from text to
questions that are answered with evidence; its training is kept company by a process
of refresh_index, and the config's variants (the word after the colon of --config) are
its runs. Text of one's own has no questions: REALM then ends after pre-training, unless
--config.qa.questions names some.

Each stage is a process of its own, so that its seconds and its peak memory are its
own. A stage whose output is there, made with these settings, is not started again;
one that was cut off resumes where it was.

Reads:  what the config names.
Writes: every artefact of the road into the workdir, and quickstart.json (how long
        each stage took, how much memory it held).

Examples:
  python -m realm_retro.cli.quickstart \
      --config=configs/retro/quickstart.py --workdir=quickstart
  python -m realm_retro.cli.quickstart \
      --config=configs/realm/quickstart.py --workdir=quickstart/realm
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from etils import epath

import realm_retro
from realm_retro import artifacts, disk
from realm_retro import config as config_lib
from realm_retro.cli import (
    common,
    processes,
    quickstart_realm,
    quickstart_report,
    quickstart_stages,
)
from realm_retro.cli.quickstart_stages import CommandLine, Stage
from realm_retro.errors import UserError
from realm_retro.typing import Config, JsonDict

LEDGER = "quickstart.json"


@dataclasses.dataclass(frozen=True)
class Command:
    """How a stage is started.

    Attributes:
      words: program and arguments.
      companion: of what runs beside it; empty for nothing.
      captured: whether its standard output is the stage's output.
    """

    words: Sequence[str]
    companion: Sequence[str] = ()
    captured: bool = False


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
        used: JsonDict,
    ) -> None:
        """Keeps what a stage used and the fingerprint of its output.

        Args:
          name: the stage.
          before: fingerprint of its output before it was started. Where that has not
            changed, the stage only said that it had finished: older numbers stay.
          output: what it wrote.
          used: seconds and memory.
        """
        found = fingerprint_of_output(output)
        new: JsonDict = {"settings": self._settings, "output": found, "attempts": 0}
        if found != before:
            new |= used
            new["resumed"] = self.entries[name]["attempts"] > 1
        self._put(name, new)

    def _put(self, name: str, values: JsonDict) -> None:
        self.entries[name] = {**self.entries.get(name, {}), **values}
        with disk.replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"stages": self.entries}, indent=1))


def main(config: Any, workdir: epath.Path) -> None:
    """Runs what is not finished, then prints the report."""
    workdir.mkdir(parents=True, exist_ok=True)
    line = CommandLine.of(sys.argv[1:])
    realm = quickstart_stages.is_realm(config)
    if realm:
        line = dataclasses.replace(line, variant="")
        road = {stage.name: stage for stage in quickstart_stages.realm(line)}
    else:
        road = {stage.name: stage for stage in quickstart_stages.retro(config)}

    def command(name: str) -> Command:
        stage = road[name]
        return Command(
            [*line.words(stage.module, stage), *stage.late(workdir)],
            line.words(stage.companion, stage) if stage.companion else (),
            stage.captured,
        )

    with processes.only_one(workdir) as lock, processes.terminated_like_ctrl_c():
        ledger = Ledger(workdir, _settings(config, line, road.values()))
        run_stages(
            {name: workdir / stage.output for name, stage in road.items()},
            command=command,
            ledger=ledger,
            environment=stage_environment(workdir),
            keep_open=lock,
        )
        # Of an older road there may be more.
        stages = {name: ledger.entries[name] for name in road}
        if realm:
            page = quickstart_realm.page(workdir, list(road.values()), stages)
        else:
            page = quickstart_report.render(
                quickstart_report.read(workdir, name=config.name, stages=stages)
            )
    common.say(page)


def run_stages(
    outputs: Mapping[str, epath.Path],
    *,
    command: Callable[[str], Command],
    ledger: Ledger,
    environment: Mapping[str, str],
    keep_open: int | None = None,
) -> None:
    """Runs the stages that are not finished, in order.

    Args:
      outputs: stage → the file that it writes last.
      command: stage → how it is started; asked for when the stages before it have
        finished.
      ledger: knows what finished, and takes what was measured.
      environment: of the processes.
      keep_open: a file descriptor that they inherit; not a companion, which may
        outlive a killed run without doing harm.

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
        how = command(name)
        beside = f", beside it {_module(how.companion)}" if how.companion else ""
        common.say(title + beside)
        before = fingerprint_of_output(output)
        ledger.start(name)
        used = _run(how, output, environment, keep_open)
        if not output.exists():
            raise UserError(f"stage {name} ended without writing {output}")
        ledger.finish(name, before=before, output=output, used=used)


def _run(
    how: Command,
    output: epath.Path,
    environment: Mapping[str, str],
    keep_open: int | None,
) -> JsonDict:
    """Runs one stage; what it used, for the ledger."""
    companion = None
    if how.companion:
        companion = processes.Companion(how.companion, environment=environment)
    with _captured(output) if how.captured else contextlib.nullcontext() as stdout:
        usage = processes.run(
            how.words,
            environment=environment,
            keep_open=keep_open,
            stdout=stdout,
            companion=companion,
        )
    used: JsonDict = {
        "seconds": round(usage.seconds, 1),
        "peak_mb": round(usage.peak_mb),
    }
    if companion:
        peak = round(companion.peak_mb)
        used["companion"] = {"name": _module(how.companion), "peak_mb": peak}
    return used


def _module(words: Sequence[str]) -> str:
    return words[2].rpartition(".")[2] if words[1] == "-m" else words[0]


@contextlib.contextmanager
def _captured(output: epath.Path) -> Iterator[IO[bytes]]:
    """A file that becomes `output` when all went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f"{output.name}.tmp"
    with open(temporary, "wb") as file:
        yield file
    temporary.replace(output)


def _settings(config: Config, line: CommandLine, stages: Iterable[Stage]) -> str:
    """Fingerprint of all that the caller has set, in every variant that is run."""
    configs = {
        stage.name: line.load(stage.variant, stage.flags)
        for stage in stages
        if stage.variant
    }
    values = {name: config_lib.as_dict(one) for name, one in configs.items()}
    return artifacts.fingerprint_of(
        {
            "config": config_lib.as_dict(config),
            **({"variants": values} if values else {}),
            "version": realm_retro.__version__,
        }
    )


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


def entry() -> None:
    """Console script ``realm-retro-quickstart``."""
    common.run(main, name="quickstart")


if __name__ == "__main__":
    entry()
