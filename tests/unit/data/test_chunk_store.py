"""The chunk store gives back what was written, and never crosses a document's end."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro import artifacts
from realm_retro.data import chunk_store, chunk_writer
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION, ChunkStore
from realm_retro.data.chunk_writer import ChunksConfig, split_of
from realm_retro.data.corpus import Document, batched_by_size
from realm_retro.errors import UserError
from realm_retro.text.tokenizer import Tokenizer, TokenizerConfig

WORDS = ["the", "early", "music", "of", "western", "europe", "was", "written", "in"]
LENGTH = 8
SPECIAL = ["x", "😀 שלום ▁ e\u0301\n\0", "a", "y " * 200, "é" * 50]


def corpus_of(count):
    """Documents of many lengths, hostile ones among them."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 60, count)]
    texts[1 : 1 + len(SPECIAL)] = SPECIAL
    return [
        Document(id=f"doc {i} é", title="" if i % 5 == 0 else f"Títle {i}", text=text)
        for i, text in enumerate(texts)
    ]


def open_stage(directory, config, tokenizer=None, corpus="c" * 64):
    return chunk_writer.open_stage(
        directory,
        chunks=config,
        tokenizer=tokenizer or TokenizerConfig(vocab_size=300),
        corpus_fingerprint=corpus,
    )


def write(directory, corpus, config, tokenizer=None):
    stage = open_stage(directory, config, tokenizer)
    tokenizer = tokenizer or TokenizerConfig(vocab_size=300)
    model = chunk_writer.prepare_tokenizer(corpus, tokenizer, stage)
    stage.commit(chunk_writer.build(corpus, model, config, stage))


CONFIG = ChunksConfig(
    length=LENGTH, validation_fraction=0.2, train_fraction=0.5, shard_documents=7
)
CORPUS = corpus_of(40)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    write(directory, CORPUS, CONFIG)
    return directory


@pytest.fixture(scope="module")
def store(directory):
    return ChunkStore.open(directory)


def test_every_document_comes_back(store):
    assert len(store.documents) == len(CORPUS)
    assert store.chunk_length == LENGTH
    assert store.tokens.dtype == np.uint16
    first = store.documents.first_chunk
    assert first.dtype == np.int64
    assert (first[0], first[-1]) == (0, len(store))
    for row, document in enumerate(CORPUS):
        chunks = np.arange(first[row], first[row + 1])
        assert store.documents.id(row) == document.id
        assert store.documents.title(row) == document.title
        assert store.documents.num_bytes[row] == len(document.text.encode())
        assert store.tokenizer.decode(store.tokens[chunks].ravel()) == document.text
        assert (store.document[chunks] == row).all()
        data = document.text.encode()
        for text, (start, end) in zip(
            store.texts(chunks), store.byte_offsets[chunks], strict=True
        ):
            assert text == data[start:end].decode(errors="replace")


def test_columns_have_the_promised_types(store):
    assert store.lengths.dtype == np.int32
    assert store.document.dtype == np.int32
    assert store.byte_offsets.dtype == np.int64
    assert store.byte_offsets.shape == (len(store), 2)
    assert (np.diff(store.document[:]) >= 0).all()
    assert store.documents.split.dtype == np.uint8
    assert store.documents.num_bytes.dtype == np.int64


def test_padding_is_pad_and_only_at_the_end_of_a_document(store):
    tokens, lengths = store.tokens[:], store.lengths[:]
    padding = np.arange(LENGTH) >= lengths[:, None]
    assert (tokens[padding] == store.tokenizer.pad_id).all()
    short = np.flatnonzero(lengths < LENGTH)
    assert set(short) <= set(store.documents.first_chunk[1:] - 1)
    assert (lengths > 0).all()


def test_splits_partition_the_chunks(store):
    parts = [store.chunks_of(split) for split in (TRAIN, DATABASE, VALIDATION)]
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(store)))
    for split, part in zip((TRAIN, DATABASE, VALIDATION), parts, strict=True):
        assert (store.documents.split[store.document[part]] == split).all()
        assert part.dtype == np.int64
    for row, document in enumerate(CORPUS):
        assert store.documents.split[row] == split_of(document.id, CONFIG)


