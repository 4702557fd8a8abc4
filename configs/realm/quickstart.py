r"""REALM on 1,500 encyclopedia introductions: pre-training, questions, answers.

Command:  launch/quickstart.sh, whose second half this is; or stage by stage, for each
          of prepare, tag_spans, train:
            python -m realm_retro.cli.STAGE --config=configs/realm/quickstart.py \
                --workdir=W
          with, for refresh in processes of its own, --config.pretrain.refresh=workers
          and beside it: python -m realm_retro.cli.refresh_index (the same flags).
          The same file has the other runs of the workdir:
            --config=configs/realm/quickstart.py:ict        inverse cloze warm start
            --config=configs/realm/quickstart.py:finetune   question answering
            --config=configs/realm/quickstart.py:zero_shot  the same without any of it
Cost:     about 9 minutes on 2 CPU cores with 8 GB of memory.
Expected: see docs/results/quickstart.md.
"""

import ml_collections

from realm_retro.realm import sizes


def get_config(which: str = "pretrain") -> ml_collections.ConfigDict:
    """Every stage's settings; for `which` see `sizes.variant`."""
    config = ml_collections.ConfigDict(
        {
            "name": "realm",
            "task": "realm_pretrain",
            "seed": 0,
            "corpus": {
                "source": "vital_articles",
                "language": "en",
                # Those that the questions are about, and others; 0 takes all 10,033.
                "articles": 1500,
                "path": "",
                "text_field": "text",
                "title_field": "title",
                "id_field": "",
            },
            "dedupe": {"enabled": False, "against": ""},
            "encoder": {"name": "minilm", "path": "", "max_tokens": 128},
            "passages": {"length": 64, "title_length": 12, "validation_fraction": 0.0},
            "spans": {"tagger": "default", "path": ""},
            "init": {"bert": "minilm", "run": ""},
            "model": {
                "width": 384,
                "num_layers": 6,
                "num_heads": 12,
                "hidden": 1536,
                "title_length": 12,
                "body_length": 64,
                "query_length": 32,
                "embed_dim": 0,
                "pooling": "mean",
                "normalise": True,
                "score_scale": 20.0,
                "candidates": 4,
                "max_masks": 8,
                "marginal": "joint",
            },
            "pretrain": {"masking": "salient", "depth": 1, "refresh": "inline"},
            "ict": {"mask_rate": 0.9},
            "qa": {
                "questions": "vital_questions",
                "test": "",
                "holdout": 0.33,
                "beam": 5000,
                "read": 5,
                "bm25": True,
            },
            "retrieval": {"depth": 1, "index": "auto"},
            # Two refreshes on any machine: where workers are slow, training waits.
            "refresh": {"every": 15, "max_staleness": 20, "shard_rows": 256},
            "embed": {"batch_tokens": 0},
            "optimizer": {"peak_learning_rate": 3e-5, "warmup_steps": 10},
            "train": {
                "steps": 45,
                "batch_size": 4,
                "log_every": 5,
                "checkpoint_every": 15,
                "on_bad_step": "stop",
                "max_loss_ratio": 100.0,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
    config = sizes.variant(config, which)
    if config.task == "realm_finetune":
        config.optimizer.peak_learning_rate = 1e-4
        config.train.steps = 80
    return config
