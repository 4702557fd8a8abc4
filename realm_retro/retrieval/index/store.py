"""An index on disk: one artefact, whichever backend wrote it."""

from __future__ import annotations

from collections.abc import Mapping

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.retrieval.index import parts as parts_lib
from realm_retro.retrieval.index.base import Index
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.retrieval.index.parts import PartedIndex
from realm_retro.retrieval.index.scann import ScannIndex
from realm_retro.typing import JsonDict

KIND = "index"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.build_index"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)
BACKENDS = ("scann", "exact")


def save(
    index: Index, stage: artifacts.Stage, meta: Mapping[str, object]
) -> artifacts.Manifest:
    """Writes an index and commits the stage; `meta` joins what `load` needs."""
    index.save(stage)
    own: JsonDict = {
        "backend": index.backend,
        "metric": index.metric,
        "size": index.size,
        "dim": index.dim,
        index.backend: index.describe(),
    }
    return stage.commit({**meta, **own})


def load(manifest: artifacts.Manifest) -> Index:
    """The index of a checked manifest, with the backend that wrote it.

    Raises:
      UserError: the backend is unknown, or does not run here.
    """
    if len(held := parts(manifest)) > 1:
        return PartedIndex.join(load(part) for part in held)
    backend = manifest.meta.get("backend")
    if backend == "exact":
        return ExactIndex.load(manifest)
    if backend == "scann":
        return ScannIndex.load(manifest)
    raise UserError(
        f"{manifest.directory}: has the unknown backend {backend!r}; delete it and"
        f" run: python -m {MADE_BY}"
    )


def parts(manifest: artifacts.Manifest) -> list[artifacts.Manifest]:
    """The manifests of an index's parts, each of which `load` takes; see `parts`.

    One that is not in parts is its only part. Their files are those of `manifest`, so
    whoever has checked these has checked them.
    """
    count = manifest.meta.get("parts", 1)
    if count == 1:
        return [manifest]
    folders = [manifest.directory / parts_lib.name(i) for i in range(count)]
    return [load_manifest(folder, verify=False) for folder in folders]
