r"""Builds the index that neighbours are searched in, and measures its recall.

Reads   WORKDIR/chunks, WORKDIR/embeddings
Writes  WORKDIR/index   the chunks of the splits train and database; never validation

Example:
  python -m realm_retro.cli.build_index --config=configs/retro/quickstart.py \
      --workdir=/tmp/retro --config.index.recall_target=0.98

An approximate index (ScaNN) is tuned on a sample of chunks and its recall against exact
search measured on another; below config.index.recall_target the build fails. Where
ScaNN does not run, the index is exact.
"""

from __future__ import annotations

import dataclasses
import time

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
from realm_retro.retrieval.index import base, probe, store, tuning
from realm_retro.retrieval.index.base import Index, Metric
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex
from realm_retro.typing import HostArray, JsonDict

# Which chunks are tried; not the run's seed, so that runs may share an index.
_SAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """The ``index`` section of a config.

    Attributes:
      backend: ``scann`` (approximate), or ``exact`` (compares with every vector).
      metric: ``squared_l2``, as RETRO uses, or ``dot_product``.
      recall_target: share of the true nearest that a search must return.
      recall_k: how many nearest that share is of.
      recall_queries: chunks to tune on, and as many others to measure on.
    """

    backend: str = "scann"
    metric: Metric = "squared_l2"
    recall_target: float = 0.95
    recall_k: int = 10
    recall_queries: int = 1024

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
        for name in ("recall_k", "recall_queries"):
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
    stage = artifacts.Stage.open(
        workdir / "index",
        kind=store.KIND,
        format_version=store.FORMAT_VERSION,
        config=dataclasses.asdict(settings),
        parents={
            "chunks": chunks.fingerprint,
            "embeddings": embeddings.fingerprint,
        },
        made_by=store.MADE_BY,
    )
    if stage.finished:
        meta = store.load_manifest(stage.directory, verify=False).meta
        common.say(
            f"index: finished already, {meta['size']:,} vectors in {stage.directory}"
        )
        return
    stage.restart()
    with stage.released_on_error():
        exact = _exact(chunks, embeddings, settings)
        index, meta = build(exact, _sample(embeddings, settings), settings)
    seconds = round(time.monotonic() - started, 2)
    store.save(index, stage, {**meta, "seconds": seconds})
    common.say(
        f"index: {index.size:,} vectors, {index.backend}, recall@{settings.recall_k}"
        f" {meta['recall']:.4f}, {meta['queries_per_second_batch_1']:,.0f} queries/s"
        f" one by one, {meta['queries_per_second_batch_256']:,.0f} in batches,"
        f" {seconds:.1f} s"
    )


def _exact(
    chunks: ChunkStore, embeddings: Embeddings, settings: IndexConfig
) -> ExactIndex:
    """The database for exact search: the truth, and perhaps the index itself."""
    splits = (chunk_store.TRAIN, chunk_store.DATABASE)
    ids = np.sort(np.concatenate([chunks.chunks_of(split) for split in splits]))
    return ExactIndex.build(embeddings.vectors[ids], ids, metric=settings.metric)


def _sample(
    embeddings: Embeddings, settings: IndexConfig
) -> tuple[HostArray, HostArray]:
    """Vectors [q, d] and ids [q] of chunks of all splits, in random order."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    count = min(2 * settings.recall_queries, len(embeddings))
    ids = rng.choice(len(embeddings), count, replace=False)
    return embeddings.vectors[ids].astype(np.float32), ids


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
        f"queries_per_second_batch_{batch}": tuning.queries_per_second(
            index, sample[0], k=settings.recall_k, batch=batch
        )
        for batch in (1, 256)
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
