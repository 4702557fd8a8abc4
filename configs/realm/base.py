r"""REALM of the paper's size: BERT-base towers over the whole Wikipedia.

Command:  python -m realm_retro.cli.train --config=configs/realm/base.py --workdir=W
          after prepare and tag_spans with the same flags, with any number of
          python -m realm_retro.cli.refresh_index beside it.
          Then train and evaluate_qa with --config=configs/realm/base.py:finetune.
Cost:     the paper's 200,000 steps of 512 examples, on 64 TPUs; not run here.
          What it needs: docs/scaling.md.
Expected: the paper's 39.2 exact match on Natural Questions after fine-tuning.
"""

import ml_collections

from realm_retro.realm import sizes

# ORQA's 20 epochs, with its learning rate, over all training questions of Natural
# Questions (ORQA kept 8,757 of them for development), evaluated where it is: on the
# validation split. It took one question at a time: here each of 8 chips does.
_QA = {
    "plan.topology": "v5e:2x4",
    "qa.test": "tfds:natural_questions_open:validation",
    "train.steps": 20 * 87_925 // 8,
    "train.batch_size": 8,
    "optimizer.peak_learning_rate": 1e-5,
}
# ORQA's warm start.
_ICT = {
    "train.steps": 100_000,
    "train.batch_size": 4096,
    "optimizer.peak_learning_rate": 1e-4,
}


def get_config(which: str = "pretrain") -> ml_collections.ConfigDict:
    """The paper's settings; for `which` see `sizes.variant`."""
    config = sizes.variant(sizes.base(), which)
    if config.task == "realm_finetune":
        config.update_from_flattened_dict(_QA)
    elif config.task == "realm_ict":
        config.update_from_flattened_dict(_ICT)
    return config
