"""The quickstart's driver: what it runs again, what it measures, what it prints."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from realm_retro.cli import processes, quickstart, quickstart_report
from realm_retro.errors import UserError

STAGES = ("cut", "count", "show")


@pytest.fixture
def road(tmp_path):
    """Three small stages that write what they are told; returns which of them ran."""
    outputs = {name: epath.Path(tmp_path) / f"{name}.json" for name in STAGES}

    def run(settings="s", content="{}", fail=None):
        asked = []

        def command(name):
            asked.append(name)
            code = f"open({str(outputs[name])!r}, 'w').write({content!r})"
            if name == fail:
                code = "raise SystemExit(2)"
            return quickstart.Command([sys.executable, "-c", code])

        quickstart.run_stages(
            outputs,
            command=command,
            ledger=quickstart.Ledger(epath.Path(tmp_path), settings),
            environment=os.environ,
        )
        return asked

    run.outputs = outputs
    run.entries = lambda: quickstart.Ledger(epath.Path(tmp_path), "s").entries
    return run


# What runs again


def test_a_second_run_runs_nothing_and_keeps_the_numbers(road):
    assert road() == list(STAGES)
    first = road.entries()
    assert road() == []
    assert road.entries() == first
    assert all(first[name]["seconds"] >= 0 for name in STAGES)
    assert all(first[name]["peak_mb"] > 0 for name in STAGES)


def test_other_settings_ask_every_stage_again(road):
    road()
    assert road(settings="other") == list(STAGES)


def record(tmp_path, name, **values):
    path = tmp_path / quickstart.LEDGER
    book = json.loads(path.read_text())
    book["stages"][name].update(values)
    path.write_text(json.dumps(book))


def test_a_stage_that_had_finished_keeps_its_numbers(road, tmp_path):
    road()
    record(tmp_path, "cut", seconds=1e6)
    assert road(settings="other") == list(STAGES)
    assert road.entries()["cut"]["seconds"] == 1e6
    assert not road.entries()["cut"]["resumed"]


def test_a_changed_output_is_measured_anew(road, tmp_path):
    road()
    record(tmp_path, "count", seconds=1e6)
    road.outputs["count"].unlink()
    assert road(content="[]") == ["count", "show"]
    assert road.entries()["count"]["seconds"] < 1e6
    assert not road.entries()["count"]["resumed"]


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_output_runs_that_stage_and_what_follows(road, name):
    road()
    road.outputs[name].unlink()
    assert road() == list(STAGES[STAGES.index(name) :])


def test_an_output_that_changed_is_looked_at_again(road):
    road()
    road.outputs["count"].write_text("[1]")
    assert road() == ["count", "show"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stages": 3}', '{"other": {}}'])
def test_a_damaged_ledger_costs_a_look_at_every_stage(road, tmp_path, text):
    road()
    (tmp_path / quickstart.LEDGER).write_text(text)
    assert road() == list(STAGES)
    assert road() == []


def test_a_failed_stage_ends_the_run_and_is_resumed(road):
    with pytest.raises(UserError, match="exit status 2"):
        road(fail="count")
    assert road() == ["count", "show"]
    assert road.entries()["count"]["resumed"]
    assert not road.entries()["cut"]["resumed"]
    assert not road.entries()["show"]["resumed"]


def test_a_stage_that_writes_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"stage cut ended without writing .*none"):
        quickstart.run_stages(
            {"cut": epath.Path(tmp_path / "none")},
            command=lambda name: quickstart.Command([sys.executable, "-c", ""]),
            ledger=quickstart.Ledger(epath.Path(tmp_path), "s"),
            environment=os.environ,
        )


def run_one(tmp_path, code, **how):
    """One stage; returns its output and its entry of the ledger."""
    output = epath.Path(tmp_path) / "runs" / "out.jsonl"
    ledger = quickstart.Ledger(epath.Path(tmp_path), "s")
    quickstart.run_stages(
        {"ask": output},
        command=lambda name: quickstart.Command(python(code), **how),
        ledger=ledger,
        environment=os.environ,
    )
    return output, ledger.entries["ask"]


def test_what_a_stage_prints_can_be_its_output(tmp_path, capfd):
    output, _ = run_one(tmp_path, "print('{}')", captured=True)
    assert output.read_text() == "{}\n"
    assert "{}" not in capfd.readouterr().out


def test_half_of_what_a_stage_prints_is_no_output(tmp_path):
    code = "print('{}', flush=True); raise SystemExit(2)"
    with pytest.raises(UserError, match="exit status 2"):
        run_one(tmp_path, code, captured=True)
    assert not (tmp_path / "runs" / "out.jsonl").exists()


def test_a_stage_and_what_runs_beside_it_are_both_measured(tmp_path, capsys):
    mark = str(tmp_path / "beside")
    stage = f"""
        import os, time
        while not os.path.exists({mark!r}): time.sleep(0.01)
        print()
    """
    beside = python(f"open({mark!r}, 'w').close(); import time; time.sleep(600)")
    _, entry = run_one(tmp_path, stage, captured=True, companion=beside)
    assert entry["companion"]["peak_mb"] > 1
    assert "[1/1] ask, beside it" in capsys.readouterr().out


# Processes


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_seconds_and_peak_memory_are_the_processs_own():
    # Measured from a small process, as the driver is: a child's peak begins with what
    # its parent held when it was forked, and pytest may hold gigabytes.
    code = """
        import sys
        from realm_retro.cli import processes
        for work in ("import time; time.sleep(0.3)", "len(bytearray(900_000_000))"):
            usage = processes.run([sys.executable, "-c", work])
            print(usage.seconds, usage.peak_mb)
    """
    lines = subprocess.check_output(python(code), text=True).splitlines()
    (seconds, small), (_, large) = (map(float, line.split()) for line in lines)
    assert 0.3 <= seconds < 10
    assert 900 <= large < 1100
    assert small < large - 300


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(2)", r"failed \(exit status 2\)"),
        ("import os; os.kill(os.getpid(), 9)", "was killed, perhaps for memory"),
        ("import os; os.kill(os.getpid(), 15)", "ended by SIGTERM"),
    ],
)
def test_a_failure_is_one_line(code, message):
    with pytest.raises(UserError, match=message):
        processes.run(python(code))


def test_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    environment = quickstart.stage_environment(epath.Path(tmp_path))
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_driver_ends_its_stage_too(tmp_path, number):
    stage = "import time; print('up', flush=True); time.sleep(600)"
    code = f"""
        import signal, sys
        from realm_retro.cli import processes
        # A script's background jobs start with Ctrl-C ignored; this is not about them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with processes.terminated_like_ctrl_c():
            try:
                processes.run([sys.executable, "-c", {stage!r}])
            except KeyboardInterrupt:
                sys.exit(130)
    """
    driver = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "up\n"
    driver.send_signal(number)
    # The pipe closes when the stage has gone as well.
    assert driver.communicate(timeout=60)[0] == ""
    assert driver.returncode == 130


def test_a_run_waits_for_a_stage_that_outlived_its_driver(tmp_path):
    stage = "import time; print('up', flush=True); time.sleep(3)"
    code = f"""
        import os, sys, subprocess
        from etils import epath
        from realm_retro.cli import processes
        with processes.only_one(epath.Path({str(tmp_path)!r})) as lock:
            subprocess.Popen([sys.executable, "-c", {stage!r}], pass_fds=(lock,))
            os._exit(9)
    """
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        started = time.monotonic()
        with processes.only_one(epath.Path(tmp_path)):
            waited = time.monotonic() - started
    assert 1 < waited < 60
    with processes.only_one(epath.Path(tmp_path)):
        pass


# The last page

EVALUATION = {
    "documents": 201,
    "bytes": 118204,
    "results": [
        {
            "label": "OFF",
            "neighbours": 0,
            "bits_per_byte": 2.5,
            "low": 2.4,
            "high": 2.6,
        },
        {"label": "ON", "neighbours": 2, "bits_per_byte": 2, "low": 1.9, "high": 2.1},
    ],
    "difference": {"bits_per_byte": -0.5, "low": -0.6, "high": -0.4},
}
GENERATION = {
    "prompt": "The moon",
    "text": "The moon is round.",
    "continuation": " is round.",
    "chunks": [
        {
            "tokens_text": "The moon",
            "passages": [
                {
                    "title": "Moon",
                    "score": -3.25,
                    "text": "The Moon is\nEarth's " + 40 * "only " + "satellite.",
                    "document": "moon",
                }
            ],
        },
        {"tokens_text": " is round.", "passages": []},
    ],
}
STAGE_USE = {
    "prepare": {"seconds": 10.0, "peak_mb": 400, "resumed": False},
    "train": {"seconds": 200.5, "peak_mb": 1500, "resumed": True},
    "evaluate": {"attempts": 0},
}


def render(**changes):
    values = {
        "corpus": {"meta": {"attribution": "Text: Wikipedia, CC BY-SA 4.0"}},
        "index": {
            "meta": {"backend": "scann", "recall": 0.98765},
            "config": {"recall_k": 10, "recall_target": 0.95},
        },
        "evaluation": EVALUATION,
        "generation": GENERATION,
        "stages": STAGE_USE,
    }
    return quickstart_report.render(quickstart_report.Results(**{**values, **changes}))


def test_the_page_says_what_was_measured():
    page = render()
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "Held-out documents: 201, 118,204 bytes of text" in lines
    assert "retrieval OFF 0 2.5000 2.4000 … 2.6000" in lines
    assert "retrieval ON 2 2.0000 1.9000 … 2.1000" in lines
    index = "Index: scann, recall@10 against exact search 0.9877 (asked for: 0.95)"
    assert index in lines
    assert "prepare 10.0 400" in lines
    assert "train 200.5* 1500" in lines
    assert "evaluate - -" in lines
    assert "all 210.5 1500" in lines
    assert "Text: Wikipedia, CC BY-SA 4.0" in lines
    assert max(map(len, page.splitlines())) <= 88


def test_what_ran_beside_a_stage_counts_with_it():
    beside = {"companion": {"name": "refresh_index", "peak_mb": 900}}
    page = render(stages={"train": {**STAGE_USE["train"], **beside}})
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "beside it refresh_index 900" in lines
    assert "all 200.5 2400" in lines


def test_the_page_shows_the_sample_once_with_its_evidence():
    page = " ".join(render().split())
    assert "The moon ▸ is round." in page
    assert page.count("is round.") == 1
    assert "retrieved after chunk 1, “… The moon”" in page
    assert "chunk 2" not in page  # nothing was retrieved there
    assert "· Moon (score -3.250) The Moon is Earth's only" in page
    assert "satellite" not in page  # long passages are shortened, and say so
    assert "…" in page


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "retrieval helps"),
        (0.1, 0.2, "retrieval hurts"),
        (-0.1, 0.1, "no difference is shown"),
        (-0.1, 0.0, "no difference is shown"),
    ],
)
def test_the_verdict_is_the_intervals(low, high, verdict):
    difference = {"bits_per_byte": (low + high) / 2, "low": low, "high": high}
    assert verdict in render(evaluation={**EVALUATION, "difference": difference})


def test_own_text_is_not_attributed_to_anybody():
    page = render(corpus={"meta": {"attribution": ""}})
    assert "CC BY-SA" not in page


def test_the_page_is_read_from_the_workdir(tmp_path):
    manifest = {
        "meta": {"backend": "exact", "recall": 1.0, "attribution": "by many"},
        "config": {"recall_k": 10, "recall_target": 0.95},
    }
    for folder in ("corpus", "index", "runs/retro"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text(json.dumps(manifest))
    run = tmp_path / "runs" / "retro"
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    body = {"format_version": 1, "generations": [GENERATION]}
    (run / "generation.json").write_text(json.dumps(body))
    results = quickstart_report.read(epath.Path(tmp_path), name="retro", stages={})
    page = quickstart_report.render(results)
    assert "by many" in page
    assert "The moon" in page


def test_a_missing_result_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        quickstart_report.read(epath.Path(tmp_path), name="retro", stages={})
