"""Positions in bytes, specials that text cannot forge, and which pieces go on."""

import numpy as np
import pytest
import tiny_passages
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from realm_retro.errors import UserError
from realm_retro.text import wordpiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tiny_passages.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return wordpiece.load_tokenizer(path)


@given(st.text())
def test_byte_positions_against_utf8(text):
    expected = [len(text[:i].encode()) for i in range(len(text) + 1)]
    assert wordpiece.byte_positions(text).tolist() == expected


def test_pieces_know_their_place_and_word(tokenizer):
    [pieces] = wordpiece.encode(tokenizer, ["The Fléld, rivers"])
    text = [tiny_passages.PIECES[i] for i in pieces.ids]
    assert text == ["the", "f", "##l", "##e", "##l", "##d", ",", "river", "##s"]
    assert pieces.words.tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 3]
    assert pieces.chars[[0, 3, 8]].tolist() == [[0, 3], [6, 7], [16, 17]]
    assert (pieces.ids.dtype, pieces.chars.dtype) == (np.int32, np.int64)
    [empty] = wordpiece.encode(tokenizer, [""])
    assert (empty.ids.shape, empty.chars.shape) == ((0,), (0, 2))


def test_text_cannot_forge_special_tokens(tokenizer):
    [ids] = wordpiece.ids_of(tokenizer, ["a [SEP] [MASK]"])
    assert not {2, 3, 4} & set(ids)
    [pieces] = wordpiece.encode(tokenizer, ["a [SEP] [MASK]"])
    assert pieces.ids.tolist() == ids


def test_continuations(tokenizer):
    found = wordpiece.continuations(tokenizer)
    pieces = tiny_passages.PIECES
    assert found.tolist() == [len(p) > 2 and p.startswith("##") for p in pieces]


def test_published_encoders_read_special_tokens(tmp_path):
    path = tiny_passages.save_tokenizer(tmp_path)
    read, letters = (
        wordpiece.load_tokenizer(path, specials=specials) for specials in (True, False)
    )
    special = read.token_to_id("[SEP]")
    assert wordpiece.ids_of(read, ["[SEP]"]) == [[special]]
    assert special not in wordpiece.ids_of(letters, ["[SEP]"])[0]


def test_what_is_no_wordpiece_is_refused():
    with pytest.raises(UserError, match="is BPE, not WordPiece"):
        wordpiece.continuations(tokenizers.Tokenizer(models.BPE()))


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: is missing"):
        wordpiece.load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json: is damaged"):
        wordpiece.load_tokenizer(tmp_path / "tokenizer.json")
