r"""Index build and search beside faiss and hnswlib, on real embeddings.

Each system is built with several shapes and tuned, on one half of the queries, to the
cheapest setting whose recall@10 reaches the target; its recall is then measured on the
other half. Timed runs alternate between the systems; medians and ratios of paired runs
are reported.

Example (peers: pip install faiss-cpu hnswlib):
  python tests/benchmarks/bench_index.py --embeddings=/tmp/wiki/embeddings \
      --rows=40000 --threads=2 --json=/tmp/index.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import paired

from realm_retro.retrieval.embeddings import Embeddings
from realm_retro.retrieval.index import tuning
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.scann import ScannIndex

K = 10
BATCHES = (1, 256)
MARGIN = 0.004  # tune a little above the target, so that the other half passes


@dataclasses.dataclass(frozen=True, eq=False)
class Searcher:
    """A built index with one setting.

    Attributes:
      name: of the system.
      setting: shape and effort, as a reader would write them.
      search: queries float32 [q, d] → rows int [q, K]; uses one thread for one query.
      build_seconds: of the index, without tuning.
    """

    name: str
    setting: str
    search: Callable[[np.ndarray], np.ndarray]
    build_seconds: float


# Several searchers of one index, from little effort to much.
Ladder = list[Searcher]


def rising(start: int) -> list[int]:
    """Efforts to try, each about a fifteenth more than the last."""
    return sorted({round(start * 1.07**i) for i in range(40)})


def ours(vectors: np.ndarray, threads: int) -> Iterator[Ladder]:
    """This package's ScaNN index."""
    ids = np.arange(len(vectors))
    shape = tuning.initial_parameters(len(vectors), K)
    start = time.perf_counter()
    index = ScannIndex.build(vectors, ids, metric="squared_l2", parameters=shape)
    seconds = time.perf_counter() - start
    index.searcher.set_num_threads(threads)

    def searcher(leaves: int, reorder: int) -> Searcher:
        parameters = dataclasses.replace(
            shape, leaves_to_search=leaves, reorder=reorder, tuned_k=K
        )
        tuned = dataclasses.replace(index, parameters=parameters)
        setting = f"{shape.num_leaves} leaves, search {leaves}, reorder {reorder}"
        return Searcher("ours", setting, lambda q: tuned.search(q, K).ids, seconds)

    for reorder in (60, 80, 100, 150):
        yield [searcher(leaves, reorder) for leaves in rising(8)]


