"""The probe tells a machine where ScaNN runs from one where it does not, and why."""

import pytest

from realm_retro.retrieval.index import probe


def test_scann_runs_here():
    assert probe.scann_problem() is None


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        ("import scann_that_is_not_there", "No module named 'scann_that_is_not_there'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "AVX2"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "by signal 11"),
        ("raise SystemExit(3)", "status 3"),
    ],
)
def test_what_ends_a_trial_is_told(trial, problem):
    assert problem in probe.scann_problem(trial)


def test_a_trial_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(probe, "_TIMEOUT_SECONDS", 0.5)
    assert "0.5 seconds" in probe.scann_problem("import time; time.sleep(60)")
