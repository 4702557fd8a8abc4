"""Spans by passage: from bytes to whole words, stored and given back."""

import numpy as np
import pytest

from realm_retro.data import span_store
from realm_retro.data.span_store import SpansConfig, SpanStore, align
from realm_retro.errors import UserError

# "the riv|er|s ran, é": pieces of a text, and those that go on with a word.
PIECES = np.array([[0, 3], [4, 7], [7, 9], [9, 10], [11, 14], [14, 15], [16, 18]])
CONTINUES = np.array([False, False, True, True, False, False, False])


@pytest.mark.parametrize(
    ("span", "expected", "widened"),
    [
        ((0, 3), [0, 1], 0),
        ((4, 10), [1, 4], 0),
        ((4, 14), [1, 5], 0),
        ((3, 11), [1, 4], 0),  # spaces around it are nobody's
        ((5, 10), [1, 4], 1),
        ((7, 10), [1, 4], 1),  # begins with a piece, but within a word
        ((4, 9), [1, 4], 1),
        ((2, 5), [0, 4], 1),
        ((17, 18), [6, 7], 1),
        ((16, 99), [6, 7], 0),
    ],
)
def test_spans_become_whole_words(span, expected, widened):
    found = align([span], PIECES, CONTINUES)
    assert found.spans.tolist() == [expected]
    assert found.spans.dtype == np.int32
    assert (found.widened, found.empty) == (widened, 0)


def test_spans_without_a_piece_are_counted():
    found = align([(3, 4), (5, 5), (18, 30)], PIECES, CONTINUES)
    assert found.spans.shape == (0, 2)
    assert (found.widened, found.empty) == (0, 3)
    found = align([(0, 3)], PIECES[:0], CONTINUES[:0])
    assert (found.spans.shape, found.empty) == ((0, 2), 1)
    assert align([], PIECES, CONTINUES).spans.shape == (0, 2)


def test_the_same_words_are_kept_once():
    found = align([(11, 14), (5, 6), (7, 9), (4, 10)], PIECES, CONTINUES)
    assert found.spans.tolist() == [[1, 4], [4, 5]]
    assert found.widened == 2


FOUND = [
    [np.array([[0, 1], [4, 9]]), np.zeros((0, 2), int)],
    [np.zeros((0, 2), int)],
    [np.array([[2, 3]])],
]


def write(directory, found=FOUND, **config):
    stage = span_store.open_stage(
        directory, config=config, passages_fingerprint="p" * 64
    )
    for shard, spans in enumerate(found):
        span_store.write_shard(stage, shard, len(found), spans)
    stage.commit({"num_shards": len(found)})


def test_what_was_written_comes_back(tmp_path):
    write(tmp_path)
    store = SpanStore.open(tmp_path, parents={"passages": "p" * 64})
    flat = [spans for shard in FOUND for spans in shard]
    assert len(store) == len(flat)
    assert store.offsets.tolist() == [0, 2, 2, 2, 3]
    assert (store.offsets.dtype, store.spans.dtype) == (np.int64, np.int32)
    for row, spans in enumerate(flat):
        assert store.of(row).tolist() == spans.tolist()
        assert store.of(row).shape == (len(spans), 2)


def test_of_other_passages_they_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"made from passages.*cli\.tag_spans"):
        SpanStore.open(tmp_path, parents={"passages": "q" * 64})
    with pytest.raises(UserError, match="made with other settings"):
        write(tmp_path, tagger="rules")
    with pytest.raises(UserError, match=r"spans missing; run: .*cli\.tag_spans"):
        SpanStore.open(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tagger": "bert"}, "tagger is 'bert'; choose one of default, spacy"),
        ({"tagger": "annotations"}, "annotations are read from a path"),
        ({"tagger": "rules", "path": "a.jsonl"}, "path is 'a.jsonl'"),
        ({"max_masks": 0}, "max_masks must be 1 or more"),
        ({"shard_passages": 0}, "shard_passages must be 1 or more"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        SpansConfig(**settings)
