r"""REALM of the paper's size: BERT-base towers over the whole Wikipedia.

Command:  python -m realm_retro.cli.train --config=configs/realm/base.py --workdir=W
          after prepare and tag_spans with the same flags, with any number of
          python -m realm_retro.cli.refresh_index beside it.
Cost:     the paper's 200,000 steps of 512 examples, on 64 TPUs; not run here.
Expected: the paper's 39.2 exact match on Natural Questions after fine-tuning.
"""

import ml_collections

from realm_retro.realm import sizes


def get_config(which: str = "pretrain") -> ml_collections.ConfigDict:
    """The paper's settings; for `which` see `sizes.variant`."""
    return sizes.variant(sizes.base(), which)
