"""What Beam's workers do, and the command where Beam is not installed."""

import sys

import ml_collections
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.cli import prepare_beam
from realm_retro.data import beam_steps, records
from realm_retro.data.beam_steps import PLACE_BITS
from realm_retro.data.corpus import NAMED, Report
from realm_retro.errors import UserError

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@given(counts=COUNTS, shuffle=st.randoms())
def test_a_documents_shard_is_that_of_its_row(counts, shuffle):
    reported = [(-1, 9), *enumerate(counts)]
    shuffle.shuffle(reported)
    starts = beam_steps.starts_of(reported)
    numbers = [(p << PLACE_BITS) + i for p, n in enumerate(counts) for i in range(n)]
    placed = [
        found
        for number in [-1 << PLACE_BITS, *numbers]
        for found in beam_steps.by_shard((number, "value"), starts)
    ]
    assert [number for _, (number, _) in placed] == numbers
    shards = [records.shard_of(row) for row in range(sum(counts))]
    assert [shard for shard, _ in placed] == shards


def test_shards_are_sorted_whatever_order_they_come_in():
    fields = [(f"d{i}", "", f"tëxt {i}\n\0", "") for i in range(5)]
    shuffled = [(i, fields[i]) for i in (3, 0, 4, 1, 2)]
    found = list(beam_steps._in_order(shuffled))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert [(d.id, d.title, d.text, d.origin) for _, d in found] == fields


def test_reports_add_up_in_any_order():
    def report(number):
        places = [f"{number}.{i}" for i in range(7)]
        found = Report(documents=number, empty=1, invalid_utf8=7)
        found.invalid_utf8_in = places
        return beam_steps.summary_of((number, vars(found)))

    evaluation = beam_steps.summary_of((-1, vars(Report(documents=5))))
    one = beam_steps.add_up([report(1), report(2), evaluation, report(3)])
    halves = [[report(3), evaluation], [report(2), report(1)]]
    other = beam_steps.add_up(map(beam_steps.add_up, halves))
    assert one == other
    assert (one["documents"], one["empty"], one["evaluation_documents"]) == (6, 3, 5)
    places = [place for _, place in one["invalid_utf8_in"]]
    assert places == [*(f"1.{i}" for i in range(7)), "2.0", "2.1", "2.2"]
    assert len(places) == NAMED


def test_without_beam_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    (tmp_path / "a.txt").write_text("text")
    config = ml_collections.ConfigDict(
        {"corpus": {"source": "text_files", "path": str(tmp_path / "a.txt")}}
    )
    with pytest.raises(UserError, match=r"pip install 'realm_retro\[beam\]'"):
        prepare_beam.main(config, epath.Path(tmp_path / "w"))
    assert not (tmp_path / "w" / "corpus" / "request.json").exists()
    with pytest.raises(UserError, match="is a bucket"):
        prepare_beam.main(config, epath.Path("gs://bucket/w"))
