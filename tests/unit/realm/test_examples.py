"""Masked queries: one sentence, one whole span of it, a function of (seed, step)."""

import dataclasses

import numpy as np
import pytest
import tiny_passages
import toy_pretraining as toy
from realm_examples import small_realm

from realm_retro.data import span_store
from realm_retro.data.chunk_store import DATABASE, TRAIN
from realm_retro.data.span_store import SpanStore
from realm_retro.errors import UserError
from realm_retro.realm import examples
from realm_retro.realm.config import MASK_ID
from realm_retro.text import masking, spans

CONFIG = small_realm(query_length=12, body_length=32, max_positions=64, max_masks=4)
TEXTS = [
    "The Loire flows through France in 1994. In the river Oder flows the Volga. Yes.",
    "the river flows through the river",  # nothing salient
    "The river Abcdefghijk flows in the river.",  # a name of eleven pieces
    "The river flows through the river, in the river, through the river in Mali.",
    "The Niger flows through Mali.",
    *(
        f"In {country} flows the river {river}."
        for country in toy.COUNTRIES[:4]
        for river in toy.RIVERS[:3]
    ),
]
STEPS = 160
CUT = "Title 3"  # whose only name stands beyond the end of the query


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    return tiny_passages.write_passages(
        folder / "passages",
        tiny_passages.documents(TEXTS),
        tokenizer_json=toy.save_tokenizer(folder / "tokenizer"),
        length=32,
        validation_fraction=0.0,
    )


@pytest.fixture(scope="module")
def salient(store, tmp_path_factory):
    return write_spans(tmp_path_factory.mktemp("spans"), store)


def write_spans(directory, store, tagger=spans.rule_spans):
    """What a tagger finds in each passage; the rules."""
    found = [
        span_store.align(
            tagger(store.text(row)),
            store.token_spans(row),
            store.continuations[store.body[row][: store.lengths[row]]],
        ).spans
        for row in range(len(store))
    ]
    stage = span_store.open_stage(
        directory, config={}, passages_fingerprint=store.fingerprint
    )
    span_store.write_shard(stage, 0, 1, found)
    stage.commit({"num_shards": 1})
    return SpanStore.open(directory)


def make(store, found, config=CONFIG, *, masking="salient", seed=0, batch_size=4):
    return examples.make(
        store, found, config, masking=masking, seed=seed, batch_size=batch_size
    )


def each(made, steps=STEPS):
    """(row, arrays of one example) of many steps."""
    for step in range(steps):
        batch = made(step)
        for i, row in enumerate(batch["row"]):
            yield int(row), {name: x[i] for name, x in batch.items()}


@pytest.fixture(scope="module")
def asked(store, salient):
    """Many examples of salient spans."""
    return list(each(make(store, salient)))


@pytest.fixture(scope="module")
def masked(store, asked):
    """Those of them that have a target."""
    return [(row, one) for row, one in asked if store.title(row) != CUT]


def positions_of(one):
    return one["mask_positions"][one["target_mask"]]


def sentence_of(store, row, one):
    """[start, end) of the example's sentence in its passage."""
    original = one["original"][: one["query_len"]]
    body = store.body[row][: store.lengths[row]]
    [start] = [
        int(start)
        for start, stop in store.sentences(row)
        if np.array_equal(body[start : min(stop, start + len(original))], original)
    ]
    return start, start + len(original)


def test_a_batch_is_a_function_of_seed_and_step(store, salient):
    first, again = make(store, salient), make(store, salient)
    batches = [first(step) for step in range(6)]
    for step in reversed(range(6)):
        for name, x in again(step).items():
            np.testing.assert_array_equal(x, batches[step][name])
    other = make(store, salient, seed=1)
    assert any((other(s)["query"] != batches[s]["query"]).any() for s in range(6))
    # The same passage is asked differently in another epoch.
    queries = {}
    for row, one in each(first):
        queries.setdefault(row, set()).add(one["query"].tobytes())
    assert len(queries[0]) > 3


def test_every_target_is_one_whole_salient_span_of_the_sentence(store, salient, masked):
    seen = set()
    for row, one in masked:
        positions = positions_of(one)
        start, stop = sentence_of(store, row, one)
        span = (start + positions[0], start + positions[-1] + 1)
        assert span in {(a, b) for a, b in salient.of(row).tolist()}
        assert span[1] <= stop
        np.testing.assert_array_equal(positions, np.arange(*span) - start)
        seen.add((row, span))
    usable = {
        (row, (a, b))
        for row in range(len(store))
        for a, b in salient.of(row).tolist()
        if b - a <= CONFIG.max_masks
    }
    cut = {(row, span) for row, span in usable if store.title(row) == CUT}
    assert seen == usable - cut
    assert len(cut) == 1


def test_the_query_is_its_sentence_with_masks_in_place(store, masked):
    for row, one in masked:
        positions, length = positions_of(one), one["query_len"]
        body = store.body[row].astype(int)
        start, stop = sentence_of(store, row, one)
        assert length == stop - start <= CONFIG.query_length
        np.testing.assert_array_equal(one["original"][:length], body[start:stop])
        assert not one["original"][length:].any()
        assert (one["query"][positions] == MASK_ID).all()
        rest = np.setdiff1d(np.arange(CONFIG.query_length), positions)
        np.testing.assert_array_equal(one["query"][rest], one["original"][rest])
        targets = one["targets"][one["target_mask"]]
        np.testing.assert_array_equal(targets, one["original"][positions])
        assert one["target_mask"].sum() == len(positions) > 0
        assert not one["target_mask"][len(positions) :].any()


