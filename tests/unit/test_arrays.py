"""Shards on disk read as their concatenation."""

import pickle

import numpy as np
import pytest
from held_files import held, linux
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from realm_retro.arrays import (
    NpyWriter,
    ShardedArray,
    flatten,
    open_npy,
    release,
    unflatten,
)
from realm_retro.errors import UserError


def save(directory, shards):
    paths = []
    for number, shard in enumerate(shards):
        paths.append(directory / f"{number}.npy")
        np.save(paths[-1], shard)
    return paths


@pytest.fixture
def rows():
    return np.arange(40, dtype=np.uint16).reshape(10, 4)


@pytest.fixture
def sharded(tmp_path, rows):
    # An empty shard in the middle: a stage may write one.
    return ShardedArray.open(save(tmp_path, [rows[:3], rows[3:3], rows[3:9], rows[9:]]))


@linux
def test_what_was_read_can_be_let_go(tmp_path):
    rows = np.arange(1 << 20, dtype=np.int64).reshape(-1, 8)
    first, second = save(tmp_path, [rows[:1000], rows[1000:]])
    array = ShardedArray.open([first, second])
    field = open_npy(second)[:, 3:5]  # a view of the mapped file
    assert field.sum() + array[:].sum() > 0
    assert held(second) > 7e6
    array.release()
    # The other mapping is another's.
    assert 0 < held(second) < 9e6
    release(field)
    assert held(first) == held(second) == 0
    np.testing.assert_array_equal(array[:], rows)


def test_arrays_in_memory_are_left_alone(rows):
    release(rows)
    ShardedArray([rows]).release()
    rows.flags.writeable = False
    release(rows)
    assert rows[9, 3] == 39


def test_shape_and_dtype(sharded):
    assert sharded.shape == (10, 4)
    assert sharded.dtype == np.uint16
    assert len(sharded) == 10


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(2, 9),
        slice(9, None, -2),
        slice(4, 4),
        slice(5, 2),
        slice(3, 9),
        slice(1, 999),
        slice(-3, None),
        [9, 0, 3, 3, 2],
        [[0, 9], [3, 4]],
        np.zeros((0,), np.int64),
        np.zeros((2, 0, 3), np.int32),
        np.array([2, 3], np.uint8),
    ],
)
def test_rows_are_those_of_the_concatenation(sharded, rows, index):
    got = sharded[index]
    want = rows[np.asarray(index)] if not isinstance(index, slice) else rows[index]
    assert got.dtype == rows.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("index", [0, 3, np.int64(9)])
def test_one_row(sharded, rows, index):
    np.testing.assert_array_equal(sharded[index], rows[index])


@pytest.mark.parametrize("index", [10, -1, [0, 10], [-1, 3]])
def test_a_row_that_is_not_there_is_an_error(sharded, index):
    # −1 means "no neighbour" elsewhere: it must never be read as the last row.
    with pytest.raises(IndexError, match="of 10"):
        sharded[index]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_cut_and_any_rows(data):
    rows = data.draw(
        hnp.arrays(np.int32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=8))
    )
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=4).map(sorted))
    sharded = ShardedArray(np.split(rows, cuts))
    wanted = data.draw(
        hnp.arrays(np.int64, st.integers(0, 9), elements=st.integers(0, len(rows) - 1))
    )
    np.testing.assert_array_equal(sharded[wanted], rows[wanted])


def test_the_result_is_a_copy(sharded, rows):
    got = sharded[:]
    got[:] = 0
    np.testing.assert_array_equal(sharded[:], rows)


def test_files_are_mapped_not_loaded(tmp_path, rows):
    (path,) = save(tmp_path, [rows])
    array = open_npy(path)
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_no_shards_is_an_error():
    with pytest.raises(ValueError, match="at least one shard"):
        ShardedArray([])


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", pickle.dumps([1])])
def test_what_is_no_array_is_named(tmp_path, content):
    path = tmp_path / "broken.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.npy: is not an array file"):
        open_npy(path)


def test_a_truncated_array_is_named(tmp_path, rows):
    (path,) = save(tmp_path, [rows])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"0\.npy: is not an array file"):
        open_npy(path)


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "objects.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is not an array file"):
        open_npy(path)


@pytest.mark.parametrize("pieces", [[], [0], [3], [1, 0, 4], [2] * 700])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_appended_rows_are_read_back(tmp_path, pieces, shape):
    rows = np.arange(sum(pieces) * int(np.prod(shape)), dtype=np.float32)
    rows = rows.reshape(-1, *shape)
    with NpyWriter(tmp_path / "rows.npy", np.float32, shape) as writer:
        for piece in np.split(rows, np.cumsum(pieces)[:-1]) if pieces else ():
            writer.append(piece)
    assert writer.rows == sum(pieces)
    got = np.load(tmp_path / "rows.npy")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, rows)


def test_appended_rows_take_the_files_dtype_and_shape(tmp_path):
    with NpyWriter(tmp_path / "rows.npy", "uint16", (2,)) as writer:
        writer.append([[1, 2]])
        with pytest.raises(ValueError, match="rows"):
            writer.append([[1, 2, 3]])
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), [[1, 2]])


def test_flat_names():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
