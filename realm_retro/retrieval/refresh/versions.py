"""Versions of the index's vectors, kind ``index_version``: workers to trainer.

``versions/step-00000100/`` holds ``vectors-00000-of-00003.npy`` … and a manifest whose
parents are the snapshot and what it was applied to. It is filled under a private name
and renamed: a version that can be seen is whole, and never changes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from realm_retro import artifacts, atomic
from realm_retro.arrays import ShardedArray, open_npy
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import folder
from realm_retro.typing import HostArray, JsonDict

KIND = "index_version"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.refresh_index"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a version holds; all workers of a folder must agree on it.

    Attributes:
      num_rows: N, one vector for each passage.
      parents: role → fingerprint of what is embedded, e.g. ``passages``. The snapshot
        is added to them.
      dim: d; None takes what the embedder gives.
      dtype: of the stored vectors, ``float32`` or ``float16``.
      shard_rows: rows of a shard; what one lease covers, and what a kill costs.
    """

    num_rows: int
    parents: Mapping[str, str]
    dim: int | None = None
    dtype: str = "float32"
    shard_rows: int = 8192

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise UserError("there is no passage to embed; prepare the corpus first")
        if "snapshot" in self.parents:
            raise ValueError("the parent 'snapshot' is added by the worker")

    @property
    def num_shards(self) -> int:
        """Shards of a version."""
        return -(-self.num_rows // self.shard_rows)

    def rows(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.num_rows)

    def names(self) -> list[str]:
        """File names of the shards, in order."""
        return shard_names(self.num_shards)

    def as_config(self) -> JsonDict:
        """For a manifest; everything but the parents."""
        return {
            "num_rows": self.num_rows,
            "dim": self.dim,
            "dtype": self.dtype,
            "shard_rows": self.shard_rows,
        }


@dataclasses.dataclass(frozen=True)
class Version:
    """The vectors of all passages by the embedder of one step.

    Attributes:
      step: which.
      manifest: of the artefact.
    """

    step: int
    manifest: artifacts.Manifest

    @property
    def fingerprint(self) -> str:
        """Of the vectors, the settings and the parents."""
        return self.manifest.fingerprint

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        return self.manifest.meta["num_rows"], self.manifest.meta["dim"]


def load_vectors(version: Version) -> ShardedArray:
    """Memory-maps the vectors, float32 or float16 [N, d]; row i is passage i.

    They stay readable while this array lives, even if the version is deleted.

    Raises:
      UserError: they are not what the manifest says.
    """
    directory = version.manifest.directory
    try:
        names = shard_names(version.manifest.meta["num_shards"])
        vectors = ShardedArray.open([version.manifest.path(name) for name in names])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is gone; the version was deleted") from None
    if vectors.shape != version.shape:
        raise UserError(
            f"{directory}: holds {vectors.shape} vectors where the manifest says"
            f" {version.shape}; delete {directory}, a worker makes it again"
        )
    return vectors


def open_version(
    root: epath.PathLike,
    step: int,
    *,
    parents: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Version:
    """Opens the version of one step.

    Args:
      root: the shared folder.
      step: which.
      parents: role → fingerprint that it must come from (``snapshot``, ``passages``).
      verify: recompute checksums; sizes are always compared.

    Raises:
      UserError: it is missing, damaged, or of other parents.
    """
    directory = folder.local(root) / folder.VERSIONS / folder.step_name(step)
    manifest = load_manifest(directory, parents=parents, verify=verify)
    return Version(step, manifest)


def newest_version(
    root: epath.PathLike,
    *,
    parents: Mapping[str, str] | None = None,
    at_most: int | None = None,
    verify: bool = True,
) -> Version | None:
    """Opens the newest version (up to step `at_most`); see `open_version`.

    Returns:
      The version; None where there is none.
    """
    found = folder.steps(folder.local(root) / folder.VERSIONS)
    found = [step for step in found if at_most is None or step <= at_most]
    if not found:
        return None
    return open_version(root, found[-1], parents=parents, verify=verify)


def publish_version(
    root: pathlib.Path,
    step: int,
    target: Target,
    *,
    shards: pathlib.Path,
    snapshot_fingerprint: str,
    meta: Mapping[str, Any],
) -> bool:
    """Makes a version of finished shards.

    Args:
      root: the shared folder.
      step: of the snapshot.
      target: what was embedded.
      shards: the folder with a file for each of ``target.names()``.
      snapshot_fingerprint: the snapshot's.
      meta: measurements.

    Returns:
      False where another process has published it, or the work became void.

    Raises:
      UserError: the shards do not fit each other.
    """
    (root / folder.VERSIONS).mkdir(parents=True, exist_ok=True)
    private = root / folder.VERSIONS / folder.private_name(step)
    final = root / folder.VERSIONS / folder.step_name(step)
    try:
        stage = artifacts.Stage.open(
            private,
            kind=KIND,
            format_version=FORMAT_VERSION,
            config={**target.as_config(), "step": step},
            parents={**target.parents, "snapshot": snapshot_fingerprint},
            made_by=MADE_BY,
        )
        for name in target.names():
            _link_or_copy(shards / name, private / name)
            stage.adopt(name)
        paths = [private / name for name in target.names()]
        dim = _common_dim(paths, target)
        stage.commit(
            {
                **meta,
                "step": step,
                "num_rows": target.num_rows,
                "num_shards": target.num_shards,
                "dim": dim,
            }
        )
        # Gone: the trainer has replaced the snapshot that the shards were made from.
        return shards.exists() and atomic.place_directory(private, final)
    except FileNotFoundError:
        if final.exists():
            return False  # Published by another, who cleared the work away meanwhile.
        raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def shard_names(num_shards: int) -> list[str]:
    """File names of the shards of a version, in order."""
    return [f"vectors-{i:05d}-of-{num_shards:05d}.npy" for i in range(num_shards)]


def check_shard(
    vectors: HostArray, *, rows: tuple[int, int], target: Target, step: int
) -> HostArray:
    """The vectors of a shard in the stored dtype.

    Args:
      vectors: float [stop − start, d].
      rows: start and stop.
      target: what a version holds.
      step: of the snapshot, named in errors.

    Raises:
      UserError: they are not finite, or too large for the dtype.
      ValueError: the embedder gave another shape.
    """
    start, stop = rows
    dim = target.dim if target.dim is not None else vectors.shape[-1]
    if vectors.shape != (stop - start, dim):
        raise ValueError(
            f"the embedder gave {vectors.shape} for rows {start}…{stop - 1} of width"
            f" {dim}"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise UserError(
            f"the embedder of step {step} gives vectors that are not finite"
            f" ({bad.size} of rows {start}…{stop - 1}, the first is {start + bad[0]});"
            " the training has diverged or the snapshot is damaged"
        )
    largest = float(np.abs(vectors).max())
    if largest > float(np.finfo(target.dtype).max):
        raise UserError(
            f"config.refresh.dtype={target.dtype}: cannot hold {largest:.3g}, the"
            " largest number in a vector; use float32"
        )
    return np.ascontiguousarray(vectors, target.dtype)


def _link_or_copy(source: pathlib.Path, final: pathlib.Path) -> None:
    try:
        os.link(source, final)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, final)


def _common_dim(paths: list[pathlib.Path], target: Target) -> int:
    vectors = [open_npy(path) for path in paths]
    for i, (path, shard) in enumerate(zip(paths, vectors, strict=True)):
        start, stop = target.rows(i)
        wanted = (stop - start, vectors[0].shape[1])
        if shard.shape != wanted or shard.dtype != target.dtype:
            raise UserError(
                f"{path.name}: holds {shard.dtype} {shard.shape} where {target.dtype}"
                f" {wanted} belongs: workers with other settings share this folder;"
                " start all with the same --config"
            )
    return vectors[0].shape[1]
