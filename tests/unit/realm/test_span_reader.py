"""The order of spans, and which of them are legal."""

import numpy as np

from realm_retro.realm import reader


def test_spans_by_width_then_place():
    found = reader.spans(3, 2)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 1], [1, 2], [2, 3], [0, 2], [1, 3]]


def test_every_span_once():
    found = [tuple(span) for span in reader.spans(9, 4).tolist()]
    wanted = {(i, j) for i in range(9) for j in range(i + 1, min(i + 4, 9) + 1)}
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_wider_than_the_input():
    assert len(reader.spans(2, 10)) == 3


def test_legal_spans_lie_in_the_body():
    allowed = np.array([[False, True, True, True, False], [False] * 5])
    legal = reader.legal_spans(allowed, 2)
    found = reader.spans(5, 2)[np.asarray(legal[0])].tolist()
    assert found == [[1, 2], [2, 3], [3, 4], [1, 3], [2, 4]]
    assert not np.asarray(legal[1]).any()
