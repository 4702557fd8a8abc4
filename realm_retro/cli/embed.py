r"""Embeds every chunk with the frozen encoder.

Reads   WORKDIR/chunks
Writes  WORKDIR/embeddings   one vector a chunk, mean-pooled, not normalised

Example:
  python -m realm_retro.cli.embed --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.embed.dtype=float16

An interrupted run resumes at the first missing shard of config.embed.shard_size rows.
With --join any number of processes, on any host that sees the workdir, share the work:
start the same command once for each, at any time.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_collections
import numpy as np
from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro import shards
from realm_retro.cli import common, encoders, sharing
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval import embed, embeddings
from realm_retro.retrieval.embed import Counts, EmbedConfig, Embedder
from realm_retro.shards import Claim, Work
from realm_retro.typing import HostArray, JsonDict

flags.adopt_module_key_flags(sharing)


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
        join=sharing.JOIN.value,
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
        parts = embeddings.shards(len(store), embed_config.shard_size)
        with sharing.work(stage, parts, label="embeddings") as work:
            write_shards(store, embedder, embed_config, work)
            _commit(embedder, work)


def write_shards(
    store: ChunkStore, embedder: Embedder, config: EmbedConfig, work: Work
) -> None:
    """Embeds the chunks of each shard that is not there yet, beside other processes.

    A shard is a window of its own, so its vectors do not depend on who makes it.
    """
    taken: collections.deque[Claim] = collections.deque()

    def windows(claims: Iterable[Claim]) -> Iterator[Callable[[], Sequence[str]]]:
        for claim in claims:
            taken.append(claim)
            rows = np.arange(claim.shard.start, claim.shard.stop)
            yield lambda rows=rows: texts(store, rows)

    for claims in work.rounds():
        started = time.monotonic()
        for vectors, counts in embed.embed_windows(
            windows(claims), embedder, on_progress=work.advance
        ):
            now = time.monotonic()
            seconds, started = now - started, now
            claim = taken.popleft()
            work.publish(
                claim,
                {claim.shard.files[0]: _narrowed(vectors, config.dtype)},
                {"counts": counts.as_meta(), "seconds": seconds},
            )


def texts(store: ChunkStore, rows: HostArray) -> list[str]:
    """The texts of some chunks, whose pages are not held any longer."""
    found = store.texts(rows)
    store.tokens.release()
    store.lengths.release()
    return found


def _narrowed(vectors: HostArray, dtype: str) -> HostArray:
    largest = float(np.abs(vectors).max())
    if largest > float(np.finfo(dtype).max):
        raise UserError(
            f"config.embed.dtype={dtype}: cannot hold {largest:.3g}, the largest number"
            " in a vector; use float32"
        )
    return vectors.astype(dtype)


def _commit(embedder: Embedder, work: Work) -> None:
    def meta(notes: Sequence[JsonDict]) -> JsonDict:
        return {
            **sum((Counts(**note["counts"]) for note in notes), Counts()).as_meta(),
            "dim": embedder.dim,
            "max_tokens": embedder.max_tokens,
            "seconds": round(sum(note["seconds"] for note in notes), 2),
            "processes": shards.num_makers(notes),
        }

    manifest = work.commit(meta)
    if manifest is None:
        sharing.say_own_part(work, label="embeddings")
        return
    found = dict(manifest.meta)
    seconds, processes = max(found["seconds"], 1e-9), found["processes"]
    counts = Counts(**{key: found[key] for key in Counts().as_meta()})
    by = f" by {processes:,} processes" if processes > 1 else ""
    common.say(
        f"embeddings: {counts.texts:,} vectors of {embedder.dim} numbers in"
        f" {seconds:.1f} s{by} ({counts.texts / seconds:,.0f} chunks/s,"
        f" {counts.tokens / seconds:,.0f} tokens/s{' each' if by else ''})"
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
