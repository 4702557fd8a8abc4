"""Every stage on a disk that is full, read-only, or somebody else's.

One clear line; what was there before is untouched; the same command goes on when there
is space again, to the very result of a run that never met a limit.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import ml_collections
import numpy as np
import pytest
import small_disk
import tiny_bert
import tiny_qa
import tiny_realm
import toy_refresh
from absl.testing import flagsaver
from etils import epath

from realm_retro import artifacts
from realm_retro.cli import (
    ask,
    build_index,
    common,
    convert,
    embed,
    evaluate,
    find_answers,
    find_neighbours,
    generate,
    prepare,
    refresh_index,
    tag_spans,
    train,
)
from realm_retro.errors import UserError
from realm_retro.retrieval import refresh
from realm_retro.retrieval.index import probe
from realm_retro.train.metrics import MetricsLog

pytestmark = pytest.mark.slow

DISK = 256 << 20


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
      run: (config, workdir) → None.
      reads: what of the workdir it reads and does not write.
      writes: what it writes: artefacts, files or folders.
      starts: what is there of `writes` before it starts.
    """

    run: Callable
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    starts: tuple[str, ...] = ()


def exactly(main):
    """The stage with exact search."""

    def run(config, workdir):
        config = config.copy_and_resolve_references()
        config.index.backend = "exact"
        main(config, workdir)

    return run


def generating(config, workdir):
    with flagsaver.flagsaver(prompt=["the river"]):
        generate.main(config, workdir)


def converting(config, workdir):
    with flagsaver.flagsaver(input=[str(workdir / "published")]):
        convert.main(None, workdir)


def converting_back(config, workdir):
    with flagsaver.flagsaver(output=str(workdir / "out")):
        convert.main(None, workdir)


def asking(config, workdir):
    with flagsaver.flagsaver(question=["born riva"]):
        ask.answer_all(qa_config(workdir), workdir, as_json=True)


def finding_answers(config, workdir):
    find_answers.main(qa_config(workdir), workdir)


def qa_config(workdir):
    return tiny_qa.config(workdir / "questions.jsonl", qa__holdout=0.0)


def refreshing(config, workdir):
    root = workdir / "refresh"
    refresh.publish_snapshot(
        root, 0, toy_refresh.arrays(0), parents=toy_refresh.PARENTS
    )
    settings = refresh.RefreshConfig(shard_rows=toy_refresh.SHARD_ROWS)
    refresh_index.work(
        root,
        toy_refresh.make_embedder,
        toy_refresh.TARGET,
        settings,
        max_idle_seconds=0.01,
    )


RUN = "runs/retro"
STAGES = {
    "prepare": Stage(prepare.main, (), ("corpus", "chunks", "passages")),
    "tag_spans": Stage(tag_spans.main, ("passages",), ("spans",)),
    "embed": Stage(embed.main, ("chunks",), ("embeddings",)),
    "build_index": Stage(
        exactly(build_index.main), ("chunks", "embeddings"), ("index",)
    ),
    "build_index of ScaNN": Stage(
        build_index.main, ("chunks", "embeddings"), ("index",)
    ),
    "find_neighbours": Stage(
        find_neighbours.main, ("chunks", "embeddings", "index"), ("neighbours",)
    ),
    "refresh": Stage(refreshing, (), ("refresh",)),
    "train": Stage(train.main, ("chunks", "neighbours"), (RUN,)),
    "evaluate": Stage(evaluate.main, ("chunks", "neighbours"), (RUN,), (RUN,)),
    "generate": Stage(generating, ("chunks", "embeddings", "index"), (RUN,), (RUN,)),
    "find_answers": Stage(
        finding_answers, ("qa/passages", "questions.jsonl"), ("answers",)
    ),
    "ask": Stage(asking, ("qa/passages",), ("indexes",)),
    "convert": Stage(converting, ("published",), ("weights",)),
    "convert --output": Stage(converting_back, ("weights",), ("out",)),
}
if probe.scann_problem() is not None:
    del STAGES["build_index of ScaNN"]


