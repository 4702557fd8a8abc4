r"""RETRO on full Wikipedia articles, trained on a part and retrieving from all.

Corpus:   a .jsonl of articles with the fields id, title and text (see
          tests/benchmarks/prepare_wiki2019.py for one way to make it).
Command:  for each of prepare, embed, build_index, find_neighbours, train, evaluate:
            python -m realm_retro.cli.STAGE --config=configs/retro/wiki.py \
                --config.corpus.path=articles.jsonl --workdir=W
          then train and evaluate with --config=configs/retro/wiki.py:plain, and
            python tests/benchmarks/ngram.py --workdir=W --order=5
Cost:     2 CPU cores: 25 minutes to embed, 2 for the index and neighbours, 49 to train
          (47 for plain; both with other work beside them), 7 to evaluate.
Result:   see docs/results/wiki.md.
"""

import ml_collections

from realm_retro.retro import sizes


def get_config(which: str = "retro") -> ml_collections.ConfigDict:
    """Every stage's settings; `which` is ``retro``, ``plain`` or ``retrofit``."""
    config = ml_collections.ConfigDict(
        {
            "name": "retro",
            "seed": 0,
            "corpus": {
                "source": "text_files",
                "path": "articles.jsonl",
                "text_field": "text",
                "title_field": "title",
                "id_field": "id",
            },
            "dedupe": {"enabled": False, "against": ""},
            "tokenizer": {"vocab_size": 4096},
            # A part is trained on; all but the held-out articles are retrieved from.
            "chunks": {
                "length": 64,
                "validation_fraction": 0.06,
                "train_fraction": 0.45,
            },
            "encoder": {"name": "minilm", "max_tokens": 128},
            "embed": {"dtype": "float32"},
            "index": {"backend": "scann", "metric": "squared_l2"},
            "neighbours": {"k": 8},
            "model": {
                "vocab_size": 4096,
                "chunk_length": 64,
                "num_layers": 4,
                "model_dim": 192,
                "num_heads": 3,
                "head_dim": 64,
                "ffw_dim": 768,
                "cca_layers": (2, 4),
                "encoder_layers": 1,
                "encoder_dim": 128,
                "encoder_num_heads": 2,
                "encoder_head_dim": 64,
                "encoder_ffw_dim": 256,
                "encoder_ca_layers": (1,),
                "share_embedding": True,
                "compute_dtype": "float32",
            },
            "optimizer": {"peak_learning_rate": 3e-3, "warmup_steps": 100},
            "train": {
                "steps": 3000,
                "batch_size": 8,
                "sequence_chunks": 4,
                "neighbours": 2,
                "checkpoint_every": 200,
                "on_bad_step": "stop",
                "max_loss_ratio": 100.0,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "evaluate": {
                "batch_size": 8,
                "stride_chunks": 2,
                "neighbours": (1, 2, 4),
            },
            "generate": {
                "max_tokens": 128,
                "temperature": 0.8,
                "top_k": 0,
                "top_p": 0.95,
                "seed": 0,
                "neighbours": 2,
            },
        }
    )
    return sizes.variant(config, which)