def test_continuations_against_a_loop(store):
    ids = np.arange(-1, len(store)).reshape(-1, 1)
    tokens, mask = store.with_continuation(ids)
    assert tokens.shape == mask.shape == (len(store) + 1, 1, 2 * LENGTH)
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    for (chunk,), (row,), (real,) in zip(ids, tokens, mask, strict=True):
        expected = []
        if chunk >= 0:
            expected += store.tokens[int(chunk)][: store.lengths[int(chunk)]].tolist()
            following = int(chunk) + 1
            if following < len(store) and (
                store.document[following] == store.document[int(chunk)]
            ):
                expected += store.tokens[following][: store.lengths[following]].tolist()
        assert row[real].tolist() == expected
        assert real[: len(expected)].all()
        assert (row[~real] == store.tokenizer.pad_id).all()


def test_continuation_of_nothing(store):
    tokens, mask = store.with_continuation(np.full((2, 3), -1))
    assert not mask.any()
    assert (tokens == store.tokenizer.pad_id).all()
    empty = store.with_continuation(np.zeros((0, 4), np.int64))
    assert empty[0].shape == (0, 4, 2 * LENGTH)


def test_counts_in_the_manifest(store):
    meta = store.manifest.meta
    assert meta["num_shards"] == 6
    assert meta["documents"] == len(CORPUS)
    assert meta["chunks"] == len(store)
    assert meta["tokens"] == store.lengths[:].sum()
    assert meta["bytes"] == sum(len(d.text.encode()) for d in CORPUS)
    expected = sum(len(store.tokenizer.encode(d.text)) == 1 for d in CORPUS)
    assert meta["single_token_documents"] == expected > 0
    for name, split in chunk_store.SPLITS.items():
        counts = meta["splits"][name]
        chunks = store.chunks_of(split)
        assert counts["chunks"] == len(chunks)
        assert counts["tokens"] == store.lengths[chunks].sum()
        assert counts["documents"] == (store.documents.split == split).sum()
        assert (
            counts["bytes"]
            == store.documents.num_bytes[store.documents.split == split].sum()
        )


def test_shards_and_groups_do_not_change_the_content(tmp_path, store, monkeypatch):
    in_groups = functools.partial(batched_by_size, max_chars=300)
    monkeypatch.setattr(chunk_writer, "batched_by_size", in_groups)
    write(tmp_path, CORPUS, ChunksConfig(**{**vars(CONFIG), "shard_documents": 1000}))
    other = ChunkStore.open(tmp_path)
    for name in ("tokens", "lengths", "document", "byte_offsets"):
        np.testing.assert_array_equal(getattr(other, name)[:], getattr(store, name)[:])
    for row in range(len(CORPUS)):
        assert other.documents.title(row) == store.documents.title(row)
        assert other.documents.id(row) == store.documents.id(row)


def test_the_same_corpus_gives_the_same_fingerprint(tmp_path, store):
    write(tmp_path, CORPUS, CONFIG)
    assert ChunkStore.open(tmp_path).fingerprint == store.fingerprint


class Interrupted(list):
    """A corpus that fails when one document is asked for."""

    reads = 0

    def __getitem__(self, row):
        self.reads += 1
        if self.broken_at == row:
            raise KeyboardInterrupt
        return super().__getitem__(row)


def test_an_interrupted_run_resumes_at_the_first_missing_shard(tmp_path, store):
    corpus = Interrupted(CORPUS)
    corpus.broken_at = 17  # in the third shard of seven documents each
    stage = open_stage(tmp_path, CONFIG)
    tokenizer = store.tokenizer
    with stage.write(chunk_store.TOKENIZER) as path:
        path.write_bytes(tokenizer.model)
    with pytest.raises(KeyboardInterrupt):
        chunk_writer.build(corpus, tokenizer, CONFIG, stage)
    with pytest.raises(UserError, match="chunks unfinished"):
        ChunkStore.open(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    stage = open_stage(tmp_path, CONFIG)
    corpus.broken_at, corpus.reads = None, 0
    stage.commit(chunk_writer.build(corpus, tokenizer, CONFIG, stage))
    assert corpus.reads == len(CORPUS) - 2 * 7
    assert ChunkStore.open(tmp_path).fingerprint == store.fingerprint


def test_parents_and_damage_are_checked(tmp_path):
    write(tmp_path, CORPUS, CONFIG)
    ChunkStore.open(tmp_path, parents={"corpus": "c" * 64})
    with pytest.raises(UserError, match=r"made from corpus.*cli\.prepare"):
        ChunkStore.open(tmp_path, parents={"corpus": "d" * 64})
    with pytest.raises(UserError, match="other settings"):
        open_stage(tmp_path, ChunksConfig(length=9))
    shard = tmp_path / "tokens-00002-of-00006.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-00002.*truncated"):
        ChunkStore.open(tmp_path, verify=False)


