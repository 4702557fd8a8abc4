"""What the suites are made of: blocks of steps, folders, corpora, searches."""

import dataclasses
import json
import os

import ml_collections
import numpy as np
import pytest
import tiny_workdir
from etils import epath

from realm_retro.cli.benchmarks import corpus, search, steps, workdirs
from realm_retro.cli.benchmarks.steps import Alternation, Enough
from realm_retro.errors import UserError


@dataclasses.dataclass
class Loop:
    """What a hook sees."""

    step: int
    state: tuple = ()


class Clock:
    """A time that goes on as a step says."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(steps.time, "perf_counter", lambda: self.now)


def play(alternation, clock, seconds):
    """Takes steps, each of `seconds(step from 0)`, until the hook has enough."""
    for step in range(1, 1000):
        clock.now += seconds(step - 1)
        try:
            alternation(Loop(step))
        except Enough:
            return step
    raise AssertionError("it never had enough")


@pytest.mark.parametrize("untimed", [0, 1, 2])
def test_blocks_alternate_and_the_first_round_is_not_timed(monkeypatch, untimed):
    switched = []
    alternation = Alternation(
        ("a", "b"),
        steps=3,
        rounds=2,
        untimed=untimed,
        switch=lambda name, loop: switched.append((name, loop.step)),
    )
    block = 3 + untimed
    clock = Clock(monkeypatch)

    def seconds(step):
        if step % block < untimed or step < 2 * block:
            return 1000.0  # none of these counts
        return 2.0 if alternation.condition(step) == "a" else 3.0

    assert play(alternation, clock, seconds) == 6 * block == alternation.total
    assert alternation.seconds == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    names = ["b", "a", "b", "a", "b"]
    assert switched == [(n, (i + 1) * block) for i, n in enumerate(names)]
    assert [alternation.is_timed(s) for s in (2 * block - 1, 2 * block)] == [0, 1]


def test_what_happens_between_blocks_is_nobodys(monkeypatch):
    clock = Clock(monkeypatch)

    def switch(name, loop):
        clock.now += 50.0

    alternation = Alternation(("a", "b"), steps=2, rounds=3, switch=switch)
    play(alternation, clock, lambda step: 1.0)
    assert alternation.seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_single_steps_and_steps_after_the_last_block(monkeypatch):
    alternation = Alternation(("a", "b"), steps=2, rounds=1, each_step=True, after=3)
    assert play(alternation, Clock(monkeypatch), float) == 8 + 3 == alternation.last
    assert alternation.single == {"a": [[4.0, 5.0]], "b": [[6.0, 7.0]]}
    assert alternation.seconds == {"a": [4.5], "b": [6.5]}


def test_one_step_a_block(monkeypatch):
    alternation = Alternation(("a", "b"), steps=1, rounds=2, after=1)
    play(alternation, Clock(monkeypatch), float)
    assert alternation.seconds == {"a": [2.0, 4.0], "b": [3.0, 5.0]}


def test_a_training_long_enough_that_saves_nothing():
    config = ml_collections.ConfigDict({"train": {"steps": 5}})
    found = steps.settings(config, 40)
    assert found["steps"] > 40
    assert found["checkpoint_every"] > found["steps"]
    assert steps.settings(config, 3)["steps"] == 5
    assert steps.settings(config, 3, steps=1)["steps"] == 1


def test_a_changed_config_is_a_copy():
    config = ml_collections.ConfigDict({"name": "a", "train": {"steps": 5, "keep": 2}})
    other = workdirs.changed(config, name="b", train={"steps": 6}, refresh={"every": 1})
    assert other.to_dict() == {
        "name": "b",
        "train": {"steps": 6, "keep": 2},
        "refresh": {"every": 1},
    }
    assert (config.name, config.train.steps) == ("a", 5)


def test_a_config_file_gives_the_config_back(tmp_path):
    values = {"a": {"b": (1, 2), "c": None, "d": 'x"'}, "e": 1e-3, "f": True}
    path = workdirs.config_file(ml_collections.ConfigDict(values), epath.Path(tmp_path))
    found = {}
    exec(path.read_text(), found)
    assert found["get_config"]().to_dict() == values


@pytest.fixture
def workdir(tmp_path):
    for name in ("chunks", "embeddings", "refresh", "benchmarks", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for run in ("retro", workdirs.NAME):
        (tmp_path / "runs" / run).mkdir(parents=True)
    return epath.Path(tmp_path)


def test_a_suites_folder_sees_artefacts_and_leaves_no_trace(workdir):
    before = sorted(path.name for path in workdir.iterdir())
    with workdirs.scratch(workdir) as scratch:
        seen = sorted(path.name for path in scratch.iterdir())
        assert seen == ["chunks", "embeddings", "runs"]
        assert [path.name for path in (scratch / "runs").iterdir()] == ["retro"]
        assert (scratch / "chunks" / "file").read_text() == "chunks"
        (scratch / "runs" / workdirs.NAME).mkdir()
    assert sorted(path.name for path in workdir.iterdir()) == before
    assert (workdir / "chunks" / "file").exists()
    with workdirs.scratch(workdir, ["embeddings"]) as scratch:
        seen = sorted(path.name for path in scratch.iterdir())
        assert seen == ["embeddings", "runs"]


def test_a_clone_shares_only_what_never_changes(workdir, tmp_path):
    with workdirs.scratch(workdir) as scratch:
        run = scratch / "runs" / "benchmark"
        (run / "checkpoints" / "4").mkdir(parents=True)
        (run / "checkpoints" / "4" / "state").write_text("state")
        (run / "metrics.jsonl").write_text("1")
        copy = workdir / "copy"
        workdirs.clone(scratch, copy)
        other = copy / "runs" / "benchmark"
        (other / "metrics.jsonl").write_text("2")
        assert (run / "metrics.jsonl").read_text() == "1"
        assert os.path.samefile(
            run / "checkpoints" / "4" / "state", other / "checkpoints" / "4" / "state"
        )
        assert os.path.islink(copy / "chunks")
        copy.rmtree()
    assert (workdir / "chunks" / "file").exists()


def test_a_clone_does_not_mind_what_its_workdir_is_called(tmp_path):
    source = epath.Path(tmp_path / "versions" / "source")
    source.mkdir(parents=True)
    (source / "metrics.jsonl").write_text("1")
    workdirs.clone(source, source.parent / "copy")
    (source.parent / "copy" / "metrics.jsonl").write_text("2")
    assert (source / "metrics.jsonl").read_text() == "1"


def test_missing_stages_are_those_before_the_training():
    stages = workdirs._stages
    plain = {"model": {"cca_layers": ()}, "name": "a"}
    retro = {"model": {"cca_layers": (2,)}, "name": "a"}
    realm = {"task": "realm_pretrain", "pretrain": {"masking": "salient"}}
    spans = {"task": "realm_pretrain", "pretrain": {"masking": "span"}}
    found = [
        [name for name, _ in stages(ml_collections.ConfigDict(values))]
        for values in (plain, retro, realm, spans, {"task": "realm_ict"})
    ]
    assert found == [
        ["prepare"],
        ["prepare", "embed", "build_index", "find_neighbours"],
        ["prepare", "tag_spans"],
        ["prepare"],
        ["prepare"],
    ]


def test_a_made_up_corpus_begins_with_the_smaller_one(tmp_path):
    paths = [epath.Path(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    sizes = [corpus.write(p, n) for p, n in zip(paths, (10, 40), strict=True)]
    small, large = (path.read_text().splitlines() for path in paths)
    assert large[:10] == small
    rows = [json.loads(line) for line in large]
    assert len({row["id"] for row in rows}) == 40
    assert sizes[1] == sum(len(row["text"]) for row in rows)
    assert {len(row["text"].split()) for row in rows} == {200}
    assert 3.5 < sizes[1] / sizes[0] < 4.5


def test_searches_of_made_up_vectors(tmp_path):
    found = search.measure(epath.Path(tmp_path), rows=[300, 900], dim=8, k=5, rounds=2)
    names = [series.name for series in found.series]
    assert found.settings["vectors"] == "made up, around random centres"
    for size in ("300", "900"):
        assert f"exact, {size} vectors, one query" in names
        assert f"exact, {size} vectors, batches of 256" in names
    assert "exact, one query: 900 over 300 vectors" in names
    timed = [s for s in found.series if s.unit in ("ms", "queries/s", "ratio")]
    assert all(len(s.values) == 2 and min(s.values) > 0 for s in timed)
    if not any("without ScaNN" in note for note in found.notes):
        recall = {s.name: s.values for s in found.series if "recall" in s.name}
        assert recall == {f"scann, {n} vectors, recall@5": [1.0] for n in (300, 900)}


def test_searches_of_a_workdirs_embeddings(tmp_path):
    tiny_workdir.write_chunks(tmp_path / "chunks", documents=200)
    workdir = epath.Path(tmp_path)
    tiny_workdir.write_embeddings(workdir)
    with pytest.raises(UserError, match="--rows=9000 needs 9512"):
        search.measure(workdir, rows=[9000], dim=8, k=5, rounds=1)
    vectors, queries, source = search._vectors(workdir, 40, 8)
    assert source.startswith("embeddings ")
    assert vectors.shape == (40, 8)
    # None of the queries is among the vectors.
    same = (vectors[:, None] == queries[None]).all(-1)
    assert not same.any()
    assert np.isfinite(vectors).all()
