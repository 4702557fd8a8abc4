"""A folder of random BERT weights under their published names, for tests."""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

WORDS = ["the", "of", "and", "early", "music", "western", "europe", "written", "in"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s", "##ly"]
SIZES = {
    "vocab_size": len(PIECES),
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}


def config_json(**changes):
    return {**SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12, **changes}


def tensors(seed=0):
    """Random tensors by name; norms are not at their trivial values."""
    rng = np.random.default_rng(seed)
    width, hidden = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (SIZES["vocab_size"], width),
        "embeddings.position_embeddings.weight": (
            SIZES["max_position_embeddings"],
            width,
        ),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name, outputs, inputs in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("intermediate.dense", hidden, width),
            ("output.dense", width, hidden),
        ):
            shapes[f"{layer}.{name}.weight"] = (outputs, inputs)
            shapes[f"{layer}.{name}.bias"] = (outputs,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{name}.weight"] = (width,)
            shapes[f"{layer}.{name}.bias"] = (width,)
    found = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    found["embeddings.position_ids"] = np.arange(40)[None]
    return found


def tokenizer():
    """WordPiece over `PIECES`; it pads and cuts, as published ones do."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    found = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    found.enable_padding(length=8, pad_id=0)
    found.enable_truncation(8)
    return found


def write(folder, *, weights=None, config=None):
    """Writes the three files of an encoder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or config_json()))
    content = safetensors.numpy.save(tensors() if weights is None else weights)
    (folder / "model.safetensors").write_bytes(content)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
