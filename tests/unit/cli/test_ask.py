"""Which questions are asked, and how an answer is shown."""

import json

import pytest
import tiny_qa
from absl import flags
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import ask
from realm_retro.errors import UserError
from realm_retro.realm.evidence import Answer, Evidence, Seconds

TEXT = "Zürich is old. " * 30 + "It was founded by the Romans. " + "It is rich. " * 40


def evidence(text=TEXT, answer="the Romans"):
    start = text.find(answer) if answer else -1
    span = None if start < 0 else (start, start + len(answer))
    return Evidence(3, "doc 3", "Zürich", text, 1.5, 0.75, span)


def answer(**changes):
    values = {
        "question": "who founded it",
        "text": "the Romans",
        "probability": 0.625,
        "passages": (evidence(), evidence(answer="")),
        "null_mass": 0.125,
        "seconds": Seconds(0.001, 0.002, 0.003, 0.004, 0.010),
        "cut": False,
    }
    return Answer(**{**values, **changes})


@pytest.fixture
def asked():
    """Sets flags for one test."""
    with flagsaver.flagsaver():
        yield flags.FLAGS


def questions():
    return list(ask._questions())


def test_an_excerpt_is_cut_around_the_answer():
    shown = ask.excerpt(evidence(), 120)
    assert "[[the Romans]]" in shown
    assert shown.startswith("… ")
    assert shown.endswith(" …")
    assert 100 < len(shown) <= 120 + 4 + 4
    whole = ask.excerpt(evidence(text="Built  by\nthe Romans."), 120)
    assert whole == "Built by [[the Romans]]."


@pytest.mark.parametrize("place", [0, 300, 590])
def test_an_excerpt_uses_what_the_other_side_leaves(place):
    text = "x" * place + "ROME" + "y" * (600 - place)
    shown = ask.excerpt(evidence(text, "ROME"), 100)
    assert "[[ROME]]" in shown
    assert len(shown.strip("… ")) == 104


def test_an_excerpt_without_an_answer_is_the_beginning():
    assert ask.excerpt(evidence(answer=""), 30) == TEXT[:30].strip() + " …"


def test_a_long_answer_is_shown_whole():
    text = "a" * 20 + "b" * 50 + "c" * 20
    assert "b" * 50 in ask.excerpt(evidence(text, "b" * 50), 30)


def test_what_a_person_sees():
    lines = "\n".join(ask._as_text(answer()))
    for part in (
        "Question: who founded it",
        "Answer:   the Romans   (p = 0.625)",
        "1. p(z|x) = 0.750  Zürich",
        "[[the Romans]]",
        "null document: p(z|x) = 0.125",
        "tokenise 1.0, embed 2.0, search 3.0, gather 4.0, read 10.0; 20.0 in all",
    ):
        assert part in lines
    bare = "\n".join(ask._as_text(answer(text=None, probability=None, null_mass=None)))
    assert "Answer" not in bare
    assert "null" not in bare
    assert "no passage was found" in "\n".join(ask._as_text(answer(text="")))


def test_what_a_program_sees():
    [line] = ask._as_json(answer())
    found = json.loads(line)
    passage = found["passages"][0]
    start, end = passage["span"]
    assert passage["text"][start:end] == found["text"] == "the Romans"
    assert found["seconds"]["read"] == 0.010


def test_questions_come_from_flags_and_files(asked, tmp_path):
    (tmp_path / "q.txt").write_text("who was it\n\n  where  \n")
    asked["question"].value = ["what is it", " "]
    asked["questions_file"].value = str(tmp_path / "q.txt")
    assert questions() == ["what is it", "who was it", "where"]
    (tmp_path / "q.jsonl").write_text('{"question": "when", "answers": ["now"]}\n')
    asked["questions_file"].value = str(tmp_path / "q.jsonl")
    assert questions() == ["what is it", "when"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "q.jsonl",
            b'{"question": "a"}\n{"query": "b"}',
            r"jsonl:2: has no text in the",
        ),
        ("q.jsonl", b"{", r"jsonl:1: is not JSON"),
        ("q.txt", b"\xff", "is not UTF-8"),
        (None, b"", "no such file"),
    ],
)
def test_a_bad_file_is_named(asked, tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    asked["questions_file"].value = str(tmp_path / (name or "none.txt"))
    with pytest.raises(UserError, match=message):
        questions()


def test_a_long_question_is_not_echoed_whole():
    [line] = "".join(ask._as_text(answer(question="why " * 5000))).split("Answer")[:1]
    assert line.endswith("why …")
    assert len(line) < 420


def test_a_run_to_start_from_that_is_not_there_is_all_that_is_said(tmp_path):
    tiny_qa.write_passages(tmp_path)
    config, said = tiny_qa.config("unused", init__run="before"), []
    with pytest.raises(UserError, match="has no trained run of that name"):
        ask._open(config, epath.Path(tmp_path), said.append)
    assert said == []
