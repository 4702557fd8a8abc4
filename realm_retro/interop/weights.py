"""Converted checkpoints on disk, kind ``weights``.

Files: ``weights.safetensors``, our parameters under names such as
``query/bert/embeddings/tokens``; and for a published RealmForOpenQA
``vectors-00000-of-00014.npy``, float32 [rows, d], and ``blocks.jsonl``, the text of
each row, as documents that `realm_retro.cli.prepare` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.arrays import ShardedArray, flatten, unflatten, write_npy
from realm_retro.errors import UserError
from realm_retro.interop.realm import Published
from realm_retro.interop.tensors import read_safetensors, write_safetensors
from realm_retro.typing import HostArray

KIND = "weights"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.convert"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)

WEIGHTS = "weights.safetensors"
BLOCKS = "blocks.jsonl"
_SHARD = 1 << 20  # vectors


def open_stage(directory: epath.PathLike, inputs: Mapping[str, str]) -> artifacts.Stage:
    """Opens the stage for writing or resuming.

    Args:
      directory: its own.
      inputs: name → SHA-256 of every file that is read.
    """
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config={"inputs": dict(inputs)},
        parents={},
        made_by=MADE_BY,
    )


def write(
    stage: artifacts.Stage, published: Published, blocks: Iterable[str] | None
) -> artifacts.Manifest:
    """Writes what is not there yet, and commits.

    Args:
      stage: from `open_stage`.
      published: the checkpoint.
      blocks: the text of each of its vectors, if at hand.

    Raises:
      UserError: there is not one text for each vector.
    """
    vectors = published.vectors
    rows = 0 if vectors is None else len(vectors)
    # First: where the texts turn out to be of other vectors, nothing is there yet.
    if blocks is not None and not stage.has(BLOCKS):
        _write_blocks(stage, blocks, rows)
    if not stage.has(WEIGHTS):
        with stage.write(WEIGHTS) as path:
            write_safetensors(
                path,
                {
                    name: np.ascontiguousarray(value)
                    for name, value in flatten(published.parts).items()
                },
            )
    if vectors is not None:
        _write_vectors(stage, vectors)
    return stage.commit(
        {
            "model": published.model,
            "parts": sorted(published.parts),
            "rows": rows,
            "unused": list(published.unused),
        }
    )


def load(directory: epath.PathLike, *, verify: bool = True) -> Published:
    """Reads a finished conversion.

    Returns:
      The checkpoint; its vectors are a `ShardedArray` on disk.

    Raises:
      UserError: it is missing, unfinished or damaged.
    """
    manifest = load_manifest(directory, verify=verify)
    vectors = None
    if rows := manifest.meta["rows"]:
        paths = [manifest.path(name) for name in shard_names(rows)]
        vectors = ShardedArray.open(paths)
    flat = read_safetensors(manifest.path(WEIGHTS))
    return Published(
        manifest.meta["model"],
        unflatten(flat),
        vectors,
        tuple(manifest.meta["unused"]),
    )


def shard_names(rows: int) -> list[str]:
    """File names of the shards of the vectors, in order."""
    count = -(-rows // _SHARD)
    return [f"vectors-{i:05d}-of-{count:05d}.npy" for i in range(count)]


def _write_vectors(stage: artifacts.Stage, vectors: HostArray | ShardedArray) -> None:
    with progress.bar(total=len(vectors), unit="vectors", label="vectors") as bar:
        for number, name in enumerate(shard_names(len(vectors))):
            rows = vectors[number * _SHARD : (number + 1) * _SHARD]
            if not stage.has(name):
                with stage.write(name) as path:
                    write_npy(path, rows)
            bar.update(len(rows))


def _write_blocks(stage: artifacts.Stage, blocks: Iterable[str], rows: int) -> None:
    with (
        stage.write(BLOCKS) as path,
        path.open("w") as file,
        progress.bar(total=rows, unit="blocks", label="blocks") as bar,
    ):
        count = 0
        for count, text in enumerate(blocks, start=1):
            # Ids sort as rows do, and name the row that a passage's vector lies in.
            line = {"id": f"{count - 1:08d}", "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            bar.update()
        if count != rows:
            raise UserError(
                f"{stage.directory}: {count:,} block records for {rows:,} block"
                " vectors; they must belong together: name the --records of this one"
            )
