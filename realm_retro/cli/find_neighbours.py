r"""Finds the nearest chunks of every chunk, none of them of its own document.

Reads   WORKDIR/chunks, WORKDIR/embeddings, WORKDIR/index
Writes  WORKDIR/neighbours   ids and scores of k chunks for each chunk of every split

Example:
  python -m realm_retro.cli.find_neighbours --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.neighbours.k=4

An interrupted run resumes at the first missing shard of config.neighbours.shard_size
rows. An index in parts (config.index.part_rows) is read part by part for each shard, so
memory stays that of one part; larger shards read it less often.

With --join any number of processes, on any host that sees the workdir, share the work:
start the same command once for each, at any time.

An exact index that is too large for one host is spread over the processes of one
program: start them with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
set, as for training, or with --distributed. Each searches its own rows for all chunks,
and process 0 writes what they find together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from etils import epath

from realm_retro import artifacts, shards
from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.cli import common, program, sharing
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.parallel import hosts
from realm_retro.retrieval import neighbours
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import distributed, store
from realm_retro.retrieval.index.base import MISSING_ID, Index, SearchResult
from realm_retro.retrieval.merge import merge
from realm_retro.retrieval.neighbours import Finder, NeighboursConfig
from realm_retro.shards import Shard, Work
from realm_retro.typing import Config, JsonDict

flags.adopt_module_key_flags(program)
flags.adopt_module_key_flags(sharing)

# What process 0 tells the others of its program instead of a shard's number.
_WAIT, _DONE = -1, -2


def main(config: Config, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    hosts.initialise(detect=program.DISTRIBUTED.value)
    section = config_lib.section(config, "neighbours")
    settings = config_lib.build(NeighboursConfig, section, name="config.neighbours")
    chunks = ChunkStore.open(workdir / "chunks")
    embeddings = Embeddings.open(
        workdir / "embeddings", parents={"chunks": chunks.fingerprint}
    )
    index = store.load_manifest(
        workdir / "index", parents={"embeddings": embeddings.fingerprint}
    )
    shards_of_rows = neighbours.shards(len(chunks), settings.shard_size)
    if hosts.together():
        distributed.check_same(f"{workdir / 'index'}", index.fingerprint)
    if hosts.together() and not hosts.is_main():
        if _tell() != _DONE:
            finder = _finder(index, chunks)
            _follow(finder, embeddings.vectors, shards_of_rows, settings)
        return
    stage = neighbours.open_stage(
        workdir / "neighbours",
        config=settings,
        parents={
            "chunks": chunks.fingerprint,
            "embeddings": embeddings.fingerprint,
            "index": index.fingerprint,
        },
        join=sharing.JOIN.value,
    )
    _tell(_DONE if stage.finished else _WAIT)
    if stage.finished:
        common.say(
            f"neighbours: finished already, {len(chunks):,} chunks in {stage.directory}"
        )
        return
    finder = _finder(index, chunks)
    with sharing.work(stage, shards_of_rows, label="neighbours") as work:
        write_shards(finder, embeddings.vectors, settings, work)
        _commit(settings, work)


def _finder(manifest: artifacts.Manifest, chunks: ChunkStore) -> Finder:
    parts = [functools.partial(_open_part, part) for part in store.parts(manifest)]
    return Finder(parts, chunks.document[:])


def _open_part(manifest: artifacts.Manifest) -> Index:
    """The index, or this process's rows of it where it is one of a program."""
    index = store.load(manifest)
    return distributed.take_part(index) if hosts.together() else index


def write_shards(
    finder: Finder, vectors: ShardedArray, settings: NeighboursConfig, work: Work
) -> None:
    """Searches for the rows of each shard that is not there yet."""
    for claims in work.rounds():
        _tell(_WAIT)  # Each round: nobody waits long for a message.
        for claim in claims:
            _tell(claim.number)
            started = time.monotonic()
            result = _find(finder, vectors, claim.shard, settings, work.advance)
            seconds = time.monotonic() - started
            arrays = (result.ids, result.scores)
            work.publish(
                claim,
                dict(zip(claim.shard.files, arrays, strict=True)),
                {**_counts(result), "seconds": seconds},
            )
    _tell(_DONE)


def _follow(
    finder: Finder,
    vectors: ShardedArray,
    shards_of_rows: Sequence[Shard],
    settings: NeighboursConfig,
) -> None:
    """Searches this process's part of the index for each shard that process 0 takes."""
    while (number := _tell()) != _DONE:
        if number != _WAIT:
            _find(finder, vectors, shards_of_rows[number], settings)


def _tell(message: int = _WAIT) -> int:
    """Process 0's message, on every process of the program."""
    if not hosts.together():
        return message
    return int(hosts.broadcast(np.asarray(message, np.int32)))


def _find(
    finder: Finder,
    vectors: ShardedArray,
    shard: Shard,
    settings: NeighboursConfig,
    on_progress: Callable[[int], object] = lambda rows: None,
) -> SearchResult:
    """The neighbours of a shard's chunks, a batch at a time, in one part of the index.

    Batches begin with the shard, so the result does not depend on who finds it.
    """
    rows = np.arange(shard.start, shard.stop)
    result = SearchResult.missing(len(rows), settings.k)
    done = 0
    for part in range(finder.num_parts):
        for start in range(0, len(rows), settings.batch_size):
            at = slice(start, start + settings.batch_size)
            batch = rows[at]
            found = finder.find(
                part,
                vectors[batch].astype(np.float32),
                finder.document[batch],
                k=settings.k,
                margin=settings.margin,
            )
            best = SearchResult(result.ids[at], result.scores[at])
            best = merge([best, found], settings.k)
            result.ids[at], result.scores[at] = best.ids, best.scores
            vectors.release()
            # A row has been made when all parts have been searched for it.
            before, done = done, done + len(batch)
            on_progress(done // finder.num_parts - before // finder.num_parts)
    return result


def _counts(result: SearchResult) -> dict[str, float]:
    present = result.ids != MISSING_ID
    return {
        "rows": len(present),
        "short": int((~present.all(axis=1)).sum()),
        "found": int(present.sum()),
        "score": float(result.scores[present].sum(dtype=np.float64)),
    }


def _commit(settings: NeighboursConfig, work: Work) -> None:
    def meta(notes: Sequence[JsonDict]) -> JsonDict:
        rows, short, found, score, seconds = (
            sum(note[key] for note in notes)
            for key in ("rows", "short", "found", "score", "seconds")
        )
        return {
            "num_shards": len(work.shards),
            "rows": rows,
            "k": settings.k,
            "found": found,
            "short": short,
            "average_score": score / found if found else 0.0,
            "seconds": round(seconds, 2),
            "processes": shards.num_makers(notes),
        }

    manifest = work.commit(meta)
    if manifest is None:
        sharing.say_own_part(work, label="neighbours")
        return
    made = manifest.meta
    rows, short, processes = made["rows"], made["short"], made["processes"]
    by = f" by {processes:,} processes" if processes > 1 else ""
    common.say(
        f"neighbours: {made['found']:,} of {rows:,} chunks, average score"
        f" {made['average_score']:.4f}, {made['seconds']:.1f} s{by}"
        f" ({rows / max(made['seconds'], 1e-9):,.0f} chunks/s{' each' if by else ''})"
    )
    if short:
        common.say(
            f"neighbours: {short:,} chunks have fewer than {settings.k}, because other"
            " documents hold no more; the rest is masked"
        )


def entry() -> None:
    """Console script."""
    common.run(main, name="find_neighbours")


if __name__ == "__main__":
    entry()
