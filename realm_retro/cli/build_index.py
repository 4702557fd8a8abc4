r"""Builds the index that neighbours are searched in, and measures its recall.

Reads   WORKDIR/chunks, WORKDIR/embeddings
Writes  WORKDIR/index   the chunks of the splits train and database; never validation

Example:
  python -m realm_retro.cli.build_index --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.index.recall_target=0.98

An approximate index (ScaNN) is tuned on a sample of chunks and its recall against exact
search measured on another; below config.index.recall_target the build fails. Where
ScaNN does not run, the index is exact.

More than config.index.part_rows vectors become several ScaNN indexes, so that memory is
bounded: plan three times 4 bytes a number of part_rows vectors. An interrupted build
goes on with the first part that is missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.cli import common
from realm_retro.data import chunk_store
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import base, parts, probe, store, tuning
from realm_retro.retrieval.index.base import Index, Metric
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex
from realm_retro.typing import HostArray, JsonDict

# Which chunks are tried; not the run's seed, so that runs may share an index.
_SAMPLE_SEED = 0
# What is told of the speed of a search, for queries one by one and in batches.
_SPEED = "queries_per_second_batch_{}"
_BATCHES = (1, 256)


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """The ``index`` section of a config.

    Attributes:
      backend: ``scann`` (approximate), or ``exact`` (compares with every vector).
      metric: ``squared_l2``, as RETRO uses, or ``dot_product``.
      recall_target: share of the true nearest that a search must return.
      recall_k: how many nearest that share is of.
      recall_queries: chunks to tune on, and as many others to measure on.
      part_rows: the most vectors of one ScaNN index. A larger database becomes several,
        built one after the other, and `find_neighbours` holds one at a time.
    """

    backend: str = "scann"
    metric: Metric = "squared_l2"
    recall_target: float = 0.95
    recall_k: int = 10
    recall_queries: int = 1024
    part_rows: int = 1 << 22

    def __post_init__(self) -> None:
        for name, known in (("backend", store.BACKENDS), ("metric", base.METRICS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is none of {', '.join(known)}"
                )
        if not 0 < self.recall_target <= 1:
            raise ValueError(
                f"recall_target={self.recall_target} must be above 0 and at most 1"
            )
        for name in ("recall_k", "recall_queries", "part_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def main(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    started = time.monotonic()
    section = config_lib.section(config, "index")
    settings = config_lib.build(IndexConfig, section, name="config.index")
    chunks = ChunkStore.open(workdir / "chunks")
    embeddings = Embeddings.open(
        workdir / "embeddings", parents={"chunks": chunks.fingerprint}
    )
    stage = _open_stage(
        workdir / "index",
        dataclasses.asdict(settings),
        {"chunks": chunks.fingerprint, "embeddings": embeddings.fingerprint},
    )
    if stage.finished:
        meta = store.load_manifest(stage.directory, verify=False).meta
        common.say(
            f"index: finished already, {meta['size']:,} vectors in {stage.directory}"
        )
        return
    with stage.released_on_error():
        meta = _build(stage, embeddings, _database(chunks), settings, started)
    one_by_one, in_batches = (meta[_SPEED.format(batch)] for batch in _BATCHES)
    number = meta.get("parts", 1)
    common.say(
        f"index: {meta['size']:,} vectors, {meta['backend']}"
        f"{f' in {number} parts' if number > 1 else ''},"
        f" recall@{settings.recall_k} {meta['recall']:.4f}, {one_by_one:,.0f} queries/s"
        f" one by one, {in_batches:,.0f} in batches, {meta['seconds']:.1f} s"
    )


def _open_stage(
    directory: epath.Path, config: JsonDict, parents: Mapping[str, str]
) -> artifacts.Stage:
    return artifacts.Stage.open(
        directory,
        kind=store.KIND,
        format_version=store.FORMAT_VERSION,
        config=config,
        parents=parents,
        made_by=store.MADE_BY,
    )


def _database(chunks: ChunkStore) -> HostArray:
    """Sorted ids of the chunks that may be retrieved."""
    splits = (chunk_store.TRAIN, chunk_store.DATABASE)
    return np.sort(np.concatenate([chunks.chunks_of(split) for split in splits]))


def _exact(embeddings: Embeddings, ids: HostArray, settings: IndexConfig) -> ExactIndex:
    """Some chunks for exact search: the truth, and perhaps the index itself."""
    exact = ExactIndex.build(embeddings.vectors[ids], ids, metric=settings.metric)
    embeddings.vectors.release()
    return exact


def _sample(
    embeddings: Embeddings, settings: IndexConfig
) -> tuple[HostArray, HostArray]:
    """Vectors [q, d] and ids [q] of chunks of all splits, in random order."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    count = min(2 * settings.recall_queries, len(embeddings))
    ids = rng.choice(len(embeddings), count, replace=False)
    return embeddings.vectors[ids].astype(np.float32), ids


