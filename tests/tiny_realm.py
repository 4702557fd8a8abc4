"""Random checkpoints of every published kind of REALM, for tests."""

import json

import numpy as np
import safetensors.numpy
import tiny_bert
import torch_pickles

WIDTH = tiny_bert.SIZES["hidden_size"]
VOCAB = tiny_bert.SIZES["vocab_size"]
DIM, SPAN_HIDDEN, BLOCKS = 8, 6, 5


def config_json(**changes):
    own = {
        "hidden_act": "gelu_new",
        "retriever_proj_size": DIM,
        "span_hidden_size": SPAN_HIDDEN,
        "max_span_width": 3,
    }
    return tiny_bert.config_json(**own) | changes


def _random(seed, shapes):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _bert(seed):
    return {f"realm.{name}": value for name, value in tiny_bert.tensors(seed).items()}


def head(seed, tokens=None):
    """A masked-LM head; with `tokens` its output weights are the word embeddings."""
    found = _random(
        seed,
        {
            "cls.predictions.bias": (VOCAB,),
            "cls.predictions.decoder.weight": (VOCAB, WIDTH),
            "cls.predictions.transform.dense.weight": (WIDTH, WIDTH),
            "cls.predictions.transform.dense.bias": (WIDTH,),
            "cls.predictions.transform.LayerNorm.weight": (WIDTH,),
            "cls.predictions.transform.LayerNorm.bias": (WIDTH,),
        },
    )
    found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"]
    if tokens is not None:
        found["cls.predictions.decoder.weight"] = tokens
    return found


def embedder(seed=0):
    shapes = {
        "cls.dense.weight": (DIM, WIDTH),
        "cls.dense.bias": (DIM,),
        "cls.LayerNorm.weight": (DIM,),
        "cls.LayerNorm.bias": (DIM,),
    }
    return _bert(seed) | _random(seed + 100, shapes) | head(seed + 200)


def encoder(seed=0):
    bert = _bert(seed)
    tokens = bert["realm.embeddings.word_embeddings.weight"]
    return bert | head(seed + 200, tokens)


def reader(seed=0):
    shapes = {
        "qa_outputs.dense_intermediate.weight": (2 * SPAN_HIDDEN, WIDTH),
        "qa_outputs.dense_intermediate.bias": (2 * SPAN_HIDDEN,),
        "qa_outputs.dense_output.weight": (1, SPAN_HIDDEN),
        "qa_outputs.dense_output.bias": (1,),
        "qa_outputs.layer_normalization.weight": (SPAN_HIDDEN,),
        "qa_outputs.layer_normalization.bias": (SPAN_HIDDEN,),
    }
    return _bert(seed) | _random(seed + 100, shapes) | head(seed + 200)


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def scorer(query_seed=0, document_seed=0):
    query = under("query_embedder.", embedder(query_seed))
    return query | under("embedder.", embedder(document_seed))


def open_qa(seed=0):
    vectors = _random(seed + 300, {"block_emb": (BLOCKS, DIM)})
    own = under("embedder.", embedder(seed)) | under("reader.", reader(seed + 1))
    return own | vectors


def write(folder, tensors, config=None, *, as_bin=False):
    """A checkpoint's folder, in safetensors or as a PyTorch file."""
    config = config or config_json()
    if as_bin:
        return torch_pickles.write_folder(folder, tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # The library refuses tensors that share memory.
    alone = {name: value.copy() for name, value in tensors.items()}
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(alone))
    return folder
