"""Who holds which rows of an index that several processes hold together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.retrieval.index import distributed
from realm_retro.retrieval.index.exact import ExactIndex


@given(
    size=st.integers(0, 200), processes=st.integers(1, 9), block_rows=st.integers(1, 40)
)
@settings(max_examples=60, deadline=None)
def test_shares_are_all_rows_in_order_and_even(size, processes, block_rows):
    shares = [
        distributed.rows_of(size, i, processes, block_rows=block_rows)
        for i in range(processes)
    ]
    rows = [row for share in shares for row in range(size)[share]]
    assert rows == list(range(size))
    lengths = [len(range(size)[share]) for share in shares]
    whole_blocks = size >= block_rows * processes
    assert max(lengths) - min(lengths) <= (2 * block_rows - 1 if whole_blocks else 1)
    if whole_blocks:
        assert all(share.start % block_rows == 0 for share in shares)


def test_one_process_holds_all():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    whole = ExactIndex.build(vectors, np.arange(30) * 3, metric="squared_l2")
    index = distributed.take_part(whole)
    assert (index.size, index.dim, index.metric) == (30, 4, "squared_l2")
    np.testing.assert_array_equal(index.ids, whole.ids)
    found, want = (each.search(vectors[:5], 4) for each in (index, whole))
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_array_equal(found.scores, want.scores)


def test_only_exact_indexes_are_cut():
    whole = ExactIndex.build(np.ones((3, 2)), np.arange(3), metric="squared_l2")
    with pytest.raises(UserError, match=r"index\.backend=exact"):
        distributed.take_part(distributed.take_part(whole))


def test_what_is_gathered_keeps_its_bits():
    value = np.asarray([2**40 + 1, -7], np.int64)
    (found,) = hosts.gather(value)
    np.testing.assert_array_equal(found, value)
    assert not hosts.together()
