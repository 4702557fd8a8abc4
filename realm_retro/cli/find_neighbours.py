r"""Finds the nearest chunks of every chunk, none of them of its own document.

Reads   WORKDIR/chunks, WORKDIR/embeddings, WORKDIR/index
Writes  WORKDIR/neighbours   ids and scores of k chunks for each chunk of every split

Example:
  python -m realm_retro.cli.find_neighbours --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.neighbours.k=4

An interrupted run resumes at the first missing shard of config.neighbours.shard_size
rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.cli import common
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.retrieval import neighbours
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import store
from realm_retro.retrieval.index.base import MISSING_ID, SearchResult
from realm_retro.retrieval.neighbours import Filter, NeighboursConfig, shard_name
from realm_retro.typing import Config, HostArray


def main(config: Config, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    section = config_lib.section(config, "neighbours")
    settings = config_lib.build(NeighboursConfig, section, name="config.neighbours")
    chunks = ChunkStore.open(workdir / "chunks")
    embeddings = Embeddings.open(
        workdir / "embeddings", parents={"chunks": chunks.fingerprint}
    )
    index = store.load_manifest(
        workdir / "index", parents={"embeddings": embeddings.fingerprint}
    )
    stage = neighbours.open_stage(
        workdir / "neighbours",
        config=settings,
        parents={
            "chunks": chunks.fingerprint,
            "embeddings": embeddings.fingerprint,
            "index": index.fingerprint,
        },
    )
    if stage.finished:
        common.say(
            f"neighbours: finished already, {len(chunks):,} chunks in {stage.directory}"
        )
        return
    finder = Filter.make(store.load(index), chunks.document[:])
    write_shards(finder, embeddings.vectors, settings, stage)
    _commit(len(chunks), settings, stage)


def write_shards(
    finder: Filter,
    vectors: ShardedArray,
    settings: NeighboursConfig,
    stage: artifacts.Stage,
) -> None:
    """Searches for the rows of each shard that is not there yet."""
    size = settings.shard_size
    starts = range(0, len(vectors), size)
    names = [
        tuple(shard_name(part, i, len(starts)) for part in ("ids", "scores"))
        for i in range(len(starts))
    ]
    done = [all(stage.has(name) for name in pair) for pair in names]
    rows = [np.arange(start, min(start + size, len(vectors))) for start in starts]
    with progress.bar(
        total=len(vectors),
        unit="chunks",
        label="neighbours",
        initial=sum(len(part) for part, ready in zip(rows, done, strict=True) if ready),
    ) as bar:
        for part, pair, ready in zip(rows, names, done, strict=True):
            if ready:
                continue
            started = time.monotonic()
            result = _find(finder, vectors, part, settings, bar.update)
            seconds = time.monotonic() - started
            # Before the shard: what was counted is there wherever the shard is.
            stage.note(pair[0], {**_counts(result), "seconds": seconds})
            for name, array in zip(pair, (result.ids, result.scores), strict=True):
                with stage.write(name) as path, path.open("wb") as file:
                    np.save(file, array)


def _find(
    finder: Filter,
    vectors: ShardedArray,
    rows: HostArray,
    settings: NeighboursConfig,
    on_progress: Callable[[int], object],
) -> SearchResult:
    """The neighbours of some chunks, a batch at a time."""
    result = SearchResult.missing(len(rows), settings.k)
    for start in range(0, len(rows), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        batch = rows[part]
        found = finder.find(
            vectors[batch].astype(np.float32),
            finder.document[batch],
            k=settings.k,
            margin=settings.margin,
        )
        result.ids[part], result.scores[part] = found.ids, found.scores
        on_progress(len(batch))
    return result


def _counts(result: SearchResult) -> dict[str, float]:
    present = result.ids != MISSING_ID
    return {
        "rows": len(present),
        "short": int((~present.all(axis=1)).sum()),
        "found": int(present.sum()),
        "score": float(result.scores[present].sum(dtype=np.float64)),
    }


def _commit(
    num_chunks: int, settings: NeighboursConfig, stage: artifacts.Stage
) -> None:
    num_shards = -(-num_chunks // settings.shard_size)
    notes = [
        stage.noted(shard_name("ids", i, num_shards)) or {} for i in range(num_shards)
    ]
    rows, short, found, score, seconds = (
        sum(note[key] for note in notes)
        for key in ("rows", "short", "found", "score", "seconds")
    )
    average = score / found if found else 0.0
    stage.commit(
        {
            "num_shards": num_shards,
            "rows": rows,
            "k": settings.k,
            "found": found,
            "short": short,
            "average_score": average,
            "seconds": round(seconds, 2),
        }
    )
    common.say(
        f"neighbours: {found:,} of {rows:,} chunks, average score {average:.4f},"
        f" {seconds:.1f} s ({rows / max(seconds, 1e-9):,.0f} chunks/s)"
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
