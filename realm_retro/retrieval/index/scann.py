"""Approximate search with ScaNN: a partitioning tree, quantised scores, re-ordering.

ScaNN's best build (quantised residuals, SOAR spilling) exists for the inner product
only, so the squared distance is searched as one: with

    x' = [x, (t − ‖x‖²) / 2c],    q' = [q, c],

2 q' · x' = ‖q‖² + t − ‖q − x‖², whose order is the distance's. The offset t (the mean
of ‖x‖²) and the scale c only keep the extra coordinate small beside the others, so
that quantisation treats it no worse.

ScaNN wants all vectors in memory as float32 ``[N, d]`` and copies them while it builds:
plan for three times ``4·N·d`` bytes when building and once when searching. A larger
database is split over several indexes, whose results `retrieval.merge` joins.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
from etils import epath

from realm_retro.arrays import open_npy, write_npy
from realm_retro.artifacts import Manifest, Stage
from realm_retro.disk import named_errors
from realm_retro.errors import UserError
from realm_retro.retrieval.index import base
from realm_retro.retrieval.index.probe import scann_problem
from realm_retro.typing import HostArray, JsonDict

# Found best at 40,000 sentence embeddings of width 384.
DIMS_PER_BLOCK = 3
SOAR_LAMBDA = 1.5
SCALE = 0.7  # c, in root mean square lengths of the vectors
MIN_LEAF_SIZE = 10
TRAINING_SAMPLE = 100_000

# ScaNN hands a batch to its threads in pieces: one each, but not so large that what the
# queries of a piece share leaves the cache.
_MAX_PIECE = 128

_FOLDER = "scann"
_IDS = "ids.npy"
# More than is left on a disk that a write of ScaNN did not fit on.
_PROBE = 1 << 20


@dataclasses.dataclass(frozen=True)
class ScannParameters:
    """What decides the speed and the recall of a search.

    Attributes:
      num_leaves: partitions of the tree; 0 scores every row exactly.
      leaves_to_search: partitions scored for a query.
      reorder: candidates whose scores are computed exactly.
      tuned_k: the number of results that these were tuned for; a search for more
        looks at proportionally more leaves and candidates.
    """

    num_leaves: int
    leaves_to_search: int
    reorder: int
    tuned_k: int

    def effort(self, k: int, size: int) -> tuple[int, int]:
        """Candidates to re-order and leaves to search for k of `size` results.

        All of both where k is the whole index, so that nothing can be missing; −1
        where there is no tree.
        """
        if not self.num_leaves:
            return -1, -1
        if k >= size:
            return size, self.num_leaves
        factor = max(1.0, k / self.tuned_k)
        reorder = min(size, max(k, math.ceil(factor * self.reorder)))
        return reorder, min(self.num_leaves, math.ceil(factor * self.leaves_to_search))


@dataclasses.dataclass(frozen=True, eq=False)
class ScannIndex:
    """A ScaNN searcher with our ids and scores. See the module docstring.

    Attributes:
      searcher: ScaNN's own; it knows rows, not ids.
      ids: int64 ``[N]``, strictly increasing.
      metric: ``squared_l2`` or ``dot_product``.
      width: of a vector.
      parameters: may be replaced (`dataclasses.replace`) but for `num_leaves`.
      scale: c of the module docstring; unused for the inner product.
      offset: t of the module docstring; 0 for the inner product.
    """

    searcher: Any
    ids: HostArray
    metric: base.Metric
    width: int
    parameters: ScannParameters
    scale: float
    offset: float
    backend: str = "scann"

    @classmethod
    def build(
        cls,
        vectors: HostArray,
        ids: HostArray,
        *,
        metric: base.Metric,
        parameters: ScannParameters,
    ) -> ScannIndex:
        """Trains and fills an index over ``vectors [N, d]`` of any float dtype, N ≥ 1.

        Raises:
          UserError: a vector is not finite.
          ValueError: the ids are not strictly increasing, one per row.
        """
        from scann import scann_ops_pybind

        ids = base.check_ids(ids, num_rows=len(vectors))
        vectors = base.check_vectors(vectors, ids)
        width = vectors.shape[1]
        scale, offset = 1.0, 0.0
        if metric == "squared_l2":
            norms = base.squared_norms(vectors)
            offset = float(norms.mean(dtype=np.float64))
            scale = SCALE * math.sqrt(offset) or 1.0
            extra = (offset - norms) / (2 * scale)
            vectors = np.concatenate([vectors, extra[:, None]], axis=1)
        builder: Any = scann_ops_pybind.builder(
            vectors, parameters.tuned_k, "dot_product"
        )
        if parameters.num_leaves:
            builder = (
                builder.tree(
                    parameters.num_leaves,
                    parameters.leaves_to_search,
                    min_partition_size=MIN_LEAF_SIZE,
                    training_sample_size=TRAINING_SAMPLE,
                    soar_lambda=SOAR_LAMBDA,
                )
                .score_ah(DIMS_PER_BLOCK, training_sample_size=TRAINING_SAMPLE)
                .reorder(parameters.reorder)
            )
        else:
            builder = builder.score_brute_force()
        return cls(builder.build(), ids, metric, width, parameters, scale, offset)

    @classmethod
    def load(cls, manifest: Manifest) -> ScannIndex:
        """Reads what `save` wrote, wherever the folder lies now.

        Raises:
          UserError: ScaNN does not run here, or the folder holds a file that the
            manifest does not list (ScaNN would unpickle one of them).
        """
        problem = scann_problem()
        if problem is not None:
            raise UserError(
                f"{manifest.directory}: was built with ScaNN, which does not run here"
                f" ({problem}); delete it and build again with"
                " --config.index.backend=exact"
            )
        from scann import scann_ops_pybind

        folder = manifest.directory / _FOLDER
        for path in folder.iterdir():
            if f"{_FOLDER}/{path.name}" not in manifest.files or path.suffix == ".pkl":
                raise UserError(f"{path}: does not belong to the index; delete it")
        meta = manifest.meta["scann"]
        return cls(
            searcher=scann_ops_pybind.load_searcher(os.fspath(folder)),
            ids=open_npy(manifest.path(_IDS)),
            metric=manifest.meta["metric"],
            width=meta["width"],
            parameters=ScannParameters(**meta["parameters"]),
            scale=meta["scale"],
            offset=meta["offset"],
        )

    def save(self, stage: Stage) -> None:
        """Writes the searcher and the ids."""
        folder = stage.directory / _FOLDER
        folder.mkdir(exist_ok=True)
        # Relative paths inside, so that the folder may move; our own ids beside it,
        # because ScaNN would pickle them.
        with named_errors(folder):
            try:
                self.searcher.serialize(os.fspath(folder), relative_path=True)
            except RuntimeError:
                _try_disk(folder)
                raise
        for path in sorted(folder.iterdir()):
            stage.adopt(f"{_FOLDER}/{path.name}")
        with stage.write(_IDS) as path:
            write_npy(path, self.ids)

    def describe(self) -> JsonDict:
        """What `load` needs beside the files."""
        return {
            "parameters": dataclasses.asdict(self.parameters),
            "width": self.width,
            "scale": self.scale,
            "offset": self.offset,
        }

    @property
    def size(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.width

    def search(self, queries: HostArray, k: int) -> base.SearchResult:
        """About the k best of ``queries [q, d]``.

        Raises:
          UserError: a query is not finite.
        """
        queries = base.check_queries(queries, dim=self.width, k=k)
        if not len(queries):
            return base.SearchResult.missing(0, k)
        found = min(k, self.size)
        rows, products = self._search_rows(queries, found)
        ids, scores = self.ids[rows], products
        if self.metric == "squared_l2":
            shift = base.squared_norms(queries) + np.float32(self.offset)
            scores = np.minimum(2 * products - shift[:, None], 0)
        # Where a search ends with too few, ScaNN fills up with row 0 and NaN.
        if found == k and not np.isnan(products[:, -1]).any():
            return base.SearchResult(ids, scores)
        missing = np.isnan(products)
        result = base.SearchResult.missing(len(queries), k)
        result.ids[:, :found] = np.where(missing, base.MISSING_ID, ids)
        result.scores[:, :found] = np.where(missing, base.MISSING_SCORE, scores)
        return result

    def _search_rows(self, queries: HostArray, k: int) -> tuple[HostArray, HostArray]:
        """Rows uint32 and inner products float32 ``[q, k]``, NaN where missing."""
        if self.metric == "squared_l2":
            extended = np.empty((len(queries), self.width + 1), np.float32)
            extended[:, :-1] = queries
            extended[:, -1] = self.scale
            queries = extended
        reorder, leaves = self.parameters.effort(k, self.size)
        if len(queries) > 1:
            share = math.ceil(len(queries) / (os.cpu_count() or 1))
            return self.searcher.search_batched_parallel(
                queries, k, reorder, leaves, batch_size=min(share, _MAX_PIECE)
            )
        # The single search has less overhead, but returns only what it found.
        rows, products = self.searcher.search(queries[0], k, reorder, leaves)
        if len(rows) < k:
            lacking = (0, k - len(rows))
            rows = np.pad(rows, lacking)
            products = np.pad(products, lacking, constant_values=np.nan)
        return rows[None], products[None]


def _try_disk(folder: epath.Path) -> None:
    """Raises the disk's error, if it has one: ScaNN says only that it could not."""
    path = folder / "probe"
    try:
        path.write_bytes(bytes(_PROBE))
    finally:
        path.unlink(missing_ok=True)
