"""Texts to vectors: order, batches, truncation and counts."""

import itertools

import numpy as np
import pytest
import tiny_bert
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.retrieval import embed
from realm_retro.retrieval.embed import Counts, EmbedConfig, Embedder
from realm_retro.text import wordpiece

DIM = 3
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(tiny_bert.WORDS, n)) for n in RNG.integers(0, 50, 60)]


class Recorder:
    """A cheap encoder whose vector depends on each real token and its place."""

    def __init__(self):
        self.shapes = []
        self.rows = []

    def __call__(self, ids, lengths):
        assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
        self.shapes.append(ids.shape)
        self.rows.append(int((lengths > 0).sum()))
        real = np.arange(ids.shape[1])[None] < lengths[:, None]
        assert not ids[~real].any()
        place = np.arange(1, ids.shape[1] + 1)
        total = (ids * place * real).sum(1)
        return np.stack([total, lengths, ids[:, 0]], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny_bert.write(tmp_path_factory.mktemp("encoder"))
    return wordpiece.load_tokenizer(folder / "tokenizer.json", specials=True)


def embedder_of(tokenizer, apply=None, **changes):
    settings = {
        "dim": DIM,
        "max_tokens": 40,
        "batch_tokens": 128,
        "row_multiple": 1,
        "fingerprint": "f",
        **changes,
    }
    return Embedder(apply=apply or Recorder(), tokenizer=tokenizer, **settings)


def test_order_does_not_depend_on_batches(tokenizer):
    alone = embedder_of(tokenizer)
    wanted = np.concatenate([embed.embed_texts([text], alone)[0] for text in TEXTS])
    for batch_tokens, row_multiple in ((1, 1), (128, 1), (100, 4), (10_000, 8)):
        together = embedder_of(
            tokenizer, batch_tokens=batch_tokens, row_multiple=row_multiple
        )
        vectors, counts = embed.embed_texts(TEXTS, together)
        np.testing.assert_array_equal(vectors, wanted)
        assert vectors.dtype == np.float32
        assert counts.texts == len(TEXTS)


def test_shapes_are_few_full_and_within_budget(tokenizer):
    apply = Recorder()
    embed.embed_texts(TEXTS, embedder_of(tokenizer, apply, row_multiple=2))
    lengths = [length for _, length in apply.shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) <= set(embed.bucket_lengths(40))
    assert len(set(apply.shapes)) == len(set(lengths))
    for (rows, length), filled in zip(apply.shapes, apply.rows, strict=True):
        assert rows % 2 == 0
        assert rows * length <= 128 or rows == 2
        assert filled == rows or (rows, length) == apply.shapes[-1]


def test_long_texts_keep_their_beginning_and_the_final_sep(tokenizer):
    embedder = embedder_of(tokenizer, max_tokens=5)
    found = embed.tokenise(["the of and", "the of and music", "the " * 99], embedder)
    the, of, and_ = 4, 5, 6
    assert [row.tolist() for row in found.ids] == [
        [2, the, of, and_, 3],
        [2, the, of, and_, 3],
        [2, the, the, the, 3],
    ]
    assert found.counts == Counts(texts=3, tokens=15, empty=0, truncated=2)


def test_texts_without_tokens_are_counted_and_embedded(tokenizer):
    vectors, counts = embed.embed_texts(
        ["", " \t\n", "\x00\ufffd", "the"], embedder_of(tokenizer)
    )
    assert counts == Counts(texts=4, tokens=9, empty=3, truncated=0)
    np.testing.assert_array_equal(vectors[:3], [[2 + 2 * 3, 2, 2]] * 3)


def test_no_texts(tokenizer):
    vectors, counts = embed.embed_texts([], embedder_of(tokenizer))
    assert vectors.shape == (0, DIM)
    assert counts == Counts()


def test_settings_of_the_published_tokenizer_are_reset(tokenizer):
    # tiny_bert's, like MiniLM's, pads and cuts each text to a fixed length.
    assert tokenizer.padding is None
    assert tokenizer.truncation is None


def test_windows_equal_single_texts_and_run_one_ahead(tokenizer):
    read = []

    def reader(i):
        def texts():
            read.append(i)
            return TEXTS[10 * i : 10 * i + 10]

        return texts

    embedder = embedder_of(tokenizer)
    done = []
    results = embed.embed_windows(
        (reader(i) for i in range(6)), embedder, on_progress=done.append
    )
    vectors, counts = [], Counts()
    for i, (found, counted) in enumerate(results):
        assert len(read) <= i + 2, "more than one window ahead"
        vectors.append(found)
        counts += counted
    wanted, wanted_counts = embed.embed_texts(TEXTS, embedder)
    np.testing.assert_array_equal(np.concatenate(vectors), wanted)
    assert counts == wanted_counts
    assert sum(done) == len(TEXTS)
    assert read == list(range(6))


def test_failing_reader_is_not_swallowed(tokenizer):
    def fails():
        raise UserError("chunks: gone")

    windows = iter([lambda: ["the"], fails])
    results = embed.embed_windows(windows, embedder_of(tokenizer))
    assert next(results)[1].texts == 1
    with pytest.raises(UserError, match="chunks: gone"):
        next(results)


def test_vectors_that_are_not_finite_are_refused(tokenizer):
    def broken(ids, lengths):
        return np.full((len(ids), DIM), np.nan, np.float32)

    with pytest.raises(UserError, match="not finite"):
        embed.embed_texts(["the"], embedder_of(tokenizer, broken))


def test_mean_pool_takes_real_tokens_only():
    hidden = RNG.normal(size=(3, 5, 4)).astype(np.float32)
    lengths = np.array([5, 2, 0])
    mask = np.arange(5)[None] < lengths[:, None]
    hidden[1, 2:] = 1e6
    found = np.asarray(embed.mean_pool(hidden, mask))
    np.testing.assert_allclose(found[0], hidden[0].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[1], hidden[1, :2].mean(0), atol=1e-6)
    np.testing.assert_array_equal(found[2], 0)


@given(st.integers(3, 2048))
def test_bucket_lengths(max_tokens):
    lengths = embed.bucket_lengths(max_tokens)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_tokens
    assert len(lengths) <= max(1, -(-max_tokens // 16))
    for short, long in itertools.pairwise(lengths):
        assert long - short <= max(16, short / 8)


def test_bucket_lengths_are_few():
    assert embed.bucket_lengths(128) == [16, 32, 48, 64, 80, 96, 112, 128]
    assert len(embed.bucket_lengths(512)) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "flaot16"}, "dtype='flaot16' must be 'float32' or 'float16'"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"batch_tokens": -1}, "batch_tokens=-1"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        EmbedConfig(**changes)
