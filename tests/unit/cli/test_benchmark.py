"""The command that measures: its flags, its table, its JSON."""

import json
import os
import re
import subprocess
import sys
import threading

import ml_collections
import pytest
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import benchmark
from realm_retro.cli.benchmarks import machine, report
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.errors import UserError

REALM = ml_collections.ConfigDict({"task": "realm_pretrain", "model": {"width": 4}})
MACHINE = {
    "processor": "a processor",
    "cpus": 2,
    "memory_gb": 8,
    "devices": ["cpu"],
    "load_before": "0.1, 0.2, 0.3",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
}


def body_of(*series, notes=()):
    found = Report("What it costs", series, {"size": 3}, notes)
    return report.as_json(found, suite="x", command="python -m x", machine=MACHINE)


def test_a_series_is_its_median_least_and_most():
    one = Series("a", "s", [3.0, 1.0, 2.0, 9.0, 2.5]).as_json()
    assert (one["median"], one["min"], one["max"]) == (2.5, 1.0, 9.0)
    assert one["values"] == [3.0, 1.0, 2.0, 9.0, 2.5]
    assert one["met"] is None


@pytest.mark.parametrize(
    ("at_most", "unjudged", "met", "shown"),
    [
        (1.05, "", True, "met"),
        (1.01, "", False, "MISSED"),
        (1.05, "one core alone", None, "not judged"),
        (None, "", None, ""),
    ],
)
def test_a_target_is_met_missed_or_not_judged(at_most, unjudged, met, shown):
    body = body_of(Series("a over b", "ratio", [1.0, 1.02, 1.5], at_most, unjudged))
    assert body["series"][0]["met"] is met
    line = report.render(body).splitlines()[3]
    assert line.rstrip().endswith(shown if shown else "1.5")
    assert f"≤ {at_most}" in line or at_most is None
    assert ("* not judged: one core alone" in report.render(body)) == bool(unjudged)


def test_ratios_are_of_pairs_and_shares_of_the_whole():
    assert report.ratio([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert report.share([10.0, 5.0], [9.0, 5.5]) == pytest.approx([0.1, -0.1])
    with pytest.raises(ValueError, match="zip"):
        report.ratio([1.0], [])


def test_the_json_holds_what_the_table_shows(tmp_path):
    body = body_of(
        Series("step", "s", [0.123456, 0.2, 12345.6]),
        Series("share", "ratio", [0.05], at_most=0.1),
        notes=["files were cached"],
    )
    path = epath.Path(tmp_path / "a" / "b.json")
    report.write(path, body)
    report.write(path, body)
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]
    assert json.loads(path.read_text()) == body
    text = report.render(json.loads(path.read_text()))
    for shown in ("0.1235", "12,346", "0.05", "≤ 0.1", "What it costs (3 rounds)"):
        assert shown in text
    for shown in ("files were cached", "a processor", "jax 0.10.2", "0.1, 0.2, 0.3"):
        assert shown in text
    assert body["settings"] == {"size": 3}
    assert body["command"] == "python -m x"
    assert re.match(r"\d{4}-\d\d-\d\dT.*\+00:00$", body["when"])


def test_the_machine_tells_what_it_is():
    facts = machine.facts(load_before="0")
    assert facts["cpus"] >= (facts["cores"] or 1) >= 1
    assert len(facts["devices"]) == 8  # those of the tests
    assert {"python", "jax", "numpy"} <= facts["versions"].keys()
    json.dumps(facts)


@pytest.mark.parametrize(
    ("cores", "others", "want"),
    [
        ([(0,)], 0, None),
        ([], 0, None),
        ([(0,), (1,)], 0, ([0], [1])),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], 0, ([0, 4, 1, 5], [2, 6, 3, 7])),
        ([(0, 4), (1, 5), (2, 6)], 0, ([0, 4, 1, 5], [2, 6])),
        ([(0,), (1,), (2,), (3,)], 3, ([0], [1, 2, 3])),
        ([(0,), (1,)], 9, ([0], [1])),
    ],
)
def test_cores_are_split_whole(cores, others, want):
    assert machine.split(cores, others) == want


def test_threads_of_one_core_count_once(monkeypatch, tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_available", lambda: [0, 1, 2, 3])
    assert machine.cores() == [(0, 2), (1, 3)]
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "nothing")
    assert machine.cores() == [(0,), (1,), (2,), (3,)]


@pytest.mark.skipif(not machine.cores(), reason="no choice of CPUs here")
def test_all_threads_are_pinned_and_freed():
    before, one = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    go, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (go.set(), done.wait(60)))
    thread.start()
    go.wait(60)
    try:
        with machine.pinned([one]):
            assert os.sched_getaffinity(0) == {one}
            assert os.sched_getaffinity(thread.native_id) == {one}
        assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(thread.native_id) == before
    finally:
        done.set()
        thread.join()


def test_a_wrong_suite_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", benchmark.__name__, "--suite=speed", "--workdir=w"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("benchmark: error: ")
    assert done.stderr.count("\n") == 1
    for said in ("--suite=speed", "refresh", "startup"):
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ({"suite": "memory"}, None, "--config is missing: --suite=memory"),
        ({"suite": "memory", "steps": 3}, REALM, "--steps is of --suite=refresh"),
        ({"suite": "search", "documents": 30}, None, "search reads --rows, --dim"),
        ({"suite": "memory"}, REALM, "stages of RETRO"),
        ({"suite": "retrieval"}, ml_collections.ConfigDict(), "not retro"),
        ({"suite": "refresh"}, ml_collections.ConfigDict(), "task realm_pretrain"),
        ({"suite": "search", "rows": ["12", "x"]}, None, "--rows=12,x: whole numbers"),
        ({"suite": "search", "rows": ["0"]}, None, "whole numbers above 0"),
        (
            {"suite": "refresh", "worker_environment": ["CUDA"]},
            REALM,
            "--worker_environment=CUDA: must be NAME=VALUE",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(given, config, said, tmp_path):
    with flagsaver.flagsaver():
        for name, value in given.items():
            benchmark.flags.FLAGS[name].value = value
            benchmark.flags.FLAGS[name].present = 1
        with pytest.raises(UserError) as caught:
            benchmark.main(config, epath.Path(tmp_path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bucket_is_refused():
    with (
        flagsaver.flagsaver(suite="search"),
        pytest.raises(UserError, match="not a bucket"),
    ):
        benchmark.main(None, epath.Path("gs://bucket/w"))


def test_each_suite_is_explained():
    for suite, names in benchmark.SUITES.items():
        assert f"\n  {suite} " in benchmark.__doc__
        assert all(f"--{name}" in benchmark.__doc__ for name in names[:2])
