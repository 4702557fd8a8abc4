"""Shingles and similarities are those of the definition; groups miss what they say."""

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text import near_duplicates
from realm_retro.text.near_duplicates import (
    MinHash,
    jaccard,
    minhash_for,
    pairs_of,
    shingles,
    words_of,
)

WORDS = st.lists(st.sampled_from("abc"), max_size=30)


def runs(words, length):
    """The definition of shingles, for texts of at least `length` words or fewer."""
    length = min(length, len(words))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)} - {()}


def similarity(one, other, length):
    one, other = runs(one, length), runs(other, length)
    return len(one & other) / max(1, len(one | other))


def test_what_does_not_count_of_a_text():
    assert words_of("Don't PANIC,\n42 (é)!") == ["don", "t", "panic", "42", "é"]
    assert words_of(unicodedata.normalize("NFD", "Élan")) == words_of("ÉLAN")
    assert words_of("東京is 大") == ["東", "京", "is", "大"]
    assert words_of("snake_case") == ["snake", "case"]
    assert words_of("… — 🙂\0 ") == []


@given(one=WORDS, other=WORDS, length=st.integers(1, 5))
def test_similarity_is_that_of_the_definition(one, other, length):
    a, b = shingles(one, length), shingles(other, length)
    assert len(a) == len(runs(one, length))
    assert np.all(a[1:] > a[:-1])
    assert jaccard(a, b) == jaccard(b, a) == similarity(one, other, length)


def test_a_threshold_is_met_exactly():
    numbers = np.arange(100, dtype=np.uint64)
    for common in range(4, 100, 4):
        assert jaccard(numbers[:common], numbers[: common // 4 * 5]) >= 0.8


def test_short_texts_are_one_shingle_and_empty_ones_none():
    assert len(shingles(["to", "be", "or", "not", "to", "be"])) == 1
    assert jaccard(shingles(["a", "b"]), shingles(["a", "b", "c"])) == 0
    assert len(shingles([])) == 0
    assert jaccard(shingles([]), shingles([])) == 0
    with pytest.raises(ValueError, match="without shingles"):
        MinHash(2, 3).keys(shingles([]))


def test_long_texts_are_hashed_in_blocks(monkeypatch):
    text = shingles([str(i) for i in range(100)])
    keys = MinHash(3, 7).keys(text)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 9)
    assert np.array_equal(MinHash(3, 7).keys(text), keys)


def test_hashes_are_the_same_everywhere_and_forever():
    """Another value here would make another corpus of the same config."""
    text = "The quick brown fox jumps over the lazy dog again and again until noon."
    found = shingles(words_of(text))
    assert found.tolist() == GOLDEN_SHINGLES
    assert MinHash(7, 30).keys(found)[:2].tolist() == GOLDEN_KEYS
    assert MinHash(7, 30, seed=1).keys(found)[0] != GOLDEN_KEYS[0]


GOLDEN_SHINGLES = [11238256303561607359, 12955058068585829835]
GOLDEN_KEYS = [5629135749953529028, 5878569949685179586]


def sets_of(rng, jaccard_index, size=40):
    """Two random sets of that similarity."""
    common = round(jaccard_index * size)
    numbers = rng.integers(1 << 63, size=size, dtype=np.uint64)
    cut = common + (size - common) // 2
    return np.sort(numbers[:cut]), np.sort(np.r_[numbers[:common], numbers[cut:]])


def test_a_hash_agrees_as_often_as_the_sets_are_similar():
    rng = np.random.default_rng(0)
    family = MinHash(1, 200)
    for expected in (0.2, 0.5, 0.8):
        agreed = []
        for _ in range(50):
            one, other = sets_of(rng, expected)
            assert jaccard(one, other) == pytest.approx(expected)
            agreed.append(np.mean(family.keys(one) == family.keys(other)))
        # 10,000 draws: a standard error of 0.005 at most.
        assert np.mean(agreed) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("expected", [0.3, 0.6, 0.8])
def test_groups_miss_as_many_pairs_as_they_say(expected):
    rng = np.random.default_rng(1)
    family = MinHash(4, 6)
    missed = 0
    for _ in range(1000):
        one, other = sets_of(rng, expected)
        missed += not np.any(family.keys(one) == family.keys(other))
    assert missed / 1000 == pytest.approx(family.miss_probability(expected), abs=0.05)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("miss", [0.1, 1e-3])
def test_a_family_misses_no_more_than_asked(threshold, miss):
    family = minhash_for(threshold, miss)
    assert family.rows * family.bands <= near_duplicates.MAX_HASHES
    assert family.miss_probability(threshold) <= miss
    if family.bands > 1:  # none that is asked for is in vain
        fewer = MinHash(family.rows, family.bands - 1)
        assert fewer.miss_probability(threshold) > miss


def test_the_papers_threshold():
    family = minhash_for(0.8, 1e-3)
    assert (family.rows, family.bands) == (7, 30)
    assert family.miss_probability(0.9) < 1e-8


@pytest.mark.parametrize("threshold", [0.01, 1e-9])
def test_what_cannot_be_found_is_said(threshold):
    with pytest.raises(ValueError, match="takes more than 256 hashes"):
        minhash_for(threshold, 1e-3)


@given(
    members=st.lists(
        st.tuples(st.integers(-5, 20), st.sampled_from("pqrstuv")),
        unique_by=lambda member: member[0],
    ),
    leaders=st.integers(1, 4),
)
def test_pairs_of_a_group(members, leaders):
    pairs, left_out = pairs_of(members, leaders)
    content = dict(members)
    first = {}
    for number in sorted(content):
        first.setdefault(content[number], number)
    numbers = sorted(first.values())
    wanted = [(a, b) for a, b in itertools.combinations(numbers, 2) if b >= 0]
    assert set(pairs) == {(a, b) for a, b in wanted if a in numbers[:leaders]}
    assert len(pairs) + left_out == len(wanted)
    assert pairs_of(reversed(members), leaders) == (pairs, left_out)
