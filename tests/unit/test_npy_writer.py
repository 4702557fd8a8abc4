"""Appended rows read back as one ordinary .npy file."""

import numpy as np
import pytest

from realm_retro.arrays import NpyWriter, open_npy


@pytest.mark.parametrize("counts", [[], [0], [3], [1, 0, 2, 1000]])
@pytest.mark.parametrize("row_shape", [(), (4,)])
def test_rows_come_back(tmp_path, counts, row_shape):
    parts = [np.random.default_rng(n).integers(0, 99, (n, *row_shape)) for n in counts]
    with NpyWriter(tmp_path / "a.npy", np.uint16, row_shape) as writer:
        for part in parts:
            writer.append(part)
    array = open_npy(tmp_path / "a.npy")
    assert array.dtype == np.uint16
    assert array.shape == (sum(counts), *row_shape)
    expected = np.concatenate([np.zeros((0, *row_shape)), *parts])
    np.testing.assert_array_equal(array, expected)


def test_records_come_back(tmp_path):
    dtype = np.dtype([("a", "<i4"), ("b", "<i8", (2,))])
    rows = np.array([(1, (2, 3)), (4, (5, 6))], dtype)
    with NpyWriter(tmp_path / "a.npy", dtype) as writer:
        writer.append(rows[:1])
        writer.append(rows[1:])
    array = open_npy(tmp_path / "a.npy")
    assert array["b"].tolist() == [[2, 3], [5, 6]]


def test_rows_of_another_shape_are_refused(tmp_path):
    with (
        NpyWriter(tmp_path / "a.npy", np.int8, (4,)) as writer,
        pytest.raises(ValueError, match="rows"),
    ):
        writer.append(np.zeros((2, 3)))
