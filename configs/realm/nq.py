r"""REALM on Wikipedia articles and questions whose gold passage is known: a study.

Corpus:   articles and gold passages, gold.jsonl and train.jsonl, as
          tests/benchmarks/prepare_nq.py makes them of files that you have:
            python tests/benchmarks/prepare_nq.py --wiki=open.jsonl.xz \
                --gold=gold_passages.jsonl.xz --questions=train.jsonl.xz \
                --articles=400 --output=nq
Command:  for each of prepare, tag_spans, train, evaluate_qa, where nq/ is as above:
            python -m realm_retro.cli.STAGE --config=configs/realm/nq.py --workdir=W
          The same file has the workdir's other runs. Pre-training, one thing changed:
            --config=configs/realm/nq.py:per_token     the released code's marginal
            --config=configs/realm/nq.py:random_spans  masks that are not salient
            --config=configs/realm/nq.py:stale         the first index stays
          and question answering:
            --config=configs/realm/nq.py:zero_shot     MiniLM as it is, evaluate_qa only
            --config=configs/realm/nq.py:finetune      from the run without a word
            --config=configs/realm/nq.py:minilm        from MiniLM
          Both are trained on two thirds of gold.jsonl and evaluated on the others.
Cost:     2 CPU cores, 400 articles: by arithmetic 2 minutes for every index and 6 for
          the steps of a run; about 70 minutes for all. Measured with
          others at work on the same cores, without minilm: 98 minutes.
Expected: see docs/results/realm.md.
"""

import ml_collections

from realm_retro.realm import sizes

# What each word of this file's own changes.
_RUNS = {
    "per_token": {"name": "per_token", "model.marginal": "per_token"},
    "random_spans": {"name": "random_spans", "pretrain.masking": "span"},
    "stale": {"name": "stale", "pretrain.refresh": "never"},
    "minilm": {"name": "minilm", "task": "realm_finetune"},
}


def get_config(which: str = "pretrain") -> ml_collections.ConfigDict:
    """Every stage's settings; `which` is one of `_RUNS` or of `sizes.variant`."""
    config = ml_collections.ConfigDict(
        {
            "name": "realm",
            "task": "realm_pretrain",
            "seed": 0,
            "corpus": {
                "source": "text_files",
                "path": "nq/corpus.jsonl",
                "text_field": "text",
                "title_field": "title",
                # Questions name their gold document by it.
                "id_field": "id",
            },
            "encoder": {"name": "minilm", "path": "", "max_tokens": 160},
            # 97 in 100 gold passages are no longer than this and stay whole; at 128
            # wordpieces a fifth of them would be cut in two.
            "passages": {"length": 160, "title_length": 16, "validation_fraction": 0.0},
            "spans": {"tagger": "default", "path": ""},
            "init": {"bert": "minilm", "run": ""},
            "model": {
                "width": 384,
                "num_layers": 6,
                "num_heads": 12,
                "hidden": 1536,
                "title_length": 16,
                "body_length": 160,
                "query_length": 40,
                "embed_dim": 0,
                "pooling": "mean",
                "normalise": True,
                "score_scale": 20.0,
                "candidates": 4,
                "max_masks": 8,
                "marginal": "joint",
            },
            # Exact, here and below: what differs between runs is what they learnt.
            "pretrain": {
                "masking": "salient",
                "depth": 1,
                "refresh": "inline",
                "index": "exact",
            },
            "ict": {"mask_rate": 0.9},
            "qa": {
                "questions": "nq/train.jsonl",
                "test": "nq/gold.jsonl",
                "beam": 5000,
                "read": 5,
                "bm25": True,
            },
            "retrieval": {"depth": 1, "index": "exact"},
            # Kept long enough for the next run: all begin with the index of MiniLM.
            "refresh": {"every": 45, "shard_rows": 512, "keep": 4},
            "embed": {"batch_tokens": 0},
            "optimizer": {"peak_learning_rate": 3e-5, "warmup_steps": 10},
            "train": {
                "steps": 80,
                "batch_size": 4,
                "log_every": 5,
                "checkpoint_every": 40,
                "on_bad_step": "stop",
                "max_loss_ratio": 100.0,
                "keep": 1,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
    if which in _RUNS:
        config.update_from_flattened_dict(_RUNS[which])
    else:
        config = sizes.variant(config, which)
    if which in ("finetune", "minilm"):
        # The reader's span scorer starts random.
        changes = {
            "optimizer.peak_learning_rate": 1e-4,
            "train.steps": 90,
            "train.batch_size": 8,
            "qa.questions": "nq/gold.jsonl",
            "qa.test": "",
        }
        config.update_from_flattened_dict(changes)
    return config
