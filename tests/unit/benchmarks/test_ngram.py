"""The n-gram baseline against hand-worked numbers and a slow, separate model."""

import collections
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from realm_retro.data import chunk_store, chunk_writer
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION, ChunkStore
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import Document
from realm_retro.errors import UserError
from realm_retro.text.tokenizer import TokenizerConfig

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "ngram.py"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ngram = load(PROGRAM)

BOS, EOS, A, B = range(4)


def laid_out(documents):
    """Units end to end, and where documents begin."""
    units = np.concatenate([np.asarray(d, np.uint16) for d in documents])
    begins = np.zeros(len(units), bool)
    begins[np.cumsum([0, *(len(d) for d in documents[:-1])])] = True
    return units, begins


class Slow:
    """Modified Kneser-Ney from its definition, with dictionaries of tuples."""

    def __init__(self, documents, order, vocabulary, bos=BOS):
        self.order, self.vocabulary = order, vocabulary
        plain = collections.Counter()
        preceding = collections.defaultdict(set)
        for document in documents:
            for end in range(2, len(document) + 1):
                for start in range(max(0, end - order), end):
                    gram = tuple(document[start:end])
                    plain[gram] += 1
                    if start > 0:
                        preceding[gram].add(document[start - 1])
        self.counts = collections.defaultdict(dict)
        for gram, count in plain.items():
            whole = len(gram) == order or gram[0] == bos
            kept = count if whole else len(preceding[gram])
            self.counts[gram[:-1]][gram[-1]] = kept
        self.discounts = [self._discounts(k) for k in range(order)]

    def _discounts(self, context_length):
        n = collections.Counter(
            count
            for context, counts in self.counts.items()
            if len(context) == context_length
            for count in counts.values()
        )
        if not all(n[c] for c in (1, 2, 3, 4)):
            return 0.5, 1.0, 1.5
        y = n[1] / (n[1] + 2 * n[2])
        one = 1 - 2 * y * n[2] / n[1]
        two = 2 - 3 * y * n[3] / n[2]
        three = 3 - 4 * y * n[4] / n[3]
        if 0 <= one <= 1 and 0 <= two <= 2 and 0 <= three <= 3:
            return one, two, three
        return 0.5, 1.0, 1.5

    def __call__(self, word, context):
        lower = self(word, context[1:]) if context else 1 / self.vocabulary
        counts = self.counts.get(tuple(context))
        if counts is None:
            return lower
        taken = {
            w: self.discounts[len(context)][min(c, 3) - 1] for w, c in counts.items()
        }
        total = sum(counts.values())
        own = counts[word] - taken[word] if word in counts else 0.0
        return (own + sum(taken.values()) * lower) / total


@functools.cache
def corpus():
    """Documents of a skewed chain over 20 units, where all discounts exist."""
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(0, 120, 60):
        units = [BOS]
        for _ in range(length):
            jump = 2 + int(rng.zipf(1.6)) % 17
            units.append(2 + (units[-1] * 3 + jump) % 16)
        documents.append([*units, EOS])
    return documents


def test_hand_worked_example():
    units, begins = laid_out([[BOS, A, B, EOS], [BOS, A, A, EOS]])
    model = ngram.train(units, begins, order=2, vocabulary=4)
    found = ngram.probabilities(model, units, begins, vocabulary=4)
    # Unigrams count their different left neighbours: EOS 2 (B, A), A 2 (BOS, A), B 1,
    # of 5; too few for estimates, so 1 loses 0.5 and 2 loses 1: (1 + 1 + 0.5) / 5 of
    # the mass is spread over the 4 units.
    eos, a, b = 1 / 5 + 0.125, 1 / 5 + 0.125, 0.5 / 5 + 0.125
    after_bos = (2 - 1) / 2 + 1 / 2 * a
    # A is followed by A, B and EOS, once each.
    expected = [after_bos, 0.5 / 3 + 0.5 * b, 0.5 + 0.5 * eos]
    expected += [after_bos, 0.5 / 3 + 0.5 * a, 0.5 / 3 + 0.5 * eos]
    np.testing.assert_allclose(found[~begins], expected, rtol=1e-6)