def faiss_ivf(vectors: np.ndarray, threads: int) -> Iterator[Ladder]:
    """IVF, 4-bit product quantisation with fast scan, refined with full vectors."""
    import faiss

    lists = round(np.sqrt(len(vectors)))
    for parts in (vectors.shape[1] // 2, vectors.shape[1] // 4):
        shape = f"IVF{lists},PQ{parts}x4fs,RFlat"
        faiss.omp_set_num_threads(threads)
        start = time.perf_counter()
        index = faiss.index_factory(vectors.shape[1], shape)
        index.train(vectors)
        index.add(vectors)
        seconds = time.perf_counter() - start
        inner = faiss.downcast_index(index.base_index)

        def searcher(
            probes: int,
            factor: int,
            index: Any = index,
            inner: Any = inner,
            shape: str = shape,
            seconds: float = seconds,
        ) -> Searcher:
            def search(queries: np.ndarray) -> np.ndarray:
                # One thread for one query: more only wait for each other.
                faiss.omp_set_num_threads(1 if len(queries) == 1 else threads)
                inner.nprobe, index.k_factor = probes, factor
                return index.search(queries, K)[1]

            setting = f"{shape}, probe {probes}, refine {factor}k"
            return Searcher("faiss", setting, search, seconds)

        for factor in (2, 4, 8, 16):
            yield [searcher(probes, factor) for probes in rising(8)]


def hnsw(vectors: np.ndarray, threads: int) -> Iterator[Ladder]:
    """Navigable small-world graphs of two degrees."""
    import hnswlib

    for degree, effort in ((16, 100), (24, 200)):
        start = time.perf_counter()
        index = hnswlib.Index(space="l2", dim=vectors.shape[1])
        index.init_index(len(vectors), M=degree, ef_construction=effort)
        index.set_num_threads(threads)
        index.add_items(vectors)
        seconds = time.perf_counter() - start

        def searcher(
            width: int,
            index: Any = index,
            degree: int = degree,
            seconds: float = seconds,
        ) -> Searcher:
            def search(queries: np.ndarray) -> np.ndarray:
                index.set_ef(width)
                used = 1 if len(queries) == 1 else threads
                return index.knn_query(queries, K, num_threads=used)[0]

            return Searcher("hnswlib", f"M {degree}, ef {width}", search, seconds)

        yield [searcher(width) for width in rising(20)]


SYSTEMS = {"ours": ours, "faiss": faiss_ivf, "hnswlib": hnsw}


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true rows [q, K] that are among the found ones."""
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())


def in_batches(searcher: Searcher, queries: np.ndarray, batch: int) -> None:
    """One pass over the queries."""
    for start in range(0, len(queries), batch):
        searcher.search(queries[start : start + batch])


def cheapest(
    ladders: Iterator[Ladder], queries: np.ndarray, truth: np.ndarray, target: float
) -> dict[int, Searcher]:
    """For each batch size the fastest of the first of each ladder to reach the target.

    Raises:
      SystemExit: none does.
    """
    able = [
        searcher
        for ladder in ladders
        for searcher in itertools.islice(
            (s for s in ladder if recall(s.search(queries), truth) >= target), 1
        )
    ]
    if not able:
        raise SystemExit(f"no setting reaches recall@{K} {target}")
    best = {}
    for batch in BATCHES:
        few = queries[: 2 * batch + 300]
        times = paired.seconds(
            {
                str(i): functools.partial(in_batches, searcher, few, batch)
                for i, searcher in enumerate(able)
            },
            rounds=5,
        )
        medians = [statistics.median(times[str(i)]) for i in range(len(able))]
        best[batch] = able[int(np.argmin(medians))]
    return best


def compare(
    vectors: np.ndarray, queries: np.ndarray, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Builds, tunes and times the systems; returns what is printed, as JSON values."""
    exact = ExactIndex.build(vectors, np.arange(len(vectors)), metric="squared_l2")
    truth = exact.search(queries, K).ids
    half = len(queries) // 2
    tuned = {}
    for name in arguments.systems:
        ladders = SYSTEMS[name](vectors, arguments.threads)
        target = arguments.target + MARGIN
        tuned[name] = cheapest(ladders, queries[:half], truth[:half], target)
        print(f"{name}: built and tuned", flush=True)
    held_out, truth = queries[half:], truth[half:]
    rows = []
    for batch in BATCHES:
        timed = held_out[: arguments.queries_per_round] if batch == 1 else held_out
        searchers = {name: tuned[name][batch] for name in arguments.systems}
        times = paired.seconds(
            {
                name: functools.partial(in_batches, searcher, timed, batch)
                for name, searcher in searchers.items()
            },
            rounds=arguments.rounds,
        )
        for name, searcher in searchers.items():
            median = statistics.median(times[name]) / len(timed)
            rows.append(
                {
                    "batch": batch,
                    "system": name,
                    "setting": searcher.setting,
                    "recall": recall(searcher.search(held_out), truth),
                    "microseconds": median * 1e6,
                    "queries_per_second": 1 / median,
                    "first_over_this": paired.ratio(times, arguments.systems[0], name),
                    "build_seconds": searcher.build_seconds,
                    "seconds": times[name],
                }
            )
    return {"results": rows, "rows": len(vectors), "dim": vectors.shape[1]}


def table(report: dict[str, Any]) -> str:
    """The report in Markdown; a ratio below 1 says that the first system is faster."""
    lines = [
        "| batch | system | recall@10 | µs/query | queries/s | first / this | build s |"
        " setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['batch']} | {row['system']} | {row['recall']:.4f}"
        f" | {row['microseconds']:.1f} | {row['queries_per_second']:,.0f}"
        f" | {row['first_over_this']['median']:.2f} | {row['build_seconds']:.1f}"
        f" | {row['setting']} |"
        for row in report["results"]
    ]
    return "\n".join(lines)


def read(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Vectors to index and, apart from them, queries, both drawn at random."""
    embeddings = Embeddings.open(arguments.embeddings)
    wanted = arguments.rows + arguments.queries
    if len(embeddings) < wanted:
        raise SystemExit(
            f"{arguments.embeddings}: has {len(embeddings):,} vectors, {wanted:,} are"
            " needed; lower --rows or --queries"
        )
    rows = np.random.default_rng(0).permutation(len(embeddings))[:wanted]
    drawn = embeddings.vectors[rows].astype(np.float32)
    return drawn[: arguments.rows], drawn[arguments.rows :]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", required=True, help="an embeddings folder")
    parser.add_argument("--rows", type=int, default=40_000, help="vectors in the index")
    parser.add_argument("--queries", type=int, default=4096, help="others, to ask with")
    parser.add_argument("--queries_per_round", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs, at least 5")
    parser.add_argument("--target", type=float, default=0.98, help="recall@10")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS)
    )
    parser.add_argument("--json", help="where to write the report")
    arguments = parser.parse_args(argv)
    vectors, queries = read(arguments)
    report = compare(vectors, queries, arguments)
    report |= {
        "threads": arguments.threads,
        "target": arguments.target,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    print(table(report))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
