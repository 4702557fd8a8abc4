r"""RETRO 7.5B of the paper's table 2, on Wikipedia (wiki40b) through TFDS.

Command:  python -m realm_retro.cli.train --workdir=W \\
              --config=configs/retro/retro_7_5b.py
          after prepare, embed, build_index and find_neighbours with the same flags.
          Its plain decoder (7B): --config=configs/retro/retro_7_5b.py:plain
Cost:     the paper's 419 billion tokens, on a pod; not run here.
Expected: the paper's figures are for MassiveText, which is not public.
"""

import ml_collections

from realm_retro.retro import sizes


def get_config(which: str = "retro") -> ml_collections.ConfigDict:
    """The paper's settings; `which` is ``retro``, ``plain`` or ``retrofit``."""
    return sizes.variant(sizes.paper("7_5b"), which)
