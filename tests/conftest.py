"""Strictness for every test: eight simulated devices, no silent rank promotion."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Libraries that ask absl for flags find them parsed, with no arguments."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
