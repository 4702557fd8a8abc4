"""README and guides say nothing that is not so: code runs, commands exist.

Python blocks are executed, the blocks of one file one after the other. Commands in
bash blocks are not run (they take minutes): their scripts, modules, files and flags
must exist, and ``--help`` of every command must work.
"""

import concurrent.futures
import configparser
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "realm_retro" / "cli").glob("*.py")
    if "def entry(" in path.read_text()
)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(path):
    """Commands of the bash blocks, as lists of words, without comments."""
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


PYTHON_PAGES = [path for path in PAGES if blocks(path, "python")]
BASH_COMMANDS = [(path, words) for path in PAGES for words in commands(path)]


@functools.cache
def help_texts():
    """What each command prints for --help."""

    def ask(command):
        return subprocess.run(
            [sys.executable, "-m", f"realm_retro.cli.{command}", "--help"],
            capture_output=True,
            text=True,
            check=False,
        )

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(COMMANDS, pool.map(ask, COMMANDS), strict=True))


@functools.cache
def config_of(path):
    spec = importlib.util.spec_from_file_location("config", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def override_fault(words):
    """The first --config.a.b=value that sets nothing which the config has."""
    given = [re.split("[=:]", w)[1] for w in words if w.startswith("--config=")]
    # The launcher gives each of its halves what is for it.
    files = given or ["configs/retro/quickstart.py", "configs/realm/quickstart.py"]
    for word in words:
        match = re.match(r"--config\.([\w.]+)=", word)
        if match and not any(has_field(config_of(file), match[1]) for file in files):
            return f"{word}: {' and '.join(files)} have no {match[1]}"
    return None


def has_field(config, name):
    """Whether a config has a value that ``--config.NAME`` sets."""
    *sections, field = name.split(".")
    for section in sections:
        config = config.get(section, {})
    return field in config


def command_fault(words):
    """Why a documented command cannot work; None where it can."""
    words = words[1:] if words[0] in ("bash", "exec") else words
    program = words[0]
    if program.startswith((".ci/", "launch/")) and not os.access(
        ROOT / program, os.X_OK
    ):
        return f"{program} is not a program"
    flags = {re.split(r"[=.]", word)[0] for word in words if word.startswith("--")}
    command = None
    if words[1:2] == ["-m"] and words[2].startswith("realm_retro."):
        command = words[2].removeprefix("realm_retro.cli.")
        if command not in COMMANDS:
            return f"{words[2]} is not a command"
    elif program == "launch/quickstart.sh":
        command = "quickstart"
    if command is not None:
        known = set(
            re.findall(r"^  --(?:\[no\])?(\w+):", help_texts()[command].stdout, re.M)
        )
        unknown = sorted(flags - {f"--{flag}" for flag in known} - {"--help"})
        if unknown:
            return f"{command} has no {unknown}"
    for word in words:
        value = word.split("=", 1)[-1]
        ours = value.startswith(("configs/", "docs/", "tests/", "realm_retro/"))
        if ours and not (ROOT / value.split(":")[0]).exists():
            return f"{value} is not there"
    return override_fault(words) if command is not None else None


@pytest.mark.parametrize("path", PYTHON_PAGES, ids=name)
def test_python_blocks_run(path, tmp_path):
    code = "\n".join(blocks(path, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        # Toys take longer to compile than to run.
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "words"),
    BASH_COMMANDS,
    ids=[f"{name(path)}-{shlex.join(words)[:60]}" for path, words in BASH_COMMANDS],
)
def test_documented_commands_exist(path, words):
    assert command_fault(words) is None


@pytest.mark.parametrize(
    "line",
    [
        "launch/nothing.sh",
        "python -m realm_retro.cli.nothing --workdir=w",
        "python -m realm_retro.cli.quickstart --wrkdir=w",
        "python -m realm_retro.cli.quickstart --config=configs/nothing.py",
        "launch/quickstart.sh w --config.corpus.sauce=text_files",
        "launch/quickstart.sh w --config.no_section.x=1",
    ],
)
def test_a_wrong_command_is_seen(line):
    assert command_fault(shlex.split(line)) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_works(command):
    done = help_texts()[command]
    assert done.stderr == ""
    assert "--config:" in done.stdout
    assert "--workdir:" in done.stdout
    assert f"python -m realm_retro.cli.{command}" in done.stdout, "show an example"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_named_files_exist(path):
    """Paths in backquotes that begin like one of the repository's."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    begins = r"(?:realm_retro|configs|launch|docs|tests|\.ci)/"
    for target in re.findall(rf"`({begins}[\w./-]*)`", text):
        assert (ROOT / target).exists(), target


def test_console_scripts_are_the_commands():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.entry_points"]["console_scripts"].split("\n")
    scripts = dict(re.split(r"\s*=\s*", line) for line in lines if line)
    assert scripts == {
        f"realm-retro-{command.replace('_', '-')}": f"realm_retro.cli.{command}:entry"
        for command in COMMANDS
    }


def test_the_changelog_knows_this_version():
    from realm_retro import __version__

    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert headings[0] == "Unreleased"
    assert __version__ in headings or len(headings) == 1