def test_discounts_of_chen_and_goodman():
    counts = np.repeat([0, 1, 2, 3, 4, 9], [7, 10, 4, 2, 1, 5])
    y = 10 / (10 + 2 * 4)
    expected = 1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2
    np.testing.assert_allclose(ngram._discounts(counts), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_agrees_with_the_slow_model(order):
    documents = corpus()
    model = ngram.train(*laid_out(documents), order=order, vocabulary=20)
    slow = Slow(documents, order, 20)
    for fast, discounts in zip(model, slow.discounts, strict=True):
        np.testing.assert_allclose(fast.discounts, discounts)
    if order > 2:
        assert model[2].discounts != ngram.FALLBACK
    rng = np.random.default_rng(1)
    unseen = [[BOS, *rng.integers(1, 20, 30)] for _ in range(20)]
    held_out = [*documents[:5], *unseen]
    units, begins = laid_out(held_out)
    found = ngram.probabilities(model, units, begins, vocabulary=20)[~begins]
    expected = [
        slow(document[end], document[max(0, end - order + 1) : end])
        for document in held_out
        for end in range(1, len(document))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_sums_to_one_in_any_context(order):
    model = ngram.train(*laid_out(corpus()), order=order, vocabulary=20)
    seen = [document[: 1 + end] for end, document in enumerate(corpus()[:40])]
    unseen = [[BOS], [BOS, 19], [BOS, 18, 18, 18, 18], [BOS, 3, 19, 1, 5, 5, 5]]
    for context in seen + unseen:
        context = [u for u in context if u != EOS]
        units, begins = laid_out([[*context, unit] for unit in range(20)])
        found = ngram.probabilities(model, units, begins, vocabulary=20)
        last = np.append(begins[1:], True)
        np.testing.assert_allclose(found[last].sum(), 1, rtol=1e-6)
        assert (found[last] > 0).all()


def test_nothing_is_seen_across_documents():
    documents = corpus()
    model = ngram.train(*laid_out(documents), order=4, vocabulary=20)
    alone = [
        ngram.probabilities(model, *laid_out([document]), vocabulary=20)[1:]
        for document in documents
    ]
    units, begins = laid_out(documents)
    together = ngram.probabilities(model, units, begins, vocabulary=20)[~begins]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_interval_holds_the_ratio_and_narrows():
    rng = np.random.default_rng(0)
    num_bytes = rng.integers(100, 1000, 400)
    bits = num_bytes * rng.normal(2.0, 0.2, 400)
    low, high = ngram.interval(bits, num_bytes)
    assert low < bits.sum() / num_bytes.sum() < high
    assert (low, high) == ngram.interval(bits, num_bytes)
    fewer_low, fewer_high = ngram.interval(bits[:50], num_bytes[:50])
    assert high - low < fewer_high - fewer_low


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A real chunk store of texts from a few words, some of them not ASCII."""
    rng = np.random.default_rng(0)
    words = ["the", "of", "a", "Øre", "naïve", "東京", "river\n", "in", "1850.", "😀"]
    corpus = [
        Document(str(row), "", " ".join(rng.choice(words, 1 + row % 50)))
        for row in range(90)
    ]
    folder = tmp_path_factory.mktemp("ngram")
    chunks = ChunksConfig(length=16, validation_fraction=0.2, train_fraction=0.6)
    settings = TokenizerConfig(vocab_size=300)
    stage = chunk_writer.open_stage(
        folder / "chunks", chunks=chunks, tokenizer=settings, corpus_fingerprint="-"
    )
    tokenizer = chunk_writer.prepare_tokenizer(corpus, settings, stage)
    stage.commit(chunk_writer.build(corpus, tokenizer, chunks, stage))
    return folder


def documents_of(store, *splits):
    """Each document's ids, read chunk by chunk."""
    found = {}
    for row in np.flatnonzero(np.isin(store.documents.split, splits)):
        first, end = store.documents.first_chunk[row : row + 2]
        pieces = [store.tokens[c][: store.lengths[c]] for c in range(first, end)]
        found[int(row)] = np.concatenate(pieces).tolist()
    return found


@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("unit", ["token", "byte"])
def test_program_scores_the_text_of_held_out_documents(workdir, unit, database):
    store = ChunkStore.open(workdir / "chunks")
    splits = (TRAIN, DATABASE) if database else (TRAIN,)
    training, held_out = documents_of(store, *splits), documents_of(store, VALIDATION)
    vocabulary, bos = 300, store.tokenizer.bos_id
    if unit == "byte":
        vocabulary, bos = ngram.BYTES, ngram.BOS_BYTE
        for group in (training, held_out):
            for row, ids in group.items():
                text = store.tokenizer.decode(ids).encode()
                group[row] = [bos, *text, ngram.EOS_BYTE]
    slow = Slow(list(training.values()), 4, vocabulary, bos)
    bits = [
        -sum(np.log2(slow(d[i], d[max(0, i - 3) : i])) for i in range(1, len(d) - 1))
        for d in held_out.values()
    ]

    ngram.run(workdir, order=4, unit=unit, database=database, name="kn")

    report = json.loads((workdir / "runs/kn/evaluation.json").read_text())
    total = sum(store.documents.num_bytes[list(held_out)])
    (result,) = report["results"]
    assert report["documents"] == len(held_out)
    assert report["bytes"] == total
    assert report["training"]["documents"] == len(training)
    assert result["neighbours"] == 0
    assert result["label"].startswith("KN4")
    np.testing.assert_allclose(result["bits_per_byte"], sum(bits) / total, rtol=1e-5)
    assert result["low"] < result["bits_per_byte"] < result["high"]
    with np.load(workdir / "runs/kn/documents.npz") as saved:
        np.testing.assert_allclose(saved["bits"], bits, rtol=1e-5)
        np.testing.assert_array_equal(saved["document"], list(held_out))
        np.testing.assert_array_equal(
            saved["bytes"], store.documents.num_bytes[list(held_out)]
        )


def test_refuses_a_split_without_documents_and_wrong_bytes(workdir):
    store = ChunkStore.open(workdir / "chunks")
    with pytest.raises(UserError, match="no documents in split"):
        ngram.read(store, (max(chunk_store.SPLITS.values()) + 1,), "token")
    store.documents.num_bytes[:] += 1
    for unit in ("token", "byte"):
        with pytest.raises(UserError, match=f"the {unit}s of document"):
            ngram.read(store, (TRAIN,), unit)
