"""A chunk store and made-up embeddings, for tests of what comes after them."""

import numpy as np
from etils import epath

from realm_retro.data import chunk_writer
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import Document
from realm_retro.retrieval import embeddings
from realm_retro.retrieval.embed import EmbedConfig
from realm_retro.text.tokenizer import TokenizerConfig

WORDS = ("the", "river", "flows", "through", "old", "towns", "and", "green", "fields")


def write_chunks(directory, *, documents, validation_fraction=0.1):
    """A store of documents of one to many chunks."""
    rng = np.random.default_rng(0)
    corpus = [
        Document(id=str(i), title="", text=" ".join(rng.choice(WORDS, n)))
        for i, n in enumerate(rng.integers(1, 90, documents))
    ]
    tokenizer = TokenizerConfig(vocab_size=300)
    config = ChunksConfig(length=16, validation_fraction=validation_fraction)
    stage = chunk_writer.open_stage(
        directory, chunks=config, tokenizer=tokenizer, corpus_fingerprint="c" * 64
    )
    model = chunk_writer.prepare_tokenizer(corpus, tokenizer, stage)
    stage.commit(chunk_writer.build(corpus, model, config, stage))


def clustered(rows, *, dim=8, seed=0):
    """Vectors [rows, dim] around a few centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim)) * 2
    return centres[rng.integers(20, size=rows)] + rng.normal(size=(rows, dim)) * 0.5


def write_embeddings(workdir, *, vectors=None, dtype="float32"):
    """Embeddings of the workdir's chunks, in two shards."""
    store = ChunkStore.open(workdir / "chunks")
    vectors = clustered(len(store)) if vectors is None else vectors
    config = EmbedConfig(dtype=dtype, shard_size=len(store) // 2 + 1)
    stage = embeddings.open_stage(
        workdir / "embeddings",
        config=config,
        compute_dtype="float32",
        chunks_fingerprint=store.fingerprint,
        encoder_fingerprint="e" * 64,
    )
    names = embeddings.shard_names(len(store), config.shard_size)
    for i, name in enumerate(names):
        part = slice(i * config.shard_size, (i + 1) * config.shard_size)
        with stage.write(name) as path, path.open("wb") as file:
            np.save(file, vectors[part].astype(dtype))
    stage.commit({"texts": len(store), "dim": vectors.shape[1]})


def link(chunks, tmp_path):
    """A workdir of its own around a store that tests share."""
    (tmp_path / "chunks").symlink_to(chunks)
    return epath.Path(tmp_path)
