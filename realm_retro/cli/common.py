"""What every command shares: its flags, and errors in one readable line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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
    errno.EFBIG: "the file would be larger than is allowed here; raise the limit"
    " (ulimit -f) or choose another --workdir, and run the same command again",
    errno.EIO: "the disk cannot be read or written; run the same command again, and"
    " look for the cause if that does not help",
    errno.ESTALE: "the network file system has lost that file; run the same command"
    " again, and look for the cause if that does not help",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n) and run the"
    " same command again",
    errno.EACCES: "permission denied; change its permissions, or choose a --workdir"
    " that you can write",
    errno.EPERM: "permission denied; change its permissions, or choose a --workdir that"
    " you can write",
    errno.EROFS: "the file system is read-only; choose a --workdir that you can write",
    errno.ENOTDIR: "a part of that path is a file, not a folder; choose another",
}


def run(
    main: Main, *, name: str, required: Sequence[str] = ("config", "workdir")
) -> None:
    """Parses flags and runs one stage.

    A `UserError`, a wrong flag, a full disk, a lost permission or Ctrl-C ends in one
    line on standard error and exit status 2 (130 for Ctrl-C); anything else is a bug
    and keeps its traceback.

    Args:
      main: called with the config and the workdir.
      name: the stage's name, put before the error.
      required: flags that must be given; a config that is not is None.
    """
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
            if (told := disk_error(error)) is None:
                raise
            _die(name, told, 2)

    host_memory.reuse_freed_blocks()
    app.run(guarded, flags_parser=lambda argv: _parse(name, argv, required))


def disk_error(error: OSError) -> str | None:
    """One line about a full disk or a lost permission; None for any other error."""
    remedy = _DISK_ERRORS.get(error.errno or 0)
    return remedy and f"{error.filename or WORKDIR.value}: {remedy}"


def say(message: str) -> None:
    """Prints one line of a stage's report to standard output, at once."""
    print(message, flush=True)


def lines_of(path: epath.PathLike, *, flag: str) -> list[str]:
    """The lines of a text file that a flag names.

    Raises:
      UserError: it is not there, a folder, or not UTF-8.
    """
    path = epath.Path(path)
    try:
        # Not `splitlines`: other marks that end a line may stand within JSON's texts.
        return path.read_text().split("\n")
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{flag} {path}: is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: is not UTF-8 ({error})") from None


def _parse(name: str, argv: list[str], required: Sequence[str]) -> list[str]:
    """Reads all flags; returns what is no flag."""
    try:
        rest = flags.FLAGS(argv)
        for flag in required:
            if flags.FLAGS[flag].value is None:
                _die(name, f"--{flag} is missing; --help shows all flags", 2)
        if CONFIG.value is not None:
            hasattr(CONFIG.value, "name")  # only now is a file missed
    except (flags.Error, LookupError, AttributeError, OSError, SyntaxError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        _die(name, reason, 2)
    except SystemExit:  # of --help, which absl calls a failure
        sys.exit(0)
    return rest


def _reason(error: Exception) -> str | None:
    """What is wrong with a flag, or None for a bug in a config file.

    The flags' libraries raise whatever they met: a setting that the config does not
    have is a KeyError or an AttributeError of one, a config file that is not there an
    OSError.
    """
    causes: list[BaseException] = [error]
    while before := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(before)
    for cause in reversed(causes):
        if isinstance(cause, UserError):  # raised by get_config
            return str(cause)
    if isinstance(error, SyntaxError):
        return f"--config: {error.filename}:{error.lineno}: {error.msg}"
    if isinstance(error, OSError):
        last = str(causes[-1]).splitlines()[-1].strip()
        return f"--config: {last}; name a file such as those in configs/"
    if isinstance(error, flags.Error):
        first, *more = str(error).splitlines()
        return f"{first} {causes[-1]}" if more else f"{first} (--help shows all flags)"
    for cause in causes:
        if isinstance(cause, KeyError):
            return f"--config has no setting {cause.args[0]}"
    if "get_config" in str(error):
        return "--config: the file defines no function get_config"
    return None


def _complete_help(main: Main) -> None:
    # absl's --help shows the docstring and the flags of the started file alone, and a
    # console script is a file that has neither.
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for module in (main.__module__, __name__):
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _die(name: str, message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # Threads of an asynchronous checkpoint must not keep a failed stage alive.
    logging.flush()
    os._exit(status)
