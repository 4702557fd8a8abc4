"""REALM and RETRO in JAX/Flax: retrieval-enhanced language models."""

__version__ = "0.1.0"
