"""The table shows what was measured, and no more."""

from realm_retro.cli import evaluate_qa


def value(mean):
    return {"value": mean, "low": mean - 0.1, "high": mean + 0.1, "questions": 40}


def report(**changes):
    recall = {"1": value(0.25), "20": value(0.5)}
    found = {
        "questions": 1234,
        "answerable": 1200,
        "passages": 56789,
        "step": 300,
        "results": [
            {"label": "qa", "recall": recall, "exact_match": value(0.4)},
            {"label": "BM25", "recall": recall},
        ],
    }
    return {**found, **changes}


def test_the_table():
    head, columns, run, lexical = evaluate_qa.table(report())
    assert "1,234 questions, 1,200 with an answer in 56,789 passages" in head
    assert "checkpoint 300" in head
    assert columns.split("  ")[-1].strip() == "exact match"
    assert "recall@1 " in columns
    assert "recall@20" in columns
    assert "25.0 [15.0, 35.0]" in run
    assert "40.0 [30.0, 50.0]" in run
    assert lexical.rstrip().endswith("–")
    assert len({len(line) for line in (columns, run, lexical)}) == 1


def test_without_a_run_there_are_no_answers():
    rows = [{"label": "zero-shot", "recall": {"5": value(0.5)}}]
    head, columns, _ = evaluate_qa.table(report(step=None, results=rows))
    assert "no run" in head
    assert "match" not in columns
