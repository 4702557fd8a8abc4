"""Configs of the paper's size (Guu et al. 2020), and the runs that share a workdir."""

from __future__ import annotations

import ml_collections

from realm_retro.errors import UserError
from realm_retro.typing import Config

# What each word after the colon of ``--config=FILE.py:WORD`` changes.
_VARIANTS = {
    "pretrain": {},
    "ict": {"name": "ict", "task": "realm_ict"},
    "finetune": {"name": "qa", "task": "realm_finetune", "init.run": "realm"},
    "zero_shot": {"name": "zero_shot", "task": "realm_finetune"},
}


def base() -> Config:
    """BERT-base towers, 13 million passages of 288 wordpieces, the paper's schedule.

    Section 4 of the paper and its released code: 200,000 steps of 512 examples, 8
    candidates, a refresh every 500 steps, learning rate 3e-5.
    """
    return ml_collections.ConfigDict(
        {
            "name": "realm",
            "task": "realm_pretrain",
            "seed": 0,
            "corpus": {"source": "tfds:wiki40b/en:train"},
            "dedupe": {"enabled": False, "against": ""},
            "encoder": {"name": "minilm", "path": "", "max_tokens": 288},
            "passages": {"length": 254, "title_length": 31},
            "spans": {"tagger": "default", "path": ""},
            "init": {"bert": "", "run": ""},
            "model": {
                "width": 768,
                "num_layers": 12,
                "num_heads": 12,
                "hidden": 3072,
                "title_length": 31,
                "body_length": 254,
                "query_length": 94,
                "embed_dim": 128,
                "pooling": "cls",
                "projection_norm": True,
                "candidates": 8,
                "max_masks": 10,
                "marginal": "joint",
                "dropout": 0.1,
                "compute_dtype": "bfloat16",
                "remat": True,
            },
            # The whole index fits beside the model: the step searches it exactly
            # enough, with the weights of the moment, and no host has to.
            "pretrain": {
                "masking": "salient",
                "refresh": "workers",
                "placement": "device",
                "vectors": "bfloat16",
                "recall_target": 0.99,
            },
            "ict": {"mask_rate": 0.9},
            "qa": {"questions": "tfds:natural_questions_open:train", "beam": 5000},
            "retrieval": {"depth": 1},
            "refresh": {"every": 500, "max_staleness": 2000, "dtype": "float16"},
            "embed": {"batch_tokens": 0},
            "optimizer": {"peak_learning_rate": 3e-5, "warmup_steps": 10_000},
            "train": {
                "steps": 200_000,
                "batch_size": 512,
                "accumulation": 1,
                "log_every": 100,
                "checkpoint_every": 500,
                "on_bad_step": "stop",
                "max_loss_ratio": 100.0,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            # As many as the paper has, and the text of the same year's Wikipedia.
            "plan": {
                "topology": "v5e:8x8",
                "rows": 13_353_718,
                "documents": 5_900_000,
                "text_bytes": 13_000_000_000,
            },
        }
    )


def variant(config: Config, which: str) -> Config:
    """One of the runs that a config file describes.

    Args:
      config: of pre-training.
      which: ``pretrain`` leaves it as it is; ``ict`` is the warm start, ``finetune``
        the question answering that starts from the pre-trained run, ``zero_shot`` the
        same from ``config.init.bert`` alone. Each is a run of its own.

    Raises:
      UserError: another word.
    """
    if which not in _VARIANTS:
        raise UserError(
            f"--config=…:{which}: after the colon comes {', '.join(_VARIANTS)}"
        )
    config.update_from_flattened_dict(_VARIANTS[which])
    return config
