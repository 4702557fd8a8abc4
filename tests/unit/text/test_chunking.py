"""Chunking loses no token and no byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.text.chunking import chunk
from realm_retro.text.tokenizer import Tokenizer, train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "t.model"
    train(["a chunk of text and a text of chunks"] * 9, vocab_size=280, path=path)
    return Tokenizer.load(path)


@given(text=st.text(), length=st.integers(1, 9))
def test_no_token_and_no_byte_is_lost(tokenizer, text, length):
    ids = tokenizer.encode(text)
    chunks = chunk(ids, tokenizer, length=length)
    real = np.arange(length) < chunks.lengths[:, None]
    expected = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert chunks.tokens.shape == (-(-len(expected) // length), length)
    assert chunks.tokens[real].tolist() == expected
    assert (chunks.tokens[~real] == tokenizer.pad_id).all()
    # Only the last chunk may be short, and it is not empty.
    assert (chunks.lengths[:-1] == length).all()
    assert 0 < chunks.lengths[-1] <= length
    # Byte ranges follow each other, cover the text, and are what the tokens spell.
    data = text.encode()
    assert chunks.byte_offsets[0, 0] == 0
    assert chunks.byte_offsets[-1, 1] == len(data)
    assert (chunks.byte_offsets[1:, 0] == chunks.byte_offsets[:-1, 1]).all()
    for tokens, (start, end) in zip(chunks.tokens, chunks.byte_offsets, strict=True):
        assert tokenizer.decode(tokens) == data[start:end].decode(errors="replace")


def test_types_and_an_exact_fit(tokenizer):
    chunks = chunk(np.array([70, 71], np.int32), tokenizer, length=4)
    assert chunks.tokens.tolist() == [[2, 70, 71, 3]]
    assert (chunks.tokens.dtype, chunks.lengths.dtype) == (np.int32, np.int32)
    assert chunks.byte_offsets.dtype == np.int64
    longer = chunk(np.array([70, 71, 72], np.int32), tokenizer, length=4)
    assert longer.tokens.tolist() == [[2, 70, 71, 72], [3, 0, 0, 0]]
    assert longer.lengths.tolist() == [4, 1]
    assert longer.byte_offsets[1].tolist() == [3, 3]
