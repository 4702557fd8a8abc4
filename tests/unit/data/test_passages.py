"""The passage store gives back all text, at words, and never crosses a document."""

import functools
import json

import numpy as np
import pytest
import tiny_passages
from tokenizers import Regex, normalizers

from realm_retro import artifacts
from realm_retro.data import passage_writer
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION
from realm_retro.data.chunk_writer import ChunksConfig, split_of
from realm_retro.data.corpus import batched_by_size
from realm_retro.data.passages import PassageConfig, PassageStore
from realm_retro.errors import UserError
from realm_retro.text import wordpiece

LENGTH = 12
HOSTILE = [
    "The café\u0301 [SEP] of Zoë — e\u0301. 中国人。中国 \u200b\u00adriver\ufe0f ",
    "\u200b \u0301",  # no wordpiece at all
    "  river\n\n\ttown\u00a0old ",
    "中国人" * 30,
    "x",
    "😀 river \0 flows. " * 9,
    "river-" * 40,
    "born 😀" * 12 + "\u0301",
]
SETTINGS = {
    "length": LENGTH,
    "title_length": 4,
    "validation_fraction": 0.2,
    "train_fraction": 0.5,
    "shard_documents": 7,
}


def corpus_of(count):
    rng = np.random.default_rng(0)
    words = [*tiny_passages.WORDS, "rivers.", "Fields!", "walking", "(old)", "É"]
    texts = [" ".join(rng.choice(words, size)) for size in rng.integers(1, 90, count)]
    texts[1 : 1 + len(HOSTILE)] = HOSTILE
    titles = [
        "" if i % 5 == 0 else f"Rivers of Zoë {i}" * (i % 3) for i in range(count)
    ]
    return tiny_passages.documents(texts, titles)


CORPUS = corpus_of(40)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    return tiny_passages.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(directory, corpus, tokenizer_json, **changes):
    settings = {**SETTINGS, **changes}
    return tiny_passages.write_passages(
        directory, corpus, tokenizer_json=tokenizer_json, **settings
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer_json):
    directory = tmp_path_factory.mktemp("store")
    write(directory, CORPUS, tokenizer_json)
    return directory


@pytest.fixture(scope="module")
def store(directory):
    return PassageStore.open(directory)


def squeezed(text):
    return "".join(text.split())


def test_every_document_comes_back(store):
    assert store.num_documents == len(CORPUS)
    assert (store.length, store.title_length) == (LENGTH, 4)
    first = store.first_passage
    assert (first[0], first[-1]) == (0, len(store))
    for row, document in enumerate(CORPUS):
        passages = np.arange(first[row], first[row + 1])
        assert (store.document[passages] == row).all()
        assert store.document_id(row) == document.id
        assert store.document_title(row) == document.title
        assert store.document_text(row) == document.text
        texts = store.texts(passages)
        if len(texts):
            assert squeezed("".join(texts)) == squeezed(document.text)
        data = document.text.encode()
        for text, (start, end) in zip(texts, store.byte_offsets[passages], strict=True):
            assert text == data[start:end].decode() == text.strip()
    assert first[2] == first[3], "a document without a wordpiece has no passage"


def test_a_passages_text_gives_exactly_its_ids(store):
    alone = wordpiece.ids_of(store.tokenizer, store.texts(np.arange(len(store))))
    for row, ids in enumerate(alone):
        length = store.lengths[row]
        assert store.body[row][:length].tolist() == ids
        assert not store.body[row][length:].any()
        assert 0 < length <= LENGTH


def test_no_passage_begins_within_a_word(store):
    first = store.body[:][:, 0]
    assert not store.continuations[first].any()


def test_token_spans_are_the_bytes_of_the_pieces(store):
    for row in range(len(store)):
        data, spans = store.text(row).encode(), store.token_spans(row)
        assert spans.dtype == np.int32
        assert spans.shape == (store.lengths[row], 2)
        for piece, (start, end) in zip(store.body[row], spans, strict=False):
            name = tiny_passages.PIECES[piece].removeprefix("##")
            shown = data[start:end].decode()
            assert name == "[UNK]" or name in (shown.lower(), {"é": "e", "ë": "e"}.get(
                shown.lower()[:1], shown.lower()[:1]
            ))  # fmt: skip


def test_sentences_partition_a_passage(store):
    found = 0
    for row in range(len(store)):
        sentences = store.sentences(row)
        assert sentences.dtype == np.int32
        assert sentences[0, 0] == 0
        assert sentences[-1, 1] == store.lengths[row]
        assert (sentences[1:, 0] == sentences[:-1, 1]).all()
        assert (sentences[:, 0] < sentences[:, 1]).all()
        found += len(sentences) > 1
    assert found


