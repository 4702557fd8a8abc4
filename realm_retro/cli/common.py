"""What every command shares: its flags, and errors in one readable line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from realm_retro import host_memory
from realm_retro.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The run's settings: a file in configs/. Override any value with"
    " --config.section.name=value.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of all artefacts of this run; created if needed."
)

Main = Callable[[ml_collections.ConfigDict, epath.Path], Any]

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free space and run the same command again",
    errno.EDQUOT: "the quota is used up; free space and run the same command again",
    errno.EACCES: "permission denied; choose a --workdir that you can write",
    errno.EPERM: "permission denied; choose a --workdir that you can write",
    errno.EROFS: "the file system is read-only; choose a --workdir that you can write",
}


def run(
    main: Main, *, name: str, required: Sequence[str] = ("config", "workdir")
) -> None:
    """Parses flags and runs one stage.

    A `UserError`, a full disk, a lost permission or Ctrl-C ends in one line on
    standard error and exit status 2 (130 for Ctrl-C); anything else is a bug and keeps
    its traceback.

    Args:
      main: called with the config and the workdir.
      name: the stage's name, put before the error.
      required: flags that must be given; a config that is not is None.
    """
    flags.mark_flags_as_required(list(required))
    _complete_help(main)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            _die(name, f"{argv[1]!r} is not a flag; flags start with --", 2)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell much at INFO
        try:
            main(CONFIG.value, epath.Path(WORKDIR.value or "."))
        except UserError as error:
            _die(name, str(error), 2)
        except KeyboardInterrupt:
            _die(name, "interrupted; run the same command again to resume", 130)
        except OSError as error:
            remedy = _DISK_ERRORS.get(error.errno or 0)
            if remedy is None:
                raise
            _die(name, f"{error.filename or WORKDIR.value}: {remedy}", 2)

    host_memory.reuse_freed_blocks()
    app.run(guarded)


def say(message: str) -> None:
    """Prints one line of a stage's report to standard output, at once."""
    print(message, flush=True)


def _complete_help(main: Main) -> None:
    # absl's --help shows the docstring and the flags of the started file alone, and a
    # console script is a file that has neither.
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for module in (main.__module__, __name__):
        for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _die(name: str, message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # Threads of an asynchronous checkpoint must not keep a failed stage alive.
    logging.flush()
    os._exit(status)
