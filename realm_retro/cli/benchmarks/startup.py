"""Suite ``startup``: from the command to the first step, compiled anew or not.

The command ``train`` takes one step in a new run, in turn with an empty folder for
compiled programs and with one that an earlier start has filled.
"""

from __future__ import annotations

import tempfile

from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common, quickstart_stages
from realm_retro.cli.benchmarks import children, report, steps, workdirs
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.typing import Config

SUITE = "startup"
_COLD, _WARM = "cold", "warm"


def measure(config: Config, workdir: epath.Path, *, rounds: int) -> Report:
    """Runs the suite.

    Args:
      config: of any training.
      workdir: its artefacts are used, or made.
      rounds: pairs of starts.

    Raises:
      UserError: a stage or a start failed.
    """
    workdirs.complete(config, workdir)
    log = workdirs.log_file(workdir, SUITE)
    config = workdirs.changed(
        config,
        name=workdirs.NAME,
        train=steps.settings(config, 1, steps=1),
        optimizer={"warmup_steps": 0},
    )
    found: dict[str, list[tuple[float, float]]] = {_COLD: [], _WARM: []}
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=workdir) as folder:
        warm = epath.Path(folder) / _WARM
        _start(config, workdir, warm, log)  # fills it
        for number in range(1, rounds + 1):
            for name in found:
                cache = warm
                if name == _COLD:
                    cache = epath.Path(folder) / f"{_COLD}-{number}"
                times = _start(config, workdir, cache, log)
                found[name].append(times)
                common.say(
                    f"round {number} of {rounds}, {name}: first word after"
                    f" {times[0]:.1f} s, first step after {times[1]:.1f} s"
                )
        stored = workdirs.size(warm) / 1e6
    return _report(config, found, stored)


def _start(
    config: Config, workdir: epath.Path, cache: epath.Path, log: epath.Path
) -> tuple[float, float]:
    """Seconds until the training describes itself, and until its first step's end."""
    with workdirs.scratch(workdir) as scratch:
        path = workdirs.config_file(config, scratch)
        lines = children.timeline(
            ["realm_retro.cli.train", f"--config={path}", f"--workdir={scratch}"],
            log=log,
            # Whatever the user has set: this is what is compared.
            env=children.environment(cache, {"JAX_COMPILATION_CACHE_DIR": str(cache)}),
        )
    return lines[0].seconds, children.first(lines, "step 1/1")


def _report(
    config: Config, found: dict[str, list[tuple[float, float]]], stored_mb: float
) -> Report:
    series, whole = [], {}
    for name, times in found.items():
        begun = [described for described, _ in times]
        compiled = [stepped - described for described, stepped in times]
        whole[name] = [stepped for _, stepped in times]
        series += [
            Series(f"{name}: start, imports, artefacts checked", "s", begun),
            Series(f"{name}: compile, initialise, first step", "s", compiled),
            Series(f"{name}: from the command to the first step", "s", whole[name]),
        ]
    return Report(
        title="From the command to the first step, compilation cache cold and warm",
        series=[
            *series,
            Series("warm over cold", "ratio", report.ratio(whole[_WARM], whole[_COLD])),
            Series("compilation cache", "MB", [stored_mb]),
        ],
        settings={
            "task": config.get("task", "retro"),
            "batch_size": config.train.batch_size,
            "model": config_lib.as_dict(config.model),
        },
        notes=[
            "files were in the system's cache in all starts; JAX keeps only programs"
            " that took at least a second to compile, unless"
            " JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise",
            *(
                ["REALM embeds all passages before its first step"]
                if quickstart_stages.is_realm(config)
                else []
            ),
        ],
    )
