"""Every command's flags, and its failures: one line, the right exit status."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"name": "x", "train": {"steps": 3}})
"""


@pytest.fixture
def command(tmp_path):
    """Runs a stage whose main has the given body, as a process of its own."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(body, *flags, config=True):
        script = tmp_path / "stage.py"
        script.write_text(
            '"""Does what the test says."""\n'
            "from realm_retro.cli import common\n"
            "from realm_retro.errors import UserError\n"
            "def main(config, workdir):\n"
            + textwrap.indent(textwrap.dedent(body), "    ")
            + '\nif __name__ == "__main__":\n    common.run(main, name="stage")\n'
        )
        if config:
            flags = (f"--config={tmp_path / 'config.py'}", "--workdir=w", *flags)
        return subprocess.run(
            [sys.executable, str(script), *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def last_line(text):
    return text.strip().splitlines()[-1]


def test_main_gets_the_config_and_the_workdir(command):
    done = command(
        'common.say(f"{config.train.steps} {config.name} {workdir}")',
        "--config.train.steps=7",
    )
    assert (done.returncode, done.stdout) == (0, "7 x w\n")


def test_a_user_error_is_one_line_without_a_traceback(command):
    done = command('raise UserError("file.txt: line 3\\n  is empty;   remove it")')
    assert done.returncode == 2
    assert done.stderr == "stage: error: file.txt: line 3 is empty; remove it\n"


def test_what_was_said_before_an_error_is_not_lost(command):
    done = command('print("counted 3", end="")\nraise UserError("no")')
    assert done.stdout == "counted 3"


def test_a_bug_keeps_its_traceback(command):
    done = command("{}['missing']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'missing'" in done.stderr


def test_ctrl_c_says_how_to_go_on(command):
    done = command("raise KeyboardInterrupt")
    assert done.returncode == 130
    assert done.stderr == (
        "stage: error: interrupted; run the same command again to resume\n"
    )


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("ENOSPC", "the disk is full"),
        ("EDQUOT", "the quota is used up"),
        ("EACCES", "permission denied"),
        ("EROFS", "the file system is read-only"),
    ],
)
def test_what_the_disk_refuses_is_one_line(command, code, remedy):
    done = command(
        f'import errno\nraise OSError(errno.{code}, "refused", "shard-3.npy")'
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"stage: error: shard-3.npy: {remedy}")
    assert done.stderr.count("\n") == 1


def test_a_really_full_disk(command):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    done = command('open("/dev/full", "wb", buffering=0).write(b"x")')
    assert done.returncode == 2
    assert "w: the disk is full; free space and run the same" in done.stderr


def test_a_folder_in_the_place_of_a_file(command):
    done = command('common.lines_of(".", flag="--questions_file")')
    assert done.returncode == 2
    assert "--questions_file .: is a folder; name a file in it" in done.stderr


def test_other_system_errors_are_bugs(command):
    done = command('open("no such file")')
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr


def test_threads_do_not_keep_a_failed_stage_alive(command):
    done = command(
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise UserError("no")
        """
    )
    assert done.returncode == 2


def test_a_stray_argument_is_named(command):
    done = command("pass", "steps=3")
    assert done.returncode == 2
    assert done.stderr == "stage: error: 'steps=3' is not a flag; flags start with --\n"


def test_an_unknown_flag_is_named(command):
    done = command("pass", "--wrkdir=w")
    assert done.returncode == 2
    assert "Unknown command line flag 'wrkdir'" in done.stderr


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_required_flags_are_named(command, tmp_path, missing):
    flags = {"config": f"--config={tmp_path / 'config.py'}", "workdir": "--workdir=w"}
    del flags[missing]
    done = command("pass", *flags.values(), config=False)
    assert done.returncode == 2
    assert f"--{missing}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("override", ["--config.train.stesp=3", "--config.optimser=3"])
def test_a_misspelt_override_is_named(command, override):
    done = command("pass", override)
    assert done.returncode != 0
    assert override.split("=")[0].split(".")[-1] in done.stderr


def test_help_shows_what_the_command_does(command):
    done = command("pass", "--help", config=False)
    assert done.returncode == 0
    assert "Does what the test says." in done.stdout
    assert "--workdir" in done.stdout
    assert "--config.section.name=value" in " ".join(done.stdout.split())


def test_help_of_a_console_script_is_the_commands(tmp_path):
    script = tmp_path / "realm-retro-quickstart"
    script.write_text("from realm_retro.cli.quickstart import entry\nentry()\n")
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Runs every stage" in done.stdout
    assert "--workdir" in done.stdout


def test_an_unwritable_workdir_is_one_line(command, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "w").mkdir(mode=0o500)
    done = command('(workdir / "x").mkdir()')
    assert done.returncode == 2
    assert "choose a --workdir that you can write" in done.stderr