def test_no_store_names_the_command(tmp_path):
    with pytest.raises(
        UserError, match=r"chunks missing; run: .*realm_retro\.cli\.pre"
    ):
        ChunkStore.open(tmp_path / "chunks")


def test_large_vocabularies_take_four_bytes(tmp_path, store, monkeypatch):
    tokenizer = Tokenizer(store.tokenizer.model)
    monkeypatch.setattr(tokenizer, "vocab_size", (1 << 16) + 1)
    stage = open_stage(tmp_path, CONFIG)
    with stage.write(chunk_store.TOKENIZER) as path:
        path.write_bytes(tokenizer.model)
    stage.commit(chunk_writer.build(CORPUS, tokenizer, CONFIG, stage))
    other = ChunkStore.open(tmp_path)
    assert other.tokens.dtype == np.uint32
    np.testing.assert_array_equal(other.tokens[:], store.tokens[:])


# Splits


@given(
    identity=st.text(),
    validation=st.floats(0, 1),
    train=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_split_is_a_function_of_id_and_seed(identity, validation, train, seed):
    config = ChunksConfig(
        validation_fraction=validation, train_fraction=train, seed=seed, length=4
    )
    other = ChunksConfig(
        validation_fraction=validation, train_fraction=train, seed=seed, length=64
    )
    assert split_of(identity, config) == split_of(identity, other)


def test_splits_have_the_asked_sizes_and_depend_on_the_seed():
    config = ChunksConfig(validation_fraction=0.1, train_fraction=0.25)
    ids = [str(i) for i in range(4000)]
    splits = np.array([split_of(i, config) for i in ids])
    shares = np.bincount(splits, minlength=3) / len(ids)
    np.testing.assert_allclose(shares, [0.9 * 0.25, 0.9 * 0.75, 0.1], atol=0.03)
    again = ChunksConfig(validation_fraction=0.1, train_fraction=0.25, seed=1)
    assert (splits != [split_of(i, again) for i in ids]).mean() > 0.2


def test_held_out_documents_stay_held_out_when_more_is_trained_on():
    few = ChunksConfig(validation_fraction=0.1, train_fraction=0.1)
    all_ = ChunksConfig(validation_fraction=0.1, train_fraction=1.0)
    for i in range(500):
        held_out = split_of(str(i), few) == VALIDATION
        assert held_out == (split_of(str(i), all_) == VALIDATION)


def test_splits_do_not_move_between_releases():
    config = ChunksConfig(validation_fraction=0.3, train_fraction=0.5)
    splits = "".join(str(split_of(f"article {i}", config)) for i in range(24))
    assert splits == "120211002102012200200112"


@pytest.mark.parametrize("fraction", ["validation_fraction", "train_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_fractions_are_probabilities(fraction, value):
    with pytest.raises(UserError, match=rf"config\.chunks\.{fraction} is {value}"):
        ChunksConfig(**{fraction: value})


def test_nothing_to_train_on_is_one_line(tmp_path):
    config = ChunksConfig(length=4, train_fraction=0.0)
    with pytest.raises(UserError, match=r"none of the 40 documents .* train_fraction"):
        write(tmp_path, CORPUS, config)


# The tokenizer of a store


def test_a_given_tokenizer_is_taken(tmp_path, directory, store):
    model = directory / chunk_store.TOKENIZER
    config = TokenizerConfig(vocab_size=300, model=str(model))
    write(tmp_path, CORPUS, CONFIG, config)
    other = ChunkStore.open(tmp_path)
    assert other.tokenizer.fingerprint == store.tokenizer.fingerprint
    # The settings name the model, not the place where it lay.
    request = json.loads((tmp_path / artifacts.REQUEST).read_text())
    assert request["config"]["tokenizer"] == {"model": store.tokenizer.fingerprint}


def test_a_given_tokenizer_of_another_size_is_refused(tmp_path, directory):
    model = str(directory / chunk_store.TOKENIZER)
    with pytest.raises(UserError, match=r"has 300 pieces; set config\.tokenizer\.voc"):
        write(tmp_path, CORPUS, CONFIG, TokenizerConfig(vocab_size=512, model=model))


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer model"):
        write(tmp_path, CORPUS, CONFIG, TokenizerConfig(model=str(tmp_path / "t")))


def test_the_tokenizer_is_trained_on_a_sample(tmp_path):
    corpus = Interrupted(CORPUS * 10)
    corpus.broken_at = None
    config = TokenizerConfig(vocab_size=290, sample_bytes=3000)
    chunk_writer.prepare_tokenizer(corpus, config, open_stage(tmp_path, CONFIG, config))
    assert 0 < corpus.reads < 100
