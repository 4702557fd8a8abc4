"""The table shows what was measured, and no more."""

import numpy as np
import pytest
import tiny_qa

from realm_retro.cli import evaluate_qa, find_answers
from realm_retro.data.questions import Question
from realm_retro.realm.question_sets import QaConfig


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


def test_gold_recall_is_a_table_of_its_own():
    gold = {"1": value(0.75), "20": value(0.5)}
    rows = [{**row, "gold_recall": gold} for row in report()["results"]]
    *_, lexical, columns, run, last = evaluate_qa.table(report(results=rows))
    assert lexical.startswith("  BM25")
    assert columns.startswith("  gold document, 40 questions  ")
    assert columns.endswith("recall@20")
    assert "75.0 [65.0, 85.0]" in run
    assert last.startswith("  BM25")
    assert len({len(line) for line in (columns, run, last)}) == 1


def test_what_an_approximate_index_misses_is_told():
    found = report()
    run = found["results"][0]
    index = {"backend": "scann", "k": 100, "queries": 256, "recall": 0.9531}
    *_, last = evaluate_qa.table({**found, "results": [{**run, "index": index}]})
    assert last == (
        "  qa: searched with scann, which finds 95.3% of the 100 passages that exact"
        " search finds (256 questions)"
    )
    exact = {**index, "backend": "exact", "recall": 1.0}
    *_, last = evaluate_qa.table({**found, "results": [{**run, "index": exact}]})
    assert "searched" not in last


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three documents; the second one has two passages."""
    long = "Emma was there. " * 12
    return tiny_qa.write_passages(
        tmp_path_factory.mktemp("gold"), corpus=["Emma wrote.", long, "Nobody."]
    )


def measured(store, workdir, documents, ids):
    asked = [
        Question(str(i), "who", ("Emma",), document=document)
        for i, document in enumerate(documents)
    ]
    answers = find_answers.find(workdir, asked, store)
    gold = evaluate_qa._gold(asked, store)
    test = evaluate_qa.Test(asked, answers, gold, store, QaConfig(recall_at=(1, 2)))
    return test.recalls(np.array(ids))


def test_recall_of_answers_and_of_gold_documents(store, tmp_path, capsys):
    _, second, third = (store.document_id(row) for row in range(3))
    last = int(store.first_passage[2]) - 1  # of the second document
    assert last > 1
    found = measured(
        store,
        tmp_path,
        [second, third, "", "lost"],
        [[0, last], [0, -1], [0, 1], [0, 1]],
    )
    assert found["recall"]["1"]["value"] == 1
    # Of three questions with a gold document one finds it, as the second passage.
    assert found["gold_recall"]["1"]["value"] == 0
    assert found["gold_recall"]["2"]["value"] == pytest.approx(1 / 3)
    assert found["gold_recall"]["2"]["questions"] == 3
    said = capsys.readouterr().out
    assert "1 questions name a document that the corpus does not have" in said
    assert "count as not found" in said


def test_without_gold_documents_there_is_no_such_recall(store, tmp_path, capsys):
    for documents in (["", ""], ["lost", ""]):
        found = measured(store, tmp_path, documents, [[0, 1], [1, 0]])
        assert set(found) == {"recall"}
    assert "gold recall is left out" in capsys.readouterr().out


def test_without_a_run_there_are_no_answers():
    rows = [{"label": "zero-shot", "recall": {"5": value(0.5)}}]
    head, columns, _ = evaluate_qa.table(report(step=None, results=rows))
    assert "no run" in head
    assert "match" not in columns