def test_titles(store, tokenizer_json):
    rows = np.arange(len(store))
    ids, lengths = store.title_tokens(rows)
    assert (ids.dtype, ids.shape) == (np.uint16, (len(store), 4))
    assert (lengths.dtype, lengths.shape) == (np.int32, (len(store),))
    tokenizer = wordpiece.load_tokenizer(tokenizer_json)
    for row in rows:
        document = CORPUS[store.document[row]]
        assert store.title(row) == document.title
        [expected] = wordpiece.ids_of(tokenizer, [document.title])
        assert lengths[row] == min(4, len(expected))
        assert ids[row].tolist() == (expected + [0] * 4)[:4]
    assert store.title_tokens(rows.reshape(-1, 1))[0].shape == (len(store), 1, 4)


def test_columns_have_the_promised_types(store):
    assert store.body.dtype == np.uint16
    assert store.lengths.dtype == np.int32
    assert store.document.dtype == np.int32
    assert (np.diff(store.document[:]) >= 0).all()
    assert store.byte_offsets.dtype == np.int64
    assert store.byte_offsets.shape == (len(store), 2)
    assert store.first_passage.dtype == np.int64
    assert store.split.dtype == np.uint8


def test_splits_are_those_of_the_chunks(store):
    chunks = ChunksConfig(validation_fraction=0.2, train_fraction=0.5)
    assert store.split.tolist() == [split_of(d.id, chunks) for d in CORPUS]
    parts = [store.passages_of(split) for split in (TRAIN, DATABASE, VALIDATION)]
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(store)))
    for split, part in zip((TRAIN, DATABASE, VALIDATION), parts, strict=True):
        assert (store.split[store.document[part]] == split).all()


def test_counts_in_the_manifest(store, tokenizer_json):
    meta = store.manifest.meta
    tokenizer = wordpiece.load_tokenizer(tokenizer_json)
    titles = wordpiece.ids_of(tokenizer, [d.title for d in CORPUS])
    texts = wordpiece.ids_of(tokenizer, [d.text for d in CORPUS])
    assert meta["num_shards"] == 6
    assert meta["documents"] == len(CORPUS)
    assert meta["passages"] == len(store)
    assert meta["tokens"] == store.lengths[:].sum() == sum(map(len, texts))
    assert meta["bytes"] == sum(len(d.text.encode()) for d in CORPUS)
    assert meta["titles_truncated"] == sum(len(ids) > 4 for ids in titles) > 0
    assert meta["unknown"] == sum(ids.count(1) for ids in texts) > 0
    assert meta["empty_documents"] == 1
    assert meta["untitled_documents"] == sum(not d.title for d in CORPUS) > 0
    assert sum(of["passages"] for of in meta["splits"].values()) == len(store)


def test_overlapping_passages(tmp_path, tokenizer_json, store):
    overlapping = write(tmp_path, CORPUS, tokenizer_json, stride=6)
    assert len(overlapping) > len(store)
    for row in range(overlapping.num_documents):
        first, last = overlapping.first_passage[row : row + 2]
        offsets = overlapping.byte_offsets[first:last]
        assert (offsets[1:, 0] > offsets[:-1, 0]).all()
        gaps = zip(offsets[:-1, 1], offsets[1:, 0], strict=True)
        data = CORPUS[row].text.encode()
        assert not any(data[end:start].strip() for end, start in gaps if start > end)


def same_content(store, other):
    for name in ("body", "lengths", "document", "byte_offsets"):
        np.testing.assert_array_equal(getattr(other, name)[:], getattr(store, name)[:])
    for document in range(len(CORPUS)):
        assert other.document_text(document) == store.document_text(document)
        assert other.document_title(document) == store.document_title(document)
    for name in ("tokens", "titles_truncated", "unknown", "splits"):
        assert other.manifest.meta[name] == store.manifest.meta[name]


def test_shards_and_groups_do_not_change_the_content(
    tmp_path, store, tokenizer_json, monkeypatch
):
    in_groups = functools.partial(batched_by_size)
    monkeypatch.setattr(passage_writer, "batched_by_size", in_groups)
    monkeypatch.setattr(passage_writer, "_GROUP_CHARS", 300)
    same_content(store, write(tmp_path, CORPUS, tokenizer_json, shard_documents=99))


def test_long_texts_are_tokenised_in_segments(
    tmp_path, store, tokenizer_json, monkeypatch
):
    monkeypatch.setattr(passage_writer, "_SEGMENT", 20)
    same_content(store, write(tmp_path, CORPUS, tokenizer_json))


