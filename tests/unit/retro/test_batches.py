"""Windows and batches from a real chunk store: each token once, nothing mixed."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retro_examples import jit, random_params, small_config

from realm_retro import artifacts
from realm_retro.data import chunk_writer, loader
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION, ChunkStore
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import Document
from realm_retro.nn import losses
from realm_retro.retrieval import neighbours
from realm_retro.retrieval.neighbours import NeighbourTable
from realm_retro.retro.batches import (
    Windows,
    WindowSource,
    sliding_windows,
    training_windows,
)
from realm_retro.retro.model import Retro
from realm_retro.text.tokenizer import TokenizerConfig

M, K = 4, 3
NUM_DOCUMENTS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of 1 to 8 chunks; some end with a chunk, some right after one."""
    rng = np.random.default_rng(0)
    words = ["a", "the", "early", "music", "of", "western", "europe", "is", "sung"]
    corpus = [
        Document(str(i), "", " ".join(rng.choice(words, size)))
        for i, size in enumerate(rng.integers(1, 24, NUM_DOCUMENTS))
    ]
    directory = tmp_path_factory.mktemp("chunks")
    chunks = ChunksConfig(length=M, validation_fraction=0.3, train_fraction=0.7)
    tokenizer = TokenizerConfig(vocab_size=280)
    stage = chunk_writer.open_stage(
        directory, chunks=chunks, tokenizer=tokenizer, corpus_fingerprint="c" * 64
    )
    model = chunk_writer.prepare_tokenizer(corpus, tokenizer, stage)
    stage.commit(chunk_writer.build(corpus, model, chunks, stage))
    store = ChunkStore.open(directory)
    first = store.documents.first_chunk
    last_lengths = store.lengths[first[1:] - 1]
    assert set(last_lengths) == {1, 2, 3, 4}
    assert set(np.diff(first)) >= {1, 2, 5, 8}
    return store


def counted(store, windows):
    """How often each token is a target, [chunks, m]; checks that targets follow."""
    source = WindowSource(windows, store, None, 0)
    times = np.zeros((len(store), M), int)
    place = np.arange(M)
    for index in range(len(source)):
        item = source[index]
        chunks = np.repeat(windows.chunks[index], M)
        places = np.tile(place, windows.chunks.shape[1])
        for p in np.flatnonzero(item["loss_mask"]):
            here, after = (chunks[p], places[p]), (chunks[p + 1], places[p + 1])
            assert store.document[here[0]] == store.document[after[0]]
            assert M * after[0] + after[1] == M * here[0] + here[1] + 1
            assert item["tokens"][p] == store.tokens[here[0]][here[1]]
            assert item["targets"][p] == store.tokens[after[0]][after[1]]
            times[after] += 1
    return times


def real(store, rows):
    """Which tokens are there in some documents, [chunks, m]."""
    mine = np.isin(store.document[np.arange(len(store))], rows)
    return mine[:, None] & (
        np.arange(M) < store.lengths[np.arange(len(store))][:, None]
    )


def check_pieces(store, windows):
    """Each piece is a run of one document's chunks; empty places come last."""
    for chunks, pieces, scored in zip(
        windows.chunks, windows.pieces, windows.scored, strict=True
    ):
        size = (chunks >= 0).sum()
        assert size
        assert (chunks[:size] >= 0).all()
        assert not scored[size:].any()
        assert not set(pieces[size:]) & set(pieces[:size])
        for number in np.unique(pieces[:size]):
            places = np.flatnonzero(pieces[:size] == number)
            assert (np.diff(places) == 1).all()
            assert (np.diff(chunks[places]) == 1).all()
            assert len(np.unique(store.document[chunks[places]])) == 1


def lengths_and_strides():
    return st.integers(2, 6).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(1, length - 1))
    )


