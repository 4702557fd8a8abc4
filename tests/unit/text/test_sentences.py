"""Sentences: where they end, and where a full stop ends none."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text.sentences import sentence_spans, sentence_starts


def sentences(text):
    data = text.encode()
    return [data[start:end].decode() for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    "parts",
    [
        ["It rained.", "Then it stopped!", "Did it?", "3 days later it did."],
        ['He said "Go."', '"Where to?" she asked.'],
        ["A heading", "A line", "another line"],
        ["Wait…", "Écoute.", "«Oui.»", "(Fin.)"],
    ],
)
def test_borders(parts):
    assert sentences(" ".join(parts[:2]) + "\n" + " \n ".join(parts[2:])) == parts or (
        sentences("\n".join(parts)) == parts
    )


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Watson met Mr. Holmes of St. Louis.",
        "J. R. R. Tolkien wrote it.",
        "It cost 3.5 million.",
        "The U.S. Army came.",
        "It is e.g. Small.",
        "It was approx. 40 km.",
        "He asked why. and left.",
    ],
)
def test_no_borders(text):
    assert sentence_starts(text) == [0]


def test_chinese_needs_no_space():
    assert sentences("中国人。中国！「人？」国") == [
        "中国人。",
        "中国！",
        "「人？」",
        "国",
    ]


@given(st.text(alphabet="aB. \n!é。\"'"))
def test_spans_are_in_order_and_leave_out_only_space(text):
    spans = sentence_spans(text).tolist()
    data = text.encode()
    assert all(start < end for start, end in spans)
    assert spans == sorted(spans)
    kept = b"".join(data[start:end] for start, end in spans).decode()
    assert "".join(kept.split()) == "".join(text.split())


@pytest.mark.parametrize(
    "text", ["." * 40_000, " " * 40_000, ". " * 40_000, '"' * 40_000]
)
def test_odd_texts_take_no_time(text):
    started = time.monotonic()
    sentence_starts(text)
    assert time.monotonic() - started < 2