class Interrupted(list):
    """A corpus that fails when one document is asked for."""

    reads = 0
    broken_at = None

    def __getitem__(self, row):
        self.reads += 1
        if self.broken_at == row:
            raise KeyboardInterrupt
        return super().__getitem__(row)


def test_an_interrupted_run_resumes_at_the_first_missing_shard(
    tmp_path, store, tokenizer_json
):
    corpus = Interrupted(CORPUS)
    corpus.broken_at = 17  # in the third shard of seven documents each
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, corpus, tokenizer_json)
    with pytest.raises(UserError, match="passages unfinished"):
        PassageStore.open(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    corpus.broken_at, corpus.reads = None, 0
    resumed = write(tmp_path, corpus, tokenizer_json)
    assert corpus.reads == len(CORPUS) - 2 * 7
    assert resumed.fingerprint == store.fingerprint
    assert resumed.manifest.meta == store.manifest.meta


def test_parents_settings_and_damage_are_checked(tmp_path, tokenizer_json):
    write(tmp_path, CORPUS, tokenizer_json)
    with pytest.raises(UserError, match=r"made from corpus.*cli\.prepare"):
        PassageStore.open(tmp_path, parents={"corpus": "d" * 64})
    with pytest.raises(UserError, match=r"passages\.length: 12 there, 13 here"):
        write(tmp_path, CORPUS, tokenizer_json, length=13)
    shard = tmp_path / "body-00002-of-00006.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"body-00002.*truncated"):
        PassageStore.open(tmp_path, verify=False)
    with pytest.raises(UserError, match=r"passages missing; run: .*cli\.prepare"):
        PassageStore.open(tmp_path / "none")


def test_the_tokenizer_is_kept_and_named_by_its_content(directory, tokenizer_json):
    copy = directory / "tokenizer.json"
    assert copy.read_bytes() == tokenizer_json.read_bytes()
    request = json.loads((directory / artifacts.REQUEST).read_text())
    assert request["config"]["tokenizer"] == artifacts.sha256(tokenizer_json)


def test_another_tokenisation_than_when_written_is_refused(tmp_path, tokenizer_json):
    found = write(tmp_path, CORPUS, tokenizer_json)
    found.tokenizer.normalizer = normalizers.Replace("r", "t")
    row = next(r for r in range(len(found)) if "river" in found.text(r))
    with pytest.raises(UserError, match=f"passage {row} is tokenised otherwise"):
        found.token_spans(row)


# Tokenizers that look across a border: "the" after a full stop becomes "old".
ACROSS = normalizers.Sequence(
    [normalizers.Replace(Regex(r"(?<=\. )the"), "old"), normalizers.BertNormalizer()]
)


def test_a_passage_that_would_read_otherwise_alone_is_cut_elsewhere(tmp_path):
    path = tiny_passages.save_tokenizer(tmp_path / "t", normalizer=ACROSS)
    text = "river river river river. the town flows"
    found = tiny_passages.write_passages(
        tmp_path / "w", tiny_passages.documents([text]), tokenizer_json=path, length=5
    )
    # After the sentence would be better, but there the second one would begin "the".
    texts = ["river river river river", ". the town flows"]
    assert found.texts(np.arange(len(found))) == texts
    assert len(found.token_spans(1)) == found.lengths[1] == 4


def test_a_tokenizer_that_cannot_be_cut_is_refused(tmp_path):
    everywhere = normalizers.Replace(Regex("(?<= )."), "t")
    path = tiny_passages.save_tokenizer(tmp_path / "t", normalizer=everywhere)
    corpus = tiny_passages.documents(["river river river river"])
    with pytest.raises(UserError, match=r"'doc 0': the text from 'river.*otherwise"):
        tiny_passages.write_passages(
            tmp_path / "w", corpus, tokenizer_json=path, length=6
        )


# Bad input


def test_a_word_longer_than_a_passage_is_one_line(tmp_path, tokenizer_json):
    corpus = tiny_passages.documents(["a river", "zxyzxyzxy"])
    with pytest.raises(
        UserError, match=r"'doc 1': a word has 9 .* config\.passages\.length=8; raise"
    ):
        write(tmp_path, corpus, tokenizer_json, length=8)


def test_no_words_at_all_is_one_line(tmp_path, tokenizer_json):
    with pytest.raises(UserError, match="none of the 1 documents holds a word"):
        write(tmp_path, tiny_passages.documents(["\u200b"]), tokenizer_json)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be 1 or more"),
        ({"title_length": 0}, "title_length must be 1 or more"),
        ({"stride": 289}, "stride=289 would leave text out"),
        ({"stride": -1}, "stride=-1"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=f"config.passages.{message}"):
        PassageConfig(**settings)
