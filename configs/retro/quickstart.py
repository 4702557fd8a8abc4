"""RETRO end to end on 10,033 encyclopedia introductions: the quickstart.

Command:  launch/quickstart.sh [WORKDIR]
Cost:     under 12 minutes on 2 CPU cores with 4 GB of memory.
Expected: see docs/results/quickstart.md.
"""

import ml_collections

from realm_retro.retro import sizes


def get_config(which: str = "retro") -> ml_collections.ConfigDict:
    """The settings of every stage; `which` is ``retro``, ``plain`` or ``retrofit``."""
    config = ml_collections.ConfigDict()
    config.name = "retro"
    config.seed = 0

    config.corpus = ml_collections.ConfigDict(
        {
            "source": "vital_articles",
            "language": "en",
            # So many articles; 0 takes all.
            "articles": 0,
            # For source=text_files: a folder, a file or a glob, and its .jsonl fields.
            "path": "",
            "text_field": "text",
            "title_field": "title",
            "id_field": "",
        }
    )
    config.dedupe = ml_collections.ConfigDict({"enabled": False, "against": ""})
    config.tokenizer = ml_collections.ConfigDict({"vocab_size": 4096, "model": ""})
    config.chunks = ml_collections.ConfigDict(
        {"length": 64, "validation_fraction": 0.02, "train_fraction": 1.0}
    )
    config.encoder = ml_collections.ConfigDict(
        {
            "name": "minilm",
            "path": "",
            "max_tokens": 128,
            "compute_dtype": "float32",
        }
    )
    config.embed = ml_collections.ConfigDict(
        {"dtype": "float32", "shard_size": 4096, "batch_tokens": 0}
    )
    config.index = ml_collections.ConfigDict(
        {"backend": "scann", "metric": "squared_l2", "recall_target": 0.95}
    )
    config.neighbours = ml_collections.ConfigDict({"k": 4})

    config.model = ml_collections.ConfigDict(
        {
            "vocab_size": 4096,
            "chunk_length": 64,
            "num_layers": 4,
            "model_dim": 128,
            "num_heads": 2,
            "head_dim": 64,
            "ffw_dim": 512,
            "cca_layers": (2, 4),
            "encoder_layers": 1,
            "encoder_dim": 64,
            "encoder_num_heads": 1,
            "encoder_head_dim": 64,
            "encoder_ffw_dim": 256,
            "encoder_ca_layers": (1,),
            "share_embedding": True,
            "compute_dtype": "float32",
        }
    )
    config.optimizer = ml_collections.ConfigDict(
        {"peak_learning_rate": 3e-3, "warmup_steps": 40}
    )
    config.train = ml_collections.ConfigDict(
        {
            "steps": 420,
            "batch_size": 8,
            "sequence_chunks": 4,
            "neighbours": 2,
            "log_every": 10,
            "checkpoint_every": 100,
            "on_bad_step": "stop",
            "max_loss_ratio": 100.0,
        }
    )
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluate = ml_collections.ConfigDict(
        {"batch_size": 16, "stride_chunks": 2, "neighbours": (1, 2, 4)}
    )
    config.generate = ml_collections.ConfigDict(
        {
            "max_tokens": 128,
            "temperature": 0.8,
            "top_k": 0,
            "top_p": 0.95,
            "seed": 0,
            "neighbours": 2,
        }
    )
    return sizes.variant(config, which)
