"""A small corpus, and the config of a RETRO whose every matrix can be cut in eight."""

import ml_collections
import numpy as np
import tiny_bert
from toy_pretraining import COUNTRIES, RIVERS, changed

from realm_retro.cli import build_index, embed, find_neighbours, prepare
from realm_retro.retro import sizes


def write_corpus(folder, documents=60):
    """Documents about rivers, in words of which the encoder knows some."""
    (folder / "files").mkdir(parents=True)
    tiny_bert.write(folder / "encoder")
    rng = np.random.default_rng(0)
    for i in range(documents):
        sentences = [
            f"the {RIVERS[w]} flows through {COUNTRIES[w]}"
            f" and the {rng.choice(tiny_bert.WORDS)} of {rng.choice(tiny_bert.WORDS)}."
            for w in rng.integers(len(RIVERS), size=rng.integers(2, 9))
        ]
        (folder / "files" / f"{i:03d}.txt").write_text(" ".join(sentences))


def make_config(folder, which="retro", **sections):
    """`which` is ``retro``, ``plain`` or ``retrofit``."""
    config = ml_collections.ConfigDict(
        {
            "name": "retro",
            "seed": 0,
            "corpus": {"source": "text_files", "path": str(folder / "files")},
            "tokenizer": {"vocab_size": 320},
            "chunks": {"length": 8, "validation_fraction": 0.2},
            "encoder": {"path": str(folder / "encoder"), "max_tokens": 12},
            "embed": {"shard_size": 64},
            "index": {"backend": "exact"},
            "neighbours": {"k": 3},
            "model": {
                "vocab_size": 320,
                "chunk_length": 8,
                "num_layers": 3,
                "model_dim": 16,
                "num_heads": 8,
                "head_dim": 4,
                "ffw_dim": 32,
                "cca_layers": (2, 3),
                "encoder_layers": 1,
                "encoder_dim": 16,
                "encoder_num_heads": 8,
                "encoder_head_dim": 4,
                "encoder_ffw_dim": 32,
                "compute_dtype": "float32",
            },
            "optimizer": {"peak_learning_rate": 1e-3, "warmup_steps": 2},
            "train": {
                "steps": 20,
                "batch_size": 8,
                "sequence_chunks": 4,
                "neighbours": 2,
                "log_every": 1,
                "checkpoint_every": 20,
            },
            "evaluate": {"batch_size": 8, "stride_chunks": 2, "neighbours": ()},
            "generate": {"max_tokens": 16, "neighbours": 2},
        }
    )
    return changed(sizes.variant(config, which), **sections)


def prepared(config, workdir):
    """Runs the stages before the training; returns the workdir."""
    for stage in (prepare, embed, build_index, find_neighbours):
        stage.main(config, workdir)
    return workdir
