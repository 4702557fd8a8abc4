"""The stage finds each set of questions once, and training shares what it found."""

import pytest
import tiny_qa
from etils import epath

from realm_retro.cli import find_answers
from realm_retro.data.passages import PassageStore
from realm_retro.realm import question_sets
from realm_retro.realm.question_sets import QaConfig


@pytest.fixture
def workdir(tmp_path):
    tiny_qa.write_passages(tmp_path)
    tiny_qa.write_questions(tmp_path / "q.jsonl")
    return epath.Path(tmp_path)


def test_both_sets_are_found_once(workdir, capsys):
    config = tiny_qa.config(workdir / "q.jsonl")
    find_answers.main(config, workdir)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(" in 8 passages" in line for line in said)
    assert len(list((workdir / "answers").iterdir())) == 2
    find_answers.main(config, workdir)
    assert not capsys.readouterr().out
    settings = QaConfig(questions=str(workdir / "q.jsonl"), holdout=0.4)
    store = PassageStore.open(workdir / "passages")
    questions = question_sets.training_questions(settings)
    # In another order they are other rows of the store.
    find_answers.find(workdir, questions[::-1], store)
    assert len(list((workdir / "answers").iterdir())) == 3


def test_what_cannot_be_looked_for_is_said(workdir, capsys):
    rows = [
        {"question": "which letter", "answers": ["A", "zork"]},
        {"question": "which year", "answer_regex": r"\d+"},
    ]
    questions = tiny_qa.write_questions(workdir / "odd.jsonl", rows)
    find_answers.main(tiny_qa.config(questions, qa__holdout=0.0), workdir)
    said = capsys.readouterr().out
    assert "answers: 1 of 2 questions have an answer in 8 passages, 1 pairs" in said
    assert "answers: 1 answers are an article or a punctuation mark alone" in said
    assert "answers: 1 regular expressions have no fixed letters" in said
