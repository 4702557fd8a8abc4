"""The scorer of taggers: sentences from tokens, and both kinds of precision."""

import importlib.util
import json
import lzma
import sys
from pathlib import Path

import pytest

from realm_retro.errors import UserError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "span_tagger.py"
SPEC = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
bench = importlib.util.module_from_spec(SPEC)
sys.modules[PROGRAM.stem] = bench  # dataclasses look their module up
SPEC.loader.exec_module(bench)

TOKENS = ["Zoë", "Ash", "of", "Rome", "(", "Italy", ")", "met", "UK", "Bo", "."]
TAGS = ["I-PER", "I-PER", "O", "B-LOC", "O", "I-LOC", "O", "O", "I-LOC", "I-PER", "O"]


def test_sentences_and_their_names():
    text, gold = bench.sentence(TOKENS, TAGS)
    assert text == "Zoë Ash of Rome (Italy) met UK Bo."
    named = [text.encode()[start:end].decode() for start, end in gold]
    assert named == ["Zoë Ash", "Rome", "Italy", "UK", "Bo"]
    # A B- begins anew even next to a name of its kind.
    assert bench.sentence(["a", "b"], ["B-X", "B-X"])[1] == [(0, 1), (2, 3)]


def test_scores():
    result = bench.Score()
    result.add([(0, 4), (10, 14), (30, 34)], [(0, 4), (12, 20), (25, 28)], [])
    # A date that is part of no name is counted apart, one that is part of one is not.
    result.add([(0, 9)], [(5, 9), (20, 24)], [(5, 9), (20, 24)])
    assert result == bench.Score(
        gold=4, found=4, exact=1, found_touching=3, gold_touching=3, numbers=1
    )
    assert "exact P  25.0% R  25.0% F1  25.0%" in result.line()
    assert "touching P  75.0% R  75.0%" in result.line()
    assert "P   0.0%" in bench.Score().line()


def test_a_file_is_scored(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl.xz"
    with lzma.open(path, "wt") as file:
        file.write(json.dumps({"tokens": TOKENS, "tags": TAGS}) + "\n\n")
    monkeypatch.setattr(bench.spans, "has_spacy", lambda: False)
    monkeypatch.setattr(sys, "argv", ["span_tagger", f"--input={path}"])
    bench.main()
    said = capsys.readouterr().out
    assert "1 sentences, 5 names" in said
    assert "\nrules  exact P" in said


def test_what_is_no_sentence_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["a"], "tags": []}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: is not a sentence"):
        list(bench.read(tmp_path / "a.jsonl"))
