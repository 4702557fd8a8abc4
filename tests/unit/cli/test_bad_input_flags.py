"""Flags and config files that a newcomer gets wrong: one line, status 2."""

import subprocess
import sys

import pytest

CONFIG = """
import ml_collections
from realm_retro.errors import UserError

def get_config(which="one"):
    if which != "one":
        raise UserError(f"{which}: after the colon comes one")
    return ml_collections.ConfigDict({"name": "x", "train": {"steps": 3}})
"""
STAGE = """
from realm_retro.cli import common

def main(config, workdir):
    (workdir / "made").mkdir(parents=True)

if __name__ == "__main__":
    common.run(main, name="stage")
"""


@pytest.fixture
def stage(tmp_path):
    """Runs a stage that makes a folder in its workdir, with the given flags."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "good.py").write_text(CONFIG)
    (tmp_path / "syntax.py").write_text("x = 1\ndef get_config(: pass\n")
    (tmp_path / "bare.py").write_text("x = 1\n")
    (tmp_path / "bug.py").write_text("def get_config():\n    return None.nothing\n")
    (tmp_path / "file").write_text("I am no folder")

    def run(*flags):
        return subprocess.run(
            [sys.executable, "stage.py", *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config=good.py", "--workdir=w", "--config.train.stpes=3"], "stpes"),
        (["--config=good.py", "--workdir=w", "--config.trian.steps=3"], "trian"),
        (["--config=good.py", "--workdir=w", "--config.train.steps=x"], "steps=x"),
        (["--config=good.py", "--workdir=w", "--wrokdir=w"], "wrokdir"),
        (["--config=good.py:two", "--workdir=w"], "after the colon comes one"),
        (["--config=nosuch.py", "--workdir=w"], "nosuch.py"),
        (["--config=nosuch.py", "--workdir=w", "--config.name=y"], "nosuch.py"),
        (["--config=syntax.py", "--workdir=w"], "syntax.py:2"),
        (["--config=bare.py", "--workdir=w"], "no function get_config"),
        (["--workdir=w"], "--config is missing"),
        (["--config=good.py"], "--workdir is missing"),
        (["--config=good.py", "--workdir=file"], "file/made"),
    ],
)
def test_a_mistake_is_one_line(stage, flags, said):
    done = stage(*flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("stage: error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_bug_in_a_config_keeps_its_traceback(stage):
    done = stage("--config=bug.py", "--workdir=w")
    assert done.returncode == 1
    assert "return None.nothing" in done.stderr


def test_right_flags_still_work(stage, tmp_path):
    assert stage("--config=good.py:one", "--workdir=w").returncode == 0
    assert (tmp_path / "w" / "made").is_dir()
