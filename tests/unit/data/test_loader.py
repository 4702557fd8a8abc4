"""Batches are a pure function of (seed, step), whoever reads them."""

import itertools
import threading

import numpy as np
import pytest

from realm_retro.data.loader import Rows, batches, prefetch
from realm_retro.errors import UserError


class Source:
    """Rows that name themselves, and remember which were read."""

    def __init__(self, size):
        self.size = size
        self.read = []

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.read.append(int(row))
        return {"row": np.int64(row), "pair": np.array([row, -row])}


def rows(loader, steps):
    return [row for step in steps for row in loader[step]["row"].tolist()]


def test_every_epoch_holds_every_row_once_in_a_new_order():
    loader = batches(Source(20), seed=3, batch_size=4)
    epochs = [rows(loader, range(5 * e, 5 * e + 5)) for e in range(6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert all(epoch != list(range(20)) for epoch in epochs)


def test_a_batch_may_span_epochs_and_exceed_the_source():
    loader = batches(Source(3), seed=0, batch_size=5)
    seen = rows(loader, range(3))
    for epoch in range(5):
        assert sorted(seen[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]


def test_a_step_depends_on_the_seed_and_nothing_else():
    first = batches(Source(50), seed=7, batch_size=8)
    again = batches(Source(50), seed=7, batch_size=8)
    assert rows(first, range(10)) == rows(first, range(10))
    assert rows(again, [9]) == rows(first, [9])
    other = batches(Source(50), seed=8, batch_size=8)
    assert rows(other, range(6)) != rows(first, range(6))
    # The epochs of one seed are not those of the next seed, one further.
    seed_1 = batches(Source(48), seed=1, batch_size=48)
    seed_0 = batches(Source(48), seed=0, batch_size=48)
    assert rows(seed_1, [0]) != rows(seed_0, [1])


def test_arrays_are_stacked():
    batch = batches(Source(10), seed=0, batch_size=3)[2]
    assert batch["row"].shape == (3,)
    assert batch["pair"].shape == (3, 2)
    np.testing.assert_array_equal(batch["pair"][:, 1], -batch["row"])


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_share_the_global_batch_and_read_only_their_rows(process_count):
    whole = batches(Source(40), seed=1, batch_size=6)[11]
    shares = []
    for index in range(process_count):
        source = Source(40)
        share = batches(source, seed=1, batch_size=6).local(11, index, process_count)
        assert source.read == share["row"].tolist()
        assert len(source.read) == 6 // process_count
        shares.append(share)
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), array)


def test_an_uneven_split_among_processes_is_refused():
    loader = batches(Source(40), seed=1, batch_size=6)
    with pytest.raises(UserError, match=r"batch_size=6 .* multiple of 4"):
        loader.local(0, 0, 4)


def test_an_empty_source_is_one_line():
    with pytest.raises(UserError, match="nothing to make batches of"):
        batches(Source(0), seed=0, batch_size=2)


def test_prefetch_continues_where_asked():
    loader = batches(Source(30), seed=5, batch_size=4)
    ahead = prefetch(loader, 6, depth=3)
    for step, batch in zip(range(6, 14), ahead, strict=False):
        np.testing.assert_array_equal(batch["row"], loader[step]["row"])
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_prefetch_reads_ahead_but_not_further():
    read = []

    class Steps:
        def __len__(self):
            return 100

        def __getitem__(self, step):
            read.append(step)
            return step

    ahead = prefetch(Steps(), 0, depth=2)
    assert next(ahead) == 0
    ahead.close()
    assert sorted(read) == [0, 1, 2]


def test_prefetch_raises_what_reading_raises():
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, step):
            raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 4"):
        next(prefetch(Broken(), 4))


def test_a_choice_of_rows_is_drawn_from():
    found = batches(Rows(np.array([3, 5, 8])), seed=0, batch_size=3)[0]
    assert sorted(found["row"].tolist()) == [3, 5, 8]