def _build(
    stage: artifacts.Stage,
    embeddings: Embeddings,
    ids: HostArray,
    settings: IndexConfig,
    started: float,
) -> JsonDict:
    """Builds the index over the chunks `ids`, whole or in parts, and commits it."""
    sample = _sample(embeddings, settings)
    in_parts = settings.backend == "scann" and probe.scann_problem() is None
    groups = parts.split(ids, settings.part_rows) if in_parts else [ids]
    if len(groups) > 1:
        made = [
            _build_part(stage, embeddings, groups, number, sample, settings)
            for number in range(len(groups))
        ]
        meta = _measure_whole(made, embeddings, sample, settings)
        return stage.commit({**meta, "seconds": _since(started)}).meta
    stage.restart()
    index, meta = build(_exact(embeddings, ids, settings), sample, settings)
    return store.save(index, stage, {**meta, "seconds": _since(started)}).meta


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)


def _build_part(
    whole: artifacts.Stage,
    embeddings: Embeddings,
    groups: Sequence[HostArray],
    number: int,
    sample: tuple[HostArray, HostArray],
    settings: IndexConfig,
) -> artifacts.Manifest:
    """One part in its own folder, unless an earlier run has finished it."""
    stage = _open_stage(
        whole.directory / parts.name(number),
        {**dataclasses.asdict(settings), "part": number, "parts": len(groups)},
        {"embeddings": embeddings.fingerprint},
    )
    if not stage.finished:
        stage.restart()
        common.say(f"index: part {number + 1} of {len(groups)}")
        with stage.released_on_error():
            exact = _exact(embeddings, groups[number], settings)
            index, meta = build(exact, sample, settings)
            store.save(index, stage, meta)
    manifest = store.load_manifest(stage.directory)
    parts.adopt(whole, manifest)
    return manifest


def _measure_whole(
    made: Sequence[artifacts.Manifest],
    embeddings: Embeddings,
    sample: tuple[HostArray, HostArray],
    settings: IndexConfig,
) -> JsonDict:
    """What is to be said of parts together.

    Raises:
      UserError: their recall is below the target.
    """

    def read(number: int) -> tuple[Index, ExactIndex]:
        index = store.load(made[number])
        return index, _exact(embeddings, index.ids, settings)

    k, target = settings.recall_k, settings.recall_target
    # Those that no part was tuned on.
    queries, own_ids = (array[len(sample[0]) // 2 :] for array in sample)
    recall = parts.recall(len(made), read, queries, own_ids, k)
    if recall < target:
        raise UserError(
            f"index: recall@{k} of all {len(made)} parts is {recall:.4f}, below"
            f" config.index.recall_target={target}; delete {made[0].directory.parent}"
            " and build with a larger config.index.part_rows or a lower target"
        )
    metas = [part.meta for part in made]
    # A query is searched for in one part after the other.
    speed = {
        name: 1 / sum(1 / meta[name] for meta in metas)
        for name in map(_SPEED.format, _BATCHES)
    }
    same = {name: metas[0][name] for name in ("backend", "metric", "dim", "recall_k")}
    size = sum(meta["size"] for meta in metas)
    return {**same, **speed, "size": size, "parts": len(made), "recall": recall}


def build(
    exact: ExactIndex, sample: tuple[HostArray, HostArray], settings: IndexConfig
) -> tuple[Index, JsonDict]:
    """An index over the vectors of `exact`, and what is to be said of it.

    Args:
      exact: holds the vectors and their ids.
      sample: queries and their ids, half to tune on, half to measure on.
      settings: what to build.

    Raises:
      UserError: the recall stays below the target.
    """
    meta: JsonDict = {}
    backend = settings.backend
    if backend == "scann" and (problem := probe.scann_problem()) is not None:
        common.say(f"index: ScaNN does not run here ({problem}); searching exactly")
        meta["fallback"] = problem
        backend = "exact"
    index, recall = exact, 1.0
    if backend == "scann":
        index, recall = _build_scann(exact, sample, settings)
    speed = {
        _SPEED.format(batch): tuning.queries_per_second(
            index, sample[0], k=settings.recall_k, batch=batch
        )
        for batch in _BATCHES
    }
    return index, {**meta, **speed, "recall": recall, "recall_k": settings.recall_k}


def _build_scann(
    exact: ExactIndex, sample: tuple[HostArray, HostArray], settings: IndexConfig
) -> tuple[ScannIndex, float]:
    """A tuned index and the recall that it was measured to have."""
    common.say(f"index: training ScaNN on {exact.size:,} vectors")
    k, target = settings.recall_k, settings.recall_target
    index, recall = tuning.build(exact, *sample, k=k, target=target)
    if recall >= target:
        return index, recall
    raise UserError(
        f"index: recall@{k} is {recall:.4f}, below config.index.recall_target={target},"
        f" even with {index.parameters}; lower the target, or search exactly with"
        " --config.index.backend=exact"
    )


def entry() -> None:
    """Console script."""
    common.run(main, name="build_index")


if __name__ == "__main__":
    entry()
