r"""Embeds every chunk with the frozen encoder.

Reads   WORKDIR/chunks
Writes  WORKDIR/embeddings   one vector a chunk, mean-pooled, not normalised

Example:
  python -m realm_retro.cli.embed --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.embed.dtype=float16

An interrupted run resumes at the first missing shard of config.embed.shard_size rows.
"""

from __future__ import annotations

import os
import time

import ml_collections
import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro import config as config_lib
from realm_retro.cli import common, encoders
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval import embed, embeddings
from realm_retro.retrieval.embed import Counts, EmbedConfig, Embedder
from realm_retro.typing import HostArray


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    section = config_lib.section(config, "embed")
    embed_config = config_lib.build(EmbedConfig, section, name="config.embed")
    encoder = encoders.EncoderConfig.of(config)
    store = ChunkStore.open(workdir / "chunks")
    stage = embeddings.open_stage(
        workdir / "embeddings",
        config=embed_config,
        compute_dtype=encoder.compute_dtype,
        chunks_fingerprint=store.fingerprint,
        encoder_fingerprint=encoders.fingerprint(encoder),
    )
    if stage.finished:
        count = embeddings.load_manifest(stage.directory, verify=False).meta["texts"]
        common.say(
            f"embeddings: finished already, {count:,} vectors in {stage.directory}"
        )
        return
    # Said aloud, the tokenizer's threads do not warn when something forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with stage.released_on_error():
        embedder = encoders.build_embedder(
            encoder,
            batch_tokens=embed_config.batch_tokens,
            mesh=embed_config.mesh(),
        )
        write_shards(store, embedder, embed_config, stage)
    _commit(len(store), embedder, embed_config, stage)


def write_shards(
    store: ChunkStore, embedder: Embedder, config: EmbedConfig, stage: artifacts.Stage
) -> None:
    """Embeds the chunks of each shard that is not there yet."""
    size = config.shard_size
    names = embeddings.shard_names(len(store), size)
    missing = [i for i, name in enumerate(names) if not stage.has(name)]
    starts = [i * size for i in missing]
    todo = sum(min(size, len(store) - start) for start in starts)

    def reader(start: int):
        return lambda: store.texts(np.arange(start, min(start + size, len(store))))

    windows = (reader(start) for start in starts)
    started = time.monotonic()
    with progress.bar(
        total=len(store), unit="chunks", label="embed", initial=len(store) - todo
    ) as bar:
        results = embed.embed_windows(windows, embedder, on_progress=bar.update)
        for i, (vectors, counts) in zip(missing, results, strict=True):
            now = time.monotonic()
            seconds, started = now - started, now
            # Before the shard: what was counted is there wherever the shard is.
            stage.note(names[i], {"counts": counts.as_meta(), "seconds": seconds})
            with stage.write(names[i]) as path, path.open("wb") as file:
                np.save(file, _narrowed(vectors, config.dtype))


def _narrowed(vectors: HostArray, dtype: str) -> HostArray:
    largest = float(np.abs(vectors).max())
    if largest > float(np.finfo(dtype).max):
        raise UserError(
            f"config.embed.dtype={dtype}: cannot hold {largest:.3g}, the largest number"
            " in a vector; use float32"
        )
    return vectors.astype(dtype)


def _commit(
    num_chunks: int, embedder: Embedder, config: EmbedConfig, stage: artifacts.Stage
) -> None:
    names = embeddings.shard_names(num_chunks, config.shard_size)
    notes = [note for name in names if (note := stage.noted(name)) is not None]
    counts = sum((Counts(**note["counts"]) for note in notes), Counts())
    seconds = sum(note["seconds"] for note in notes)
    stage.commit(
        {
            **counts.as_meta(),
            "dim": embedder.dim,
            "max_tokens": embedder.max_tokens,
            "seconds": round(seconds, 2),
        }
    )
    common.say(
        f"embeddings: {counts.texts:,} vectors of {embedder.dim} numbers in"
        f" {seconds:.1f} s ({counts.texts / seconds:,.0f} chunks/s,"
        f" {counts.tokens / seconds:,.0f} tokens/s)"
    )
    if counts.truncated:
        common.say(
            f"embeddings: {counts.truncated:,} chunks were cut to"
            f" {embedder.max_tokens} tokens; raise config.encoder.max_tokens to keep"
            " all of them"
        )
    if counts.empty:
        common.say(f"embeddings: {counts.empty:,} chunks hold no word")


def entry() -> None:
    """Console script."""
    common.run(main, name="embed")


if __name__ == "__main__":
    entry()
