"""Embeddings of chunks on disk, kind ``embeddings``.

Row i belongs to chunk i of the parent ``chunks``; the parent ``encoder`` is the
fingerprint of what made them. Files: ``vectors-00000-of-00003.npy``, float32 or
float16 [rows, d], memory-mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etils import epath

from realm_retro import artifacts
from realm_retro.arrays import ShardedArray
from realm_retro.errors import UserError
from realm_retro.retrieval.embed import EmbedConfig
from realm_retro.shards import Shard

KIND = "embeddings"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.embed"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Vectors of all chunks.

    Attributes:
      vectors: float32 or float16 [N, d], not normalised; row i is chunk i.
      manifest: of the artefact.
    """

    vectors: ShardedArray
    manifest: artifacts.Manifest

    @classmethod
    def open(
        cls,
        directory: epath.PathLike,
        *,
        parents: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> Embeddings:
        """Opens finished embeddings.

        Args:
          directory: where they lie.
          parents: role (``chunks``, ``encoder``) → fingerprint they must come from.
          verify: recompute checksums.

        Raises:
          UserError: they are missing, unfinished, damaged, or of other parents.
        """
        manifest = load_manifest(directory, parents=parents, verify=verify)
        names = shard_names(manifest.meta["texts"], manifest.config["shard_size"])
        vectors = ShardedArray.open([manifest.path(name) for name in names])
        shape = (manifest.meta["texts"], manifest.meta["dim"])
        if vectors.shape != shape:
            raise UserError(
                f"{directory}: holds {vectors.shape} vectors where the manifest says"
                f" {shape}; delete {directory} and run: python -m {MADE_BY}"
            )
        return cls(vectors=vectors, manifest=manifest)

    @property
    def dim(self) -> int:
        """Size of a vector (d)."""
        return self.vectors.shape[1]

    @property
    def fingerprint(self) -> str:
        """The artefact's fingerprint."""
        return self.manifest.fingerprint

    @property
    def encoder_fingerprint(self) -> str:
        """What made them; a query must come from the same encoder."""
        return self.manifest.parents["encoder"]

    def __len__(self) -> int:
        """The number of vectors (N)."""
        return len(self.vectors)


def open_stage(
    directory: epath.PathLike,
    *,
    config: EmbedConfig,
    compute_dtype: str,
    chunks_fingerprint: str,
    encoder_fingerprint: str,
    join: bool = False,
) -> artifacts.Stage:
    """Opens the stage for writing or resuming, to be shared.

    How batches are cut is no part of it: any size gives the same vectors, up to
    rounding.
    """
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config={
            "dtype": config.dtype,
            "shard_size": config.shard_size,
            "compute_dtype": compute_dtype,
        },
        parents={"chunks": chunks_fingerprint, "encoder": encoder_fingerprint},
        made_by=MADE_BY,
        join=join,
    )


def shard_names(num_rows: int, shard_size: int) -> list[str]:
    """File names of the shards of `num_rows` vectors, in order."""
    count = -(-num_rows // shard_size)
    return [f"vectors-{i:05d}-of-{count:05d}.npy" for i in range(count)]


def shards(num_rows: int, shard_size: int) -> list[Shard]:
    """The shards of `num_rows` vectors, in order."""
    return [
        Shard(i * shard_size, min((i + 1) * shard_size, num_rows), (name,))
        for i, name in enumerate(shard_names(num_rows, shard_size))
    ]
