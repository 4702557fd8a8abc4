"""The tokenizer gives every text back and knows the bytes of each id."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.errors import UserError
from realm_retro.text import tokenizer as tokenizer_lib
from realm_retro.text.tokenizer import Tokenizer, TokenizerConfig, train

TEXTS = [
    f"The {a} {b} of {c}, which was {a} in {year}, is a {b}."
    for year, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("early", "modern", "western", "famous", "ancient")
        for b in ("music", "history", "painting", "language")
        for c in ("Europe", "Iceland", "science", "film")
    )
]
HOSTILE = ["▁", " ", "\n", "\t", "\0", "\r", "a", "é", "e\u0301", "😀", "\u200f", "א"]
HOSTILE += ["<s>", "<0x41>", "<unk>", "\ufeff", "\ufffd", "\u2585", "ﬁ", "music "]


def train_model(path, texts=TEXTS, **settings):
    train(texts, path=path, **{"vocab_size": 360, **settings})
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(train_model(tmp_path_factory.mktemp("model") / "t.model"))


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths[ids].all()


@given(text=st.text() | st.lists(st.sampled_from(HOSTILE)).map("".join))
def test_any_text_comes_back(tokenizer, text):
    check_round_trip(tokenizer, text)


@settings(max_examples=30)
@given(text=st.lists(st.sampled_from([*HOSTILE, *TEXTS[:5]])).map("".join))
def test_any_text_comes_back_from_segments(tokenizer, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_lib, "_SEGMENT", 7)
        check_round_trip(tokenizer, text)


def test_special_ids_have_no_bytes(tokenizer):
    assert [tokenizer.pad_id, tokenizer.unk_id] == [0, 1]
    assert [tokenizer.bos_id, tokenizer.eos_id] == [2, 3]
    assert tokenizer.byte_lengths.dtype == np.int32
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) == (360,)
    assert not tokenizer.byte_lengths[:4].any()
    assert tokenizer.byte_lengths[4:].all()
    ids = tokenizer.encode("a painting")
    assert tokenizer.decode([2, *ids, 3, 0, 0]) == "a painting"


def test_pieces_are_learnt(tokenizer):
    ids = tokenizer.encode(TEXTS[3])
    assert ids.dtype == np.int32
    assert len(ids) < len(TEXTS[3]) / 2


def test_broken_utf8_decodes_to_the_replacement_character(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_batch_equals_one_by_one_with_any_threads(tokenizer):
    texts = ["", "▁", *TEXTS[:9], "x▁ y", ""]
    one_by_one = [tokenizer.encode(text) for text in texts]
    for num_threads in (None, 1, 3, 64):
        batch = tokenizer.encode_batch(texts, num_threads=num_threads)
        assert [b.tolist() for b in batch] == [o.tolist() for o in one_by_one]
    assert tokenizer.encode_batch([]) == []


def test_cutting_a_long_text_at_words_changes_no_id(tokenizer, monkeypatch):
    text = " ".join(TEXTS[:20]) + "\n" + "\n".join(TEXTS[20:])
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_lib, "_SEGMENT", 50)
    assert len(list(tokenizer_lib._segments(text))) > 50
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize("unit", ["early music ", "x", "é", "▁"])
def test_a_megabyte_on_one_line(tokenizer, unit):
    text = unit * (1_000_000 // len(unit))
    check_round_trip(tokenizer, text)


def test_half_a_surrogate_pair_is_one_line(tokenizer):
    with pytest.raises(UserError, match="cannot be written as UTF-8"):
        tokenizer.encode("\ud83d")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path, model_type):
    models = [
        train_model(path, model_type=model_type, vocab_size=310).read_bytes()
        for path in (tmp_path / "one", tmp_path / "two")
    ]
    assert models[0] == models[1]
    assert Tokenizer(models[0]).fingerprint == Tokenizer(models[1]).fingerprint
    check_round_trip(Tokenizer(models[0]), "".join(HOSTILE))


@pytest.mark.parametrize("separator", [" ", "\t", "\0", "\u2585", "▁", "\r\n"])
def test_all_of_a_long_text_is_trained_on(tmp_path, separator):
    # SentencePiece drops lines that are long or hold one of its reserved characters.
    texts = [separator.join(TEXTS * 9)]
    tokenizer = Tokenizer.load(train_model(tmp_path / "t.model", texts, vocab_size=340))
    assert len(tokenizer.encode("painting")) <= 3


def test_training_says_nothing(tmp_path, capfd):
    train_model(tmp_path / "t.model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_too_large_names_the_limit(tmp_path, model_type):
    with pytest.raises(UserError, match=r"vocab_size=5000 .* to (\d+) or less") as e:
        train_model(tmp_path / "t", vocab_size=5000, model_type=model_type)
    limit = int(str(e.value).split(" or less")[0].split()[-1])
    train_model(tmp_path / "t", vocab_size=limit, model_type=model_type)
    assert Tokenizer.load(tmp_path / "t").vocab_size == limit


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_too_small_names_the_limit(tmp_path, model_type):
    with pytest.raises(UserError, match=r"vocab_size=270 is too small .* above \d+"):
        train_model(tmp_path / "t", vocab_size=270, model_type=model_type)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_nothing_to_train_on_is_one_line(tmp_path, texts):
    with pytest.raises(UserError, match="vocab_size"):
        train_model(tmp_path / "t", texts)


def test_a_missing_or_foreign_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer model"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model at all")
    with pytest.raises(UserError, match=r"bad\.model: is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")


@pytest.mark.parametrize(
    "option",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"bos_id": -1},
    ],
)
def test_a_model_that_loses_text_is_refused(tmp_path, option):
    good = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=340,
        minloglevel=2,
        **(good | option),
    )
    with pytest.raises(UserError, match="does not give every text back"):
        Tokenizer.load(tmp_path / "t.model")


def test_a_foreign_model_without_pad_pads_with_unk(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=340,
        minloglevel=2,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
    )
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert tokenizer.pad_id == tokenizer.unk_id == 0
    check_round_trip(tokenizer, "".join(HOSTILE))


@pytest.mark.parametrize("setting", [{"model_type": "word"}, {"vocab_size": 0}])
def test_bad_settings_are_one_line(setting):
    with pytest.raises(UserError, match=r"config\.tokenizer\."):
        TokenizerConfig(**setting)