def make_config(folder):
    return ml_collections.ConfigDict(
        {
            "name": "retro",
            "seed": 0,
            "corpus": {"source": "text_files", "path": str(folder / "files")},
            "encoder": {"path": str(folder / "bert"), "max_tokens": 40},
            "tokenizer": {"vocab_size": 340},
            "chunks": {
                "length": 16,
                "validation_fraction": 0.2,
                "shard_documents": 10,
            },
            "passages": {
                "length": 24,
                "title_length": 4,
                "validation_fraction": 0.0,
                "shard_documents": 10,
            },
            "spans": {"tagger": "rules", "shard_passages": 64},
            "embed": {"shard_size": 64},
            "index": {"backend": "scann", "recall_target": 0.3, "recall_queries": 32},
            "neighbours": {"k": 2, "shard_size": 64},
            "model": {
                "vocab_size": 340,
                "chunk_length": 16,
                "num_layers": 2,
                "model_dim": 16,
                "num_heads": 2,
                "head_dim": 8,
                "ffw_dim": 32,
                "cca_layers": (2,),
                "encoder_layers": 1,
                "encoder_dim": 16,
                "encoder_num_heads": 2,
                "encoder_head_dim": 8,
                "encoder_ffw_dim": 32,
                "compute_dtype": "float32",
            },
            "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2},
            "train": {
                "steps": 6,
                "batch_size": 8,
                "sequence_chunks": 4,
                "neighbours": 2,
                "log_every": 1,
                "checkpoint_every": 2,
            },
            "evaluate": {"batch_size": 8, "stride_chunks": 2},
            "generate": {"max_tokens": 20, "neighbours": 2},
        }
    )


@pytest.fixture(scope="module")
def road():
    """A workdir in which every stage has run, without a limit, and its config."""
    # Not a temporary folder of pytest, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        write_files(folder / "files")
        tiny_bert.write(folder / "bert")
        config, workdir = make_config(folder), epath.Path(folder / "done")
        workdir.mkdir()
        tiny_realm.write(workdir / "published", tiny_realm.open_qa())
        tiny_qa.write_questions(workdir / "questions.jsonl")
        (workdir / "qa").mkdir()
        tiny_qa.write_passages(workdir / "qa")
        for stage in STAGES.values():
            shown = linked(stage, workdir, folder / "one")
            stage.run(config, shown)
            for part in stage.writes:
                if (workdir / part).exists():
                    shutil.rmtree(workdir / part)
                (workdir / part).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(shown / part, workdir / part)
            shutil.rmtree(folder / "one")
        yield config, workdir


