"""Packed inputs against lists, for every length and dtype."""

import jax
import numpy as np
import pytest

from realm_retro.realm import packing

QUERY = np.arange(201, 205)
BODY = np.arange(301, 306)


def unpacked(ids, mask):
    ids, mask = np.asarray(ids), np.asarray(mask)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert not mask[mask.sum() :].any()
    assert not ids[~mask].any()
    return ids[mask].tolist()


def test_query():
    lengths = np.arange(5)
    rows = np.tile(QUERY, (5, 1)).astype(np.uint16)
    ids, mask = jax.jit(packing.query_inputs)(rows, lengths)
    assert ids.shape == (5, 6)
    for n in lengths:
        assert unpacked(ids[n], mask[n]) == [101, *QUERY[:n], 102]


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(6))
def test_pairs(first, second):
    x, y = QUERY.astype(np.uint16), BODY.astype(np.uint16)
    ids, mask, types = packing.joint_inputs(x, np.int32(first), y, np.int32(second))
    wanted = [101, *QUERY[:first], 102, *BODY[:second], 102]
    assert unpacked(ids, mask) == wanted
    types = np.asarray(types)
    assert types[: len(wanted)].tolist() == [0] * (first + 2) + [1] * (second + 1)
    assert not types[len(wanted) :].any()
    inside = packing.body_mask(np.int32(first), np.int32(second), len(ids))
    assert np.asarray(ids)[np.asarray(inside)].tolist() == BODY[:second].tolist()
    ids, mask = packing.document_inputs(x, np.int32(first), y, np.int32(second))
    assert unpacked(ids, mask) == (wanted if first or second else [101, 102])


def test_leading_axes():
    rng = np.random.default_rng(0)
    title, body = rng.integers(200, 300, (2, 3, 4)), rng.integers(200, 300, (2, 3, 5))
    t, n = rng.integers(0, 5, (2, 3)), rng.integers(0, 6, (2, 3))
    ids, mask = jax.jit(packing.document_inputs)(title, t, body, n)
    assert ids.shape == mask.shape == (2, 3, 12)
    for at in np.ndindex(2, 3):
        wanted = packing.document_inputs(title[at], t[at], body[at], n[at])
        np.testing.assert_array_equal(ids[at], wanted[0])
        np.testing.assert_array_equal(mask[at], wanted[1])


def test_the_null_document_needs_no_room():
    none, zero = np.zeros((3, 0), np.int32), np.zeros(3, np.int32)
    ids, mask = packing.document_inputs(none, zero, none, zero)
    assert ids.tolist() == [[101, 102, 0]] * 3
    x = np.tile(QUERY, (3, 1))
    ids, mask, types = packing.joint_inputs(x, zero + 2, none, zero)
    assert unpacked(ids[0], mask[0]) == [101, 201, 202, 102, 102]
    assert types[0].tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_second_segment_begins_behind_the_first_separator():
    ids = np.array([[101, 7, 102, 8, 102, 0], [101, 102, 0, 0, 0, 0]])
    found = packing.second_segment(ids)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