def test_shapes_and_dtypes_are_those_of_the_loss(store, salient):
    batch = make(store, salient, batch_size=3)(0)
    q, j = CONFIG.query_length, CONFIG.max_masks
    expected = {
        "query": ((3, q), np.int32),
        "original": ((3, q), np.int32),
        "query_len": ((3,), np.int32),
        "mask_positions": ((3, j), np.int32),
        "targets": ((3, j), np.int32),
        "target_mask": ((3, j), np.bool_),
        "cut": ((3,), np.int32),
        "wanted_targets": ((3,), np.int32),
        "lost_targets": ((3,), np.int32),
        "row": ((3,), np.int64),
    }
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == expected


def test_only_passages_with_something_to_mask_are_asked_from(store, salient, asked):
    rows = {row for row, _ in asked}
    assert {"Title 1", "Title 2"}.isdisjoint(store.title(row) for row in rows)
    assert rows == set(make(store, salient).rows.tolist())


def test_spans_that_cannot_be_masked_are_counted(store, salient, asked):
    cut = {store.title(row): one["cut"] for row, one in asked}
    assert cut[CUT] == 1
    assert cut["Title 4"] == 0
    # Its example has no target and so no weight, rather than half a name.
    for row, one in asked:
        assert one["target_mask"].any() == (store.title(row) != CUT)
    short = dataclasses.replace(CONFIG, max_masks=2)
    one = next(one for row, one in each(make(store, salient, short)) if row == 0)
    assert one["cut"] == 1, "1994 has four pieces"


def test_lost_targets_of_salient_spans_are_counted(store, salient, asked):
    short = dataclasses.replace(CONFIG, max_masks=2)
    cut = each(make(store, salient, short))
    for config, found in ((CONFIG, asked), (short, cut)):
        for row, one in found:
            width = np.diff(salient.of(row), axis=1)[:, 0]
            fits = (width <= config.max_masks) & (store.title(row) != CUT)
            assert one["wanted_targets"] == width.sum()
            assert one["lost_targets"] == width[~fits].sum()


@pytest.mark.parametrize("kind", ["span", "tokens"])
def test_lost_targets_of_random_masks_are_counted(store, kind):
    """Fewer masks than are wanted are a share of them, not silence."""
    one_mask = dataclasses.replace(CONFIG, max_masks=1)
    lost = wanted = kept = 0
    for _, one in each(make(store, None, one_mask, masking=kind), steps=40):
        assert one["wanted_targets"] - one["lost_targets"] == one["target_mask"].sum()
        lost += one["lost_targets"]
        wanted += one["wanted_targets"]
        kept += one["target_mask"].sum()
    assert lost == wanted - kept > 0
    batch = make(store, None, one_mask, masking=kind, batch_size=len(store))(0)
    share, weight = examples.lost_share(batch)
    assert 0 < share / weight < 1


def test_every_sentence_with_a_span_comes_up(store, asked):
    seen = {sentence_of(store, row, one) for row, one in asked if row == 0}
    assert seen == {tuple(pair) for pair in store.sentences(0)[:2].tolist()}


def test_random_spans_are_whole_words(store):
    sizes = set()
    for row, one in each(make(store, None, masking="span")):
        start, stop = sentence_of(store, row, one)
        words = masking.word_spans(store.body[row][start:stop], store.continuations)
        positions = positions_of(one)
        assert positions[0] in words[:, 0]
        assert positions[-1] + 1 in words[:, 1]
        assert np.array_equal(positions, np.arange(positions[0], positions[-1] + 1))
        sizes.add(len(positions))
    assert len(sizes) > 2
    rows = {row for row, _ in each(make(store, None, masking="span"))}
    assert rows == set(range(len(store)))


def test_random_tokens(store, salient):
    made = make(store, salient, masking="tokens")
    assert made.spans is None
    for _, one in each(made):
        positions = positions_of(one)
        assert len(positions) == max(1, round(0.15 * one["query_len"]))
        assert (positions < one["query_len"]).all()


def test_only_documents_to_train_on_are_asked_from(tmp_path):
    store = tiny_passages.write_passages(
        tmp_path / "passages",
        tiny_passages.documents(TEXTS),
        tokenizer_json=toy.save_tokenizer(tmp_path / "tokenizer"),
        length=32,
        validation_fraction=0.2,
        train_fraction=0.5,
    )
    rows = {row for row, _ in each(make(store, None, masking="span"))}
    splits = store.split[store.document[np.array(sorted(rows))]]
    assert set(splits.tolist()) == {TRAIN}
    assert len(store.passages_of(DATABASE)) > 0
    assert rows == set(store.passages_of(TRAIN).tolist())


def test_nothing_to_mask_is_one_clear_line(store, tmp_path):
    none = write_spans(tmp_path, store, lambda text: [])
    with pytest.raises(UserError, match="no training passage has anything to mask"):
        make(store, none)
    with pytest.raises(ValueError, match="needs spans"):
        make(store, None)
