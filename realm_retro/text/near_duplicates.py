"""Texts that are nearly the same: shared runs of words, found by MinHash.

Two texts are compared by the sets of their shingles, the runs of `length` words: their
similarity is the Jaccard index |A ∩ B| / |A ∪ B| (Borgeaud et al. 2022 remove documents
whose 13-gram similarity to an evaluation document is 0.8 or more). Comparing all pairs
is out of the question, so texts are put into groups first (Broder 1997; Indyk and
Motwani 1998): a signature has `rows` × `bands` values, each the lowest of a random
function over the set, on which two texts agree with a probability that equals their
similarity s. Texts that agree on all rows of a band are in one group; a pair is in none
with probability (1 − s^rows)^bands. Every pair of a group is then compared exactly.

All is a function of the text and the seed: nothing depends on the process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from realm_retro.text.words import UNSPACED
from realm_retro.typing import HostArray

MAX_HASHES = 256  # of a signature: the work for a text is proportional to it
# So many texts of a group are compared with all others of it; a group of a million
# web pages from one template would take 10^12 comparisons otherwise.
GROUP_LEADERS = 256

_WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 512  # shingles hashed at once: what fits a core's cache


def words_of(text: str) -> list[str]:
    """Letters and digits, lower-cased; a character each in scripts without spaces.

    Case, punctuation, white space and how accents are encoded do not count.
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def shingles(words: Sequence[str], length: int = 13) -> HostArray:
    """The set of all runs of `length` words, as hashes.

    A text of fewer words is one shingle, one without words has none.

    Returns:
      uint64 [s], ascending, each once.
    """
    if not words:
        return np.zeros(0, np.uint64)
    hashed = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    length = min(length, len(words))
    count = len(words) - length + 1
    runs = np.zeros(count, np.uint64)
    for place in range(length):  # Horner's rule, modulo 2^64
        runs = runs * _ODD + hashed[place : place + count]
    return np.unique(_mixed(runs))


def jaccard(one: HostArray, other: HostArray) -> float:
    """Similarity of two sets; 0 where one is empty.

    Args:
      one: uint64 [s], from `shingles`.
      other: likewise.
    """
    common = np.intersect1d(one, other, assume_unique=True).size
    return common / max(1, len(one) + len(other) - common)


@dataclasses.dataclass(frozen=True)
class MinHash:
    """A family of signatures.

    Attributes:
      rows: values of a band.
      bands: groups that each text is put into.
      seed: of the random functions.
    """

    rows: int
    bands: int
    seed: int = 0

    def keys(self, shingles: HostArray) -> HostArray:
        """The groups of a text, one for each band.

        Args:
          shingles: uint64 [s], at least one.

        Returns:
          int64 [bands]; texts with the same value in a place are in one group.
        """
        if not len(shingles):
            raise ValueError("a text without shingles is in no group")
        scale, shift = _functions(self.rows * self.bands, self.seed)
        lowest = np.full(len(scale), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            # A permutation of all 64-bit numbers; the hashes are already random.
            values = scale[:, None] * shingles[start : start + _BLOCK] + shift[:, None]
            np.minimum(lowest, values.min(axis=1), out=lowest)
        keys = np.arange(self.bands, dtype=np.uint64)
        for row in lowest.reshape(self.bands, self.rows).T:
            keys = _mixed(keys * _ODD + row)
        return keys.view(np.int64)

    def miss_probability(self, similarity: float) -> float:
        """That two texts of that similarity are in no group together."""
        return (1 - similarity**self.rows) ** self.bands


def minhash_for(threshold: float, miss: float, seed: int = 0) -> MinHash:
    """The most selective family that misses no more than asked.

    More rows in a band mean fewer pairs to compare in vain, and more bands to be as
    sure to find the others.

    Args:
      threshold: similarity of the least similar pairs that shall be found.
      miss: probability, at most, that such a pair is not.
      seed: of the random functions.

    Raises:
      ValueError: that takes more than `MAX_HASHES` values.
    """
    for rows in range(MAX_HASHES, 0, -1):
        agree = threshold**rows  # that two texts agree on one band
        if agree < 1e-300:  # more bands than a float can tell
            continue
        bands = 1 if agree == 1 else math.ceil(math.log(miss) / math.log1p(-agree))
        if rows * bands <= MAX_HASHES:
            return MinHash(rows, bands, seed)
    raise ValueError(
        f"finding texts of similarity {threshold} but for a share of {miss} takes more"
        f" than {MAX_HASHES} hashes of each"
    )


def pairs_of(
    members: Iterable[tuple[int, Hashable]], leaders: int = GROUP_LEADERS
) -> tuple[list[tuple[int, int]], int]:
    """Pairs of a group to compare.

    Args:
      members: number and content of each text, in any order. Of texts of equal content
        the lowest stands for all. Numbers below 0 are those of evaluation sets, which
        are not compared with each other.
      leaders: so many texts, those of the lowest numbers, are compared with all others.

    Returns:
      Pairs (lower, higher) in order, and how many were left out for `leaders`.
    """
    first: dict[Hashable, int] = {}
    for number, content in sorted(members, key=lambda member: member[0]):
        first.setdefault(content, number)
    numbers = list(first.values())
    pairs, left_out = [], 0
    for place, number in enumerate(numbers):
        if number >= 0:
            pairs += [(leader, number) for leader in numbers[: min(place, leaders)]]
            left_out += max(0, place - leaders)
    return pairs, left_out


@functools.lru_cache(1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


@functools.cache
def _functions(count: int, seed: int) -> tuple[HostArray, HostArray]:
    # Not numpy's generators: their streams may change between releases.
    data = hashlib.shake_256(f"minhash {seed}".encode()).digest(16 * count)
    values = np.frombuffer(data, "<u8").astype(np.uint64).reshape(2, count)
    return values[0] | np.uint64(1), values[1]


def _mixed(values: HostArray) -> HostArray:
    """A permutation of uint64 of which every bit depends on all others (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