def write_files(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ("Amazon", "Danube", "Ganges", "Loire", "Mekong", "Niger", "Oder")
    for i in range(40):
        text = " ".join(
            f"The {names[n]} is early in Western Europe, written in {n + 1900}."
            for n in rng.integers(len(names), size=12)
        )
        (folder / f"{i:03d}.txt").write_text(text)


def linked(stage, done, workdir):
    """A workdir with links to what the stage reads, and copies of what it changes."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for part in stage.reads:
        name = part.removeprefix("qa/")
        os.symlink(done / part, workdir / name)
    for part in stage.starts:
        (workdir / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(done / part, workdir / part)
    return workdir


def told(run, *arguments):
    """The line that a command would end with; None where it succeeds."""
    try:
        run(*arguments)
    except UserError as error:
        line = str(error)
    except OSError as error:
        line = common.disk_error(error)
        if line is None:
            raise
    else:
        return None
    assert "\n" not in line
    return line


def contents(folder):
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def fingerprints(folder, parts):
    """Of the artefacts below parts of a folder, and the sums of checkpoints."""
    found = {}
    for part in parts:
        root = pathlib.Path(folder) / part
        for path in root.rglob(artifacts.MANIFEST):
            body = json.loads(path.read_text())
            found[str(path.relative_to(folder))] = body["fingerprint"]
        for path in root.glob("checkpoints/*/meta/metadata"):
            body = json.loads(path.read_text())
            found[str(path.relative_to(folder))] = body["sums"]
    return found


@pytest.fixture
def small():
    """Mounts disks at places that anybody may enter."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)

        def mount(name, size=DISK):
            return stack.enter_context(small_disk.mounted(folder / name, size))

        yield mount


# In a training the storage library's threads tell of the same error once more, each in
# its own way; as a command it silences them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk(road, small, name):
    config, done = road
    stage = STAGES[name]
    before = contents(done)
    disk = small("whole")
    linked(stage, done, disk)
    used = small_disk.free_bytes(disk)
    stage.run(config, disk)
    used -= small_disk.free_bytes(disk)
    wanted = fingerprints(disk, stage.writes)
    failures = 0
    for share in (0.0, 0.25, 0.5, 0.75, 0.95):
        workdir = linked(stage, done, small(f"full-{share}"))
        start = {part: contents(workdir / part) for part in stage.starts}
        ballast = small_disk.leave(workdir, int(share * used))
        line = told(stage.run, config, workdir)
        if line is not None:
            failures += 1
            assert "disk is full; free space and run the same command again" in line
            assert str(workdir) in line
            # Nothing that was whole before is less than it was.
            for part, files in start.items():
                now = contents(workdir / part)
                kept = {file for file in files if "tensorboard" not in file}
                assert {file: now[file] for file in kept} == {
                    file: files[file] for file in kept
                }
        ballast.unlink()
        assert told(stage.run, config, workdir) is None
        assert fingerprints(workdir, stage.writes) == wanted
        assert all((workdir / part).exists() for part in stage.writes)
        assert not list(pathlib.Path(workdir).rglob("*.tmp"))
    assert failures >= 2
    assert contents(done) == before


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_may_only_be_read(road, small, name):
    config, done = road
    stage = STAGES[name]
    workdir = linked(stage, done, small("disk"))
    small_disk.remount(workdir, "ro")
    line = told(stage.run, config, workdir)
    assert line
    assert "the file system is read-only; choose a --workdir that you can" in line
    assert str(workdir) in line
    small_disk.remount(workdir, "rw")
    assert told(stage.run, config, workdir) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("name", STAGES)
def test_a_workdir_of_somebody_else(road, small, name):
    config, done = road
    stage = STAGES[name]
    workdir = linked(stage, done, small("disk"))
    with small_disk.as_nobody():
        line = told(stage.run, config, workdir)
    assert line
    assert "permission denied; change its permissions, or choose a --workdir" in line
    assert str(workdir) in line
    assert told(stage.run, config, workdir) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("name", [name for name in STAGES if STAGES[name].reads])
def test_an_input_that_may_not_be_read(road, small, name):
    config, done = road
    stage = STAGES[name]
    workdir = linked(stage, done, small("disk"))
    os.chmod(workdir, 0o777)
    for part in stage.reads:
        hidden = pathlib.Path(done / part)
        mode = hidden.stat().st_mode & 0o777
        hidden.chmod(0o000)
        try:
            with small_disk.as_nobody():
                line = told(stage.run, config, workdir)
        finally:
            hidden.chmod(mode)
        assert line, part
        assert "permission" in line


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_under_tensorboard_alone(small, tmp_path):
    """Its thread dies of it; nobody waits for what it will never take."""
    disk = small("disk", 1 << 20)
    (tmp_path / "tensorboard").symlink_to(disk)
    record = {f"metric_{i}": 0.5 for i in range(40)}

    def write():
        with MetricsLog(epath.Path(tmp_path), resumed_at=0) as log:
            ballast = small_disk.leave(disk, 0)
            try:
                for step in range(200):
                    log.write({"step": step, **record})
            finally:
                ballast.unlink()

    assert "the disk is full" in told(write)
