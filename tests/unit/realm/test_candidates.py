"""From hits to candidates: nothing that gives the answer away, the null one first."""

import numpy as np
import pytest
import tiny_passages
import toy_pretraining as toy
from realm_examples import small_realm

from realm_retro.realm import candidates

CONFIG = small_realm(title_length=5, body_length=20, max_positions=40)
FACT = "the loire flows through france in the river"
TEXTS = [
    f"{FACT} . the oder flows through poland in the river and the volga",  # 0 and 1
    f"in the river . {FACT}",  # a quotation
    "the loire flows through france",  # half of it
    "the niger flows through mali",
    FACT,  # a copy
    "the mekong flows through laos",
    "the danube flows in austria",
]
QUERY_OF = 0  # the passage that the query comes from


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    titles = ["river", *(f"the {river}" for river in toy.RIVERS[:6])]
    found = tiny_passages.write_passages(
        folder / "passages",
        tiny_passages.documents(TEXTS, titles),
        tokenizer_json=toy.save_tokenizer(folder / "tokenizer"),
        length=12,
        title_length=4,
        validation_fraction=0.0,
    )
    assert found.document[: len(found)].tolist()[:3] == [0, 0, 1]
    return found


def row_of(store, document):
    return int(store.first_passage[document])


def choose(store, hits, *, wanted=2, copied=0.8, query=FACT, row=QUERY_OF):
    pieces = store.tokenizer.encode(query, add_special_tokens=False).ids
    queries = np.zeros((1, 16), np.int32)
    queries[0, : len(pieces)] = pieces
    return candidates.choose(
        np.asarray([hits], np.int64),
        store,
        rows=np.array([row]),
        queries=queries,
        lengths=np.array([len(pieces)]),
        wanted=wanted,
        copied=copied,
    )


def test_hits_of_the_own_document_go_before_the_cut(store):
    own, other = row_of(store, 0) + 1, row_of(store, 1) - 1
    assert own == other, "the document has two passages"
    third, fourth = row_of(store, 3), row_of(store, 5)
    found = choose(store, [QUERY_OF, own, third, fourth])
    assert found.ids.tolist() == [[third, fourth]]
    assert found.own.tolist() == [2]
    assert found.copies.tolist() == [0]


def test_copies_and_quotations_go_before_the_cut(store):
    quotation, half, copy = (row_of(store, d) for d in (1, 2, 4))
    third, fourth = row_of(store, 3), row_of(store, 5)
    found = choose(store, [copy, third, quotation, fourth, half])
    assert found.ids.tolist() == [[third, fourth]]
    assert found.copies.tolist() == [2]
    # One of four runs of five pieces is no copy; it is one where less is asked for.
    assert choose(store, [half, third]).ids.tolist() == [[half, third]]
    assert choose(store, [half, third], copied=0.25).ids.tolist() == [[third, -1]]
    # Above 1 keeps all but the own document.
    found = choose(store, [copy, QUERY_OF, quotation], copied=1.1)
    assert found.ids.tolist() == [[copy, quotation]]
    assert (found.own.tolist(), found.copies.tolist()) == ([1], [0])


def test_a_query_shorter_than_a_run_has_no_copies(store):
    copy, half = row_of(store, 4), row_of(store, 2)
    found = choose(store, [copy, half], query="the loire flows")
    assert found.ids.tolist() == [[copy, half]]


def test_what_stands_behind_a_passage_is_not_part_of_it(store):
    # Padding is 0: a query with zeros in it must not match padding.
    shortest = row_of(store, 6)
    zeros = np.zeros((1, 16), np.int32)
    found = candidates.choose(
        np.array([[shortest]]),
        store,
        rows=np.array([QUERY_OF]),
        queries=zeros,
        lengths=np.array([6]),
        wanted=1,
        copied=0.1,
    )
    assert found.ids.tolist() == [[shortest]]


def test_too_few_are_missing_not_repeated(store):
    third = row_of(store, 3)
    found = choose(store, [QUERY_OF, third, -1, -1], wanted=3)
    assert found.ids.tolist() == [[third, -1, -1]]
    assert found.own.tolist() == [1], "what is missing is of no document"
    assert choose(store, [-1, -1]).ids.tolist() == [[-1, -1]]


def test_order_is_that_of_the_search(store):
    hits = [row_of(store, d) for d in (6, 3, 5)]
    assert choose(store, hits, wanted=3).ids.tolist() == [hits]
    assert choose(store, hits[::-1], wanted=3).ids.tolist() == [hits[::-1]]


def test_rows_of_a_batch_are_apart(store):
    third, copy = row_of(store, 3), row_of(store, 4)
    pieces = store.tokenizer.encode(FACT, add_special_tokens=False).ids
    queries = np.tile(np.int32(pieces), (3, 1))
    queries[1] = 104  # the same hits, another text
    found = candidates.choose(
        np.array([[copy, third], [copy, third], [copy, third]]),
        store,
        rows=np.array([QUERY_OF, QUERY_OF, third]),
        queries=queries,
        lengths=np.full(3, len(pieces)),
        wanted=2,
        copied=0.8,
    )
    assert found.ids.tolist() == [[third, -1], [copy, third], [-1, -1]]
    assert found.own.tolist() == [0, 0, 1]
    assert found.copies.tolist() == [1, 0, 1]


def test_nothing_wanted_is_the_plain_masked_model(store):
    found = choose(store, [row_of(store, 3)], wanted=0)
    assert found.ids.shape == (1, 0)
    made = candidates.assemble(found.ids, store, CONFIG)
    assert made["body"].shape == (1, 1, CONFIG.body_length)
    assert made["valid"].tolist() == [[True]]
    assert not made["body_len"].any()


def test_the_null_document_is_first_and_empty(store):
    ids = np.array([[3, 5], [4, 2]])
    made = candidates.assemble(ids, store, CONFIG)
    assert made["valid"].all()
    for name in ("title", "title_len", "body", "body_len"):
        assert not made[name][:, 0].any(), name


def test_candidates_are_the_passages_padded_to_the_model(store):
    ids = np.array([[3, 5], [4, 2]])
    made = candidates.assemble(ids, store, CONFIG)
    shapes = {name: (x.shape, x.dtype.name) for name, x in made.items()}
    assert shapes == {
        "title": ((2, 3, CONFIG.title_length), "int32"),
        "title_len": ((2, 3), "int32"),
        "body": ((2, 3, CONFIG.body_length), "int32"),
        "body_len": ((2, 3), "int32"),
        "valid": ((2, 3), "bool"),
    }
    for i, j in np.ndindex(2, 2):
        row = int(ids[i, j])
        length = int(store.lengths[row])
        assert made["body_len"][i, j + 1] == length
        body = made["body"][i, j + 1]
        np.testing.assert_array_equal(body[:length], store.body[row][:length])
        assert not body[length:].any()
        title, size = store.title_tokens([row])
        assert made["title_len"][i, j + 1] == size[0] > 0
        np.testing.assert_array_equal(made["title"][i, j + 1, :4], title[0])


def test_missing_candidates_are_masked(store):
    made = candidates.assemble(np.array([[-1, 3], [-1, -1]]), store, CONFIG)
    assert made["valid"].tolist() == [[True, False, True], [True, False, False]]
    for name in ("title", "title_len", "body", "body_len"):
        assert not made[name][~made["valid"]].any(), name
        assert made[name][0, 2].any(), name
