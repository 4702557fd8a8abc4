"""MiniLM through our Flax BERT against transformers' BertModel (record_minilm.py)."""

import json
import pathlib

import ml_collections
import numpy as np
import pytest

from realm_retro.cli import encoders
from realm_retro.cli.encoders import EncoderConfig
from realm_retro.retrieval import embed

TOLERANCE = 1e-4
CHANGED = (
    "our MiniLM no longer gives the published model's numbers; every stored embedding"
    " and index would silently mean something else"
)
RECORDED = json.loads(
    pathlib.Path(__file__).with_name("minilm_sentences.json").read_text()
)


@pytest.fixture(scope="module")
def embedder():
    config = EncoderConfig(max_tokens=RECORDED["max_tokens"])
    return encoders.build_embedder(config, batch_tokens=192)


def test_tokens(embedder):
    found = embed.tokenise(RECORDED["sentences"], embedder)
    assert [row.tolist() for row in found.ids] == RECORDED["tokens"], CHANGED
    assert found.counts == embed.Counts(texts=20, tokens=314, empty=2, truncated=1)


def test_embeddings(embedder):
    found, _ = embed.embed_texts(RECORDED["sentences"], embedder)
    wanted = np.asarray(RECORDED["mean"])
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0, err_msg=CHANGED)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    wanted = np.asarray(RECORDED["normalised"])
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0, err_msg=CHANGED)


def test_query_encoder_gives_the_same():
    config = ml_collections.ConfigDict({"encoder": {"max_tokens": 64}})
    encoder = encoders.build_encoder(config)
    assert encoder.dim == 384
    found = encoder.encode([RECORDED["sentences"][1]])  # padded to 16 tokens, not 64
    wanted = np.asarray(RECORDED["mean"][1])[None]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE, rtol=0, err_msg=CHANGED)
