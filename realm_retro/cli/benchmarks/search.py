"""Suite ``search``: latency and throughput of exact search and ScaNN against N."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from realm_retro.cli import common
from realm_retro.cli.benchmarks import report
from realm_retro.cli.benchmarks.report import Report, Series
from realm_retro.errors import UserError
from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import probe, tuning
from realm_retro.retrieval.index.base import Index
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.typing import HostArray

SUITE = "search"
RECALL_TARGET = 0.95
BATCH = 256
# Queries that are asked one by one in a round.
_SINGLE = 64
_TRIALS = 512
# Made-up vectors lie around so many centres for each thousand of them.
_CENTRES_OF_A_THOUSAND = 20
_SPREAD = 0.7


def measure(
    workdir: epath.Path, *, rows: Sequence[int], dim: int, k: int, rounds: int
) -> Report:
    """Runs the suite.

    Args:
      workdir: its embeddings are searched, if it has any; else made-up vectors.
      rows: sizes of the indexes, ascending.
      dim: width of made-up vectors.
      k: neighbours that are searched for.
      rounds: in which all searches of a size take turns.

    Raises:
      UserError: the workdir has too few embeddings, or ScaNN misses its recall.
    """
    vectors, queries, source = _vectors(workdir, max(rows), dim)
    problem = probe.scann_problem()
    series: list[Series] = []
    for size in rows:
        series += _size(vectors[:size], queries, size, k, rounds, problem is None)
    notes = ["without ScaNN, which does not run here: " + problem] if problem else []
    return Report(
        title=f"Search for {k} neighbours in {vectors.shape[1]} dimensions",
        series=[*series, *_growth(series, rows)],
        settings={
            "rows": list(rows),
            "dim": vectors.shape[1],
            "k": k,
            "batch": BATCH,
            "recall_target": RECALL_TARGET,
            "vectors": source,
        },
        notes=[f"vectors: {source}", *notes],
    )


def _vectors(
    workdir: epath.Path, most: int, dim: int
) -> tuple[HostArray, HostArray, str]:
    """Vectors [most, d], queries [q, d] that are none of them, and where from."""
    rng = np.random.default_rng(0)
    count = most + _TRIALS
    if not (workdir / "embeddings").exists():
        centres = rng.normal(size=(max(1, most * _CENTRES_OF_A_THOUSAND // 1000), dim))
        found = centres.astype(np.float32)[rng.integers(len(centres), size=count)]
        found += _SPREAD * rng.normal(size=found.shape).astype(np.float32)
        return found[:most], found[most:], "made up, around random centres"
    embeddings = Embeddings.open(workdir / "embeddings")
    if len(embeddings) < count:
        raise UserError(
            f"{workdir / 'embeddings'}: holds {len(embeddings)} vectors, --rows={most}"
            f" needs {count} ({_TRIALS} are queries); lower --rows, or take another"
            " --workdir for made-up ones"
        )
    chosen = rng.choice(len(embeddings), count, replace=False)
    found = embeddings.vectors[chosen].astype(np.float32)
    return found[:most], found[most:], f"embeddings {embeddings.fingerprint[:12]}"


def _size(
    vectors: HostArray,
    queries: HostArray,
    size: int,
    k: int,
    rounds: int,
    with_scann: bool,
) -> list[Series]:
    """All that is measured at one size."""
    ids = np.arange(size)
    exact = ExactIndex.build(vectors, ids, metric="squared_l2")
    indexes: dict[str, Index] = {"exact": exact}
    found = []
    if with_scann:
        began = time.perf_counter()
        none_of_them = np.full(len(queries), -1)
        indexes["scann"], recall = tuning.build(
            exact, queries, none_of_them, k=k, target=RECALL_TARGET
        )
        seconds = time.perf_counter() - began
        common.say(f"{size:,} vectors: ScaNN built and tuned in {seconds:.1f} s")
        found = [
            Series(_name("scann", f"recall@{k}", size), "", [recall]),
            Series(_name("scann", "build and tune", size), "s", [seconds]),
        ]
    values: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, index in indexes.items():
            for what, run in _WAYS.items():
                value = run(index, queries, k)
                if number:  # the first compiles
                    values.setdefault((name, what), []).append(value)
    common.say(f"{size:,} vectors: {rounds} rounds")
    units = dict(zip(_WAYS, ("ms", "queries/s"), strict=True))
    return [
        *(Series(_name(*key, size), units[key[1]], x) for key, x in values.items()),
        *found,
    ]


def _one_by_one(index: Index, queries: HostArray, k: int) -> float:
    """Milliseconds of a search for one query: the mean over some."""
    few = queries[:_SINGLE]
    began = time.perf_counter()
    for row in range(len(few)):
        index.search(few[row : row + 1], k)
    return 1e3 * (time.perf_counter() - began) / len(few)


def _in_batches(index: Index, queries: HostArray, k: int) -> float:
    """Queries a second, in batches."""
    began = time.perf_counter()
    for start in range(0, len(queries), BATCH):
        index.search(queries[start : start + BATCH], k)
    return len(queries) / (time.perf_counter() - began)


_WAYS: dict[str, Callable[[Index, HostArray, int], float]] = {
    "one query": _one_by_one,
    f"batches of {BATCH}": _in_batches,
}


def _growth(series: Sequence[Series], rows: Sequence[int]) -> list[Series]:
    """How much longer a query takes in the largest index than in the smallest."""
    if len(rows) < 2:
        return []
    by_name = {one.name: one for one in series}
    found = []
    for name in ("exact", "scann"):
        least = by_name.get(_name(name, "one query", rows[0]))
        most = by_name.get(_name(name, "one query", rows[-1]))
        if least and most:
            title = f"{name}, one query: {rows[-1]:,} over {rows[0]:,} vectors"
            values = report.ratio(most.values, least.values)
            found.append(Series(title, "ratio", values))
    return found


def _name(index: str, what: str, size: int) -> str:
    return f"{index}, {size:,} vectors, {what}"
