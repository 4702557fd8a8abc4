"""The stored has-answer relation is `has_answer` of every question and passage."""

import dataclasses

import numpy as np
import pytest

from realm_retro.data import answer_store
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.questions import Question
from realm_retro.errors import UserError
from realm_retro.text.answers import has_answer

SHARD = 30


@dataclasses.dataclass
class Texts:
    """Passages in memory; counts how many were asked for."""

    lines: list[str]
    fingerprint: str = "f" * 64
    read: int = 0

    def __len__(self):
        return len(self.lines)

    def texts(self, rows):
        self.read += len(rows)
        return [self.lines[row] for row in rows]


PHRASES = (
    *("rome", "paris", "new york", "long island", "us", "U.S.", "the who", "who"),
    *("1988", "1988–89", "10,000", "10", "4", "september", "woodstock", "hollywood"),
    *("Röntgen", "Wilhelm", "Beatles'", "歐洲", "歐", "feet-tall", "nothing", "much"),
)


def passages(count=100, seed=0):
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(PHRASES, 6)) for _ in range(count - 1)]
    return Texts([*lines, "from New York (Long Island) on"])


def questions():
    plain = [
        ("Rome",),
        ("New York", "paris"),
        ("The Who", "who"),
        ("10",),
        ("Wilhelm Röntgen", "röntgen"),
        ("歐洲",),
        ("A", "?"),
        ("no such thing",),
        ("new york long island",),
    ]
    regex = [
        ("Sept?(ember)?",),
        ("wood", "long island"),
        (r"\b4\b",),
        ("[0-9]+",),
        ("wood",),
        ("zebra",),
    ]
    made = [(answers, False) for answers in plain] + [(a, True) for a in regex]
    return [Question(str(i), "?", *made[i]) for i in range(len(made))]


def build(directory, asked, store, shard=SHARD):
    stage = answer_store.open_stage(directory, asked, store, shard_passages=shard)
    if not stage.finished:
        meta = answer_store.build(asked, store, stage, shard_passages=shard)
        stage.commit(meta)
    return AnswerStore.open(
        directory, questions=asked, parents={"passages": store.fingerprint}
    )


def expected(asked, store):
    return [
        [
            r
            for r, text in enumerate(store.lines)
            if has_answer(text, q.answers, q.is_regex)
        ]
        for q in asked
    ]


@pytest.mark.parametrize("shard", [1, SHARD, 1000])
def test_it_is_has_answer_of_all_pairs(tmp_path, shard):
    asked, store = questions(), passages()
    found = build(tmp_path / "a", asked, store, shard)
    wanted = expected(asked, store)
    assert [found.of(q).tolist() for q in range(len(asked))] == wanted
    assert found.counts.tolist() == [len(rows) for rows in wanted]
    # Every kind of answer is found, none everywhere, or nothing was shown.
    assert [q for q, rows in enumerate(wanted) if not rows] == [6, 7, 14]
    assert max(map(len, wanted)) < len(store)
    meta = found.manifest.meta
    assert meta["pairs"] == sum(map(len, wanted))
    assert meta["questions_with_answer"] == len(asked) - 3
    assert meta["unmatchable_answers"] == 2
    assert meta["unfiltered_patterns"] == 1
    assert len(found) == len(asked)


def test_lookup_of_beams(tmp_path):
    asked, store = questions(), passages()
    found = build(tmp_path / "a", asked, store)
    wanted = expected(asked, store)
    beams = np.random.default_rng(1).permuted(np.tile(np.arange(100), (3, 1)), axis=1)
    beams[:, 7] = -1
    which = [3, 7, 12]
    has = found.has(which, beams)
    assert has.dtype == bool
    for row, question in enumerate(which):
        assert has[row].tolist() == [r in wanted[question] for r in beams[row]]
    assert found.has([0], np.zeros((1, 2, 3), int)).shape == (1, 2, 3)
    for question in (-1, len(asked)):
        with pytest.raises(IndexError):
            found.of(question)


def test_a_cut_off_run_resumes_at_the_first_missing_shard(tmp_path):
    asked, store = questions(), passages()
    whole = build(tmp_path / "whole", asked, store)

    class Cut(Texts):
        def texts(self, rows):
            if rows[0] >= 60:
                raise KeyboardInterrupt
            return super().texts(rows)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a", asked, Cut(store.lines))
    with pytest.raises(UserError, match="unfinished"):
        AnswerStore.open(tmp_path / "a", questions=asked)
    store.read = 0
    resumed = build(tmp_path / "a", asked, store)
    assert store.read == 40
    assert resumed.fingerprint == whole.fingerprint


def test_a_store_of_something_else_is_refused(tmp_path):
    asked, store = questions(), passages(10)
    build(tmp_path / "a", asked, store)
    for other in (asked[::-1], asked[1:]):
        with pytest.raises(UserError, match=r"made for 15 other questions; delete"):
            AnswerStore.open(tmp_path / "a", questions=other)
        with pytest.raises(UserError, match="made with other settings"):
            build(tmp_path / "a", other, store)
    with pytest.raises(UserError, match="was made from passages"):
        AnswerStore.open(
            tmp_path / "a", questions=asked, parents={"passages": "0" * 64}
        )
    with pytest.raises(UserError, match=r"missing; run: python -m"):
        AnswerStore.open(tmp_path / "b", questions=asked)


def test_no_passages_and_no_answers(tmp_path):
    asked = [Question("0", "?", ("zebra",))]
    found = build(tmp_path / "a", asked, Texts([]))
    assert found.of(0).tolist() == []
    assert not found.has([0], np.array([[-1, -1]])).any()
    found = build(tmp_path / "b", asked, Texts(["a lion", "no one"]))
    assert not found.has([0], np.array([[0, 1, -1]])).any()