SUBSETS = st.sets(st.integers(0, NUM_DOCUMENTS - 1), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(subset=SUBSETS, shape=lengths_and_strides())
def test_sliding_windows_count_each_token_once(store, subset, shape):
    rows = np.array(sorted(subset))
    windows = sliding_windows(store, rows, *shape)
    expected = real(store, rows).astype(int)
    expected[store.documents.first_chunk[rows], 0] = 0  # nothing predicts BOS
    np.testing.assert_array_equal(counted(store, windows), expected)


@settings(deadline=None, max_examples=50)
@given(subset=SUBSETS, shape=lengths_and_strides())
def test_sliding_windows_are_packed(store, subset, shape):
    length, _ = shape
    windows = sliding_windows(store, np.array(sorted(subset)), *shape)
    check_pieces(store, windows)
    used = np.sort((windows.chunks >= 0).sum(axis=1))
    # Were two windows to fit into one, they would be one.
    assert len(used) < 2 or used[0] + used[1] > length


def test_sliding_windows_see_at_least_what_the_stride_leaves(store):
    length, stride = 6, 2
    row = int(np.argmax(np.diff(store.documents.first_chunk)))
    windows = sliding_windows(store, np.array([row]), length, stride)
    first = store.documents.first_chunk[row]
    for chunks, scored in zip(windows.chunks, windows.scored, strict=True):
        context = scored.argmax()
        assert context >= length - stride or chunks[0] == first


@pytest.mark.parametrize("stride", [0, 4, 5])
def test_a_stride_that_would_leave_tokens_out_is_refused(store, stride):
    # At 4, nothing in its window would come before the first token of each window.
    with pytest.raises(ValueError, match=f"stride of {stride} chunks"):
        sliding_windows(store, np.arange(3), 4, stride)


@settings(deadline=None, max_examples=30)
@given(
    split=st.sampled_from([TRAIN, DATABASE, VALIDATION]),
    length=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_training_windows_hold_each_chunk_of_the_split_once(store, split, length, seed):
    windows = training_windows(store, split, length, seed)
    check_pieces(store, windows)
    present = windows.chunks[windows.chunks >= 0]
    np.testing.assert_array_equal(np.sort(present), store.chunks_of(split))
    np.testing.assert_array_equal(windows.scored, windows.chunks >= 0)
    assert (windows.chunks[:-1] >= 0).all(), "only the last window may have room left"
    # A document goes on where it was cut.
    jumps = np.flatnonzero(np.diff(present) != 1)
    ends = store.documents.first_chunk[1:] - 1
    assert np.isin(present[jumps], ends).all()


def test_training_windows_count_all_tokens_that_something_precedes(store):
    windows = training_windows(store, TRAIN, 5, seed=0)
    rows = np.flatnonzero(store.documents.split == TRAIN)
    expected = real(store, rows).astype(int)
    starts = windows.pieces[:, 1:] != windows.pieces[:, :-1]
    starts = np.pad(starts, ((0, 0), (1, 0)), constant_values=True)
    opening = windows.chunks[starts & (windows.chunks >= 0)]
    expected[opening, 0] = 0
    np.testing.assert_array_equal(counted(store, windows), expected)


def test_training_windows_are_a_function_of_the_seed(store):
    first, again, other = (
        training_windows(store, TRAIN, 4, seed).chunks for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_an_empty_split_has_no_windows(store):
    assert len(training_windows(store, 7, 4, seed=0)) == 0
    assert len(sliding_windows(store, np.arange(0), 4, 2)) == 0


@pytest.fixture(scope="module")
def table(store, tmp_path_factory):
    """Random neighbours, a fifth of them missing, in two files."""
    rng = np.random.default_rng(4)
    ids = rng.integers(len(store), size=(len(store), K))
    ids[rng.random(ids.shape) < 0.2] = -1
    stage = artifacts.Stage.open(
        tmp_path_factory.mktemp("neighbours"),
        kind=neighbours.KIND,
        format_version=neighbours.FORMAT_VERSION,
        config={},
        parents={"chunks": store.fingerprint},
        made_by=neighbours.MADE_BY,
    )
    for shard, rows in enumerate(np.array_split(ids, 2)):
        scores = np.where(rows < 0, -np.inf, 0).astype(np.float32)
        for part, values in (("ids", rows), ("scores", scores)):
            name = neighbours.shard_name(part, shard, 2)
            with stage.write(name) as path, path.open("wb") as file:
                np.save(file, values)
    stage.commit({"num_shards": 2})
    return NeighbourTable.open(stage.directory, parents={"chunks": store.fingerprint})


@pytest.fixture(scope="module")
def source(store, table):
    """Packed windows over every other document."""
    windows = sliding_windows(store, np.arange(0, NUM_DOCUMENTS, 2), 6, 4)
    return WindowSource(windows, store, table, 2)


def test_items(source, store):
    assert len(source) == len(source.windows)
    pad = store.tokenizer.pad_id
    for index, chunks in enumerate(source.windows.chunks):
        item = source[index]
        shapes = {name: (x.shape, x.dtype.name) for name, x in item.items()}
        assert shapes == {
            "tokens": ((24,), "int32"),
            "targets": ((24,), "int32"),
            "loss_mask": ((24,), "bool"),
            "segments": ((24,), "int32"),
            "neighbours": ((6, 2, 8), "int32"),
            "neighbour_mask": ((6, 2, 8), "bool"),
        }
        tokens = item["tokens"].reshape(6, M)
        for place, chunk in enumerate(chunks):
            expected = store.tokens[int(chunk)] if chunk >= 0 else [pad] * M
            np.testing.assert_array_equal(tokens[place], expected)
        empty = np.repeat(chunks < 0, M)
        np.testing.assert_array_equal(item["segments"] < 0, empty)


def neighbour(store, chunk):
    """A chunk and the next one of its document, padded, and which tokens are real."""
    tokens, mask = np.zeros(2 * M, int), np.zeros(2 * M, bool)
    for half, part in enumerate((chunk, chunk + 1)):
        there = chunk >= 0 and part < len(store)
        if there and store.document[part] == store.document[chunk]:
            length = store.lengths[part]
            tokens[half * M :][:length] = store.tokens[part][:length]
            mask[half * M :][:length] = True
    return tokens, mask


def test_neighbours_are_those_of_the_table(source, store, table):
    seen = collections.Counter()
    for index, (chunks, pieces) in enumerate(
        zip(source.windows.chunks, source.windows.pieces, strict=True)
    ):
        item = source[index]
        for place, chunk in enumerate(chunks):
            ends = place + 1 < len(chunks) and pieces[place + 1] != pieces[place]
            for j in range(2):
                found = item["neighbours"][place, j], item["neighbour_mask"][place, j]
                near = int(table.ids[int(chunk)][j]) if chunk >= 0 else -1
                tokens, mask = neighbour(store, near)
                if chunk < 0 or near < 0:
                    why = "missing"
                elif ends:
                    # The next token is another document's and must not see them.
                    why, mask = "across", np.zeros_like(mask)
                else:
                    why = "present"
                    assert mask.any()
                seen[why] += 1
                np.testing.assert_array_equal(found[1], mask)
                np.testing.assert_array_equal(found[0][mask], tokens[mask])
    assert min(seen[why] for why in ("missing", "across", "present")) > 5


def test_fewer_neighbours_are_the_nearest(source, store, table):
    one = WindowSource(source.windows, store, table, 1)[0]
    two = source[0]
    np.testing.assert_array_equal(one["neighbours"], two["neighbours"][:, :1])
    np.testing.assert_array_equal(one["neighbour_mask"], two["neighbour_mask"][:, :1])


def unpacked(windows):
    """Each piece in a window of its own."""
    fields = collections.defaultdict(list)
    for chunks, pieces, scored in zip(
        windows.chunks, windows.pieces, windows.scored, strict=True
    ):
        for number in np.unique(pieces[chunks >= 0]):
            mine = pieces == number
            room = (0, (~mine).sum())
            for name, values, empty in (
                ("chunks", chunks, -1),
                ("pieces", pieces, -1),
                ("scored", scored, False),
            ):
                fields[name].append(np.pad(values[mine], room, constant_values=empty))
    assert len(fields["chunks"]) > len(windows)
    return Windows(**{name: np.stack(rows) for name, rows in fields.items()})


@pytest.fixture(scope="module")
def token_losses(store):
    """A small RETRO's loss of each target of a window, compiled once."""
    config = small_config(
        vocab_size=store.tokenizer.vocab_size,
        num_layers=2,
        cca_layers=(1, 2),
        encoder_layers=1,
    )
    params, model = random_params(config), Retro(config)

    @jit
    def apply(item):
        inputs = ("tokens", "segments", "neighbours", "neighbour_mask")
        logits = model.apply({"params": params}, *(item[x][None] for x in inputs))
        return losses.token_losses(logits[0], item["targets"])

    return lambda item: np.asarray(apply(item))


def test_packing_changes_no_loss(source, store, table, token_losses):
    """A window of several pieces gives each token what its piece alone would give."""

    def by_token(source):
        found = {}
        for index in range(len(source)):
            item, chunks = source[index], source.windows.chunks[index]
            nats = token_losses(item)
            for p in np.flatnonzero(item["loss_mask"]):
                found[chunks[p // M], p % M] = nats[p]
        return found

    found = by_token(source)
    expected = by_token(WindowSource(unpacked(source.windows), store, table, 2))
    assert found.keys() == expected.keys()
    for token, nats in found.items():
        assert nats == pytest.approx(expected[token], abs=1e-4), token


def test_padding_changes_no_loss(source, store, token_losses):
    # Not even through the encoder, which reads whole chunks of the decoder.
    for index in range(0, len(source), 5):
        item, chunks = source[index], source.windows.chunks[index]
        lengths = np.where(chunks >= 0, store.lengths[np.maximum(chunks, 0)], 0)
        padding = (np.arange(M) >= lengths[:, None]).reshape(-1)
        spoilt = {**item, "tokens": np.where(padding, 7, item["tokens"])}
        counts = item["loss_mask"]
        found, expected = token_losses(spoilt), token_losses(item)
        np.testing.assert_array_equal(found[counts], expected[counts])


def test_the_loader_stacks_them(source):
    batch = loader.batches(source, seed=0, batch_size=3)[1]
    assert batch["neighbour_mask"].shape == (3, 6, 2, 8)
    assert batch["tokens"].shape == (3, 24)
