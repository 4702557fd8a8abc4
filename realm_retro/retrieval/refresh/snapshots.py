"""Snapshots of the document embedder, kind ``snapshot``: trainer to workers.

``snapshots/step-00000100/`` holds the parameters as safetensors and a manifest. It is
filled under a private name and renamed, so a snapshot that can be seen is whole.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from realm_retro import artifacts, atomic
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import folder, retention
from realm_retro.typing import HostArray, JsonDict

KIND = "snapshot"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.train"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)

_FILE = "params.safetensors"
_DTYPES = frozenset(
    np.dtype(name)
    for name in "float64 float32 float16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The document embedder after a step of training.

    Attributes:
      step: which.
      manifest: of the artefact.
    """

    step: int
    manifest: artifacts.Manifest

    @property
    def fingerprint(self) -> str:
        """Of the parameters, the step and the parents."""
        return self.manifest.fingerprint

    @property
    def meta(self) -> JsonDict:
        """What the trainer wanted to say with it."""
        return self.manifest.meta

    def arrays(self) -> dict[str, HostArray]:
        """The parameters, in memory, under the names that they were published with.

        Raises:
          UserError: the file is not what the manifest says.
        """
        path = self.manifest.path(_FILE)
        try:
            return safetensors.numpy.load(path.read_bytes())
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: is not a safetensors file ({error}); delete"
                f" {self.manifest.directory}, the trainer publishes another"
            ) from None


def publish_snapshot(
    root: epath.PathLike,
    step: int,
    arrays: Mapping[str, HostArray],
    *,
    meta: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    keep: int = 2,
) -> Snapshot:
    """Hands the embedder's parameters to the workers.

    The same parameters at the same step are not published twice. Others at a step
    that was published (a training that was started again) replace it and everything
    made from it.

    Args:
      root: the shared folder.
      step: how many steps the parameters have seen.
      arrays: name → array; float64/32/16, int64…8, uint8 or bool.
      meta: whatever the trainer wants to find again, e.g. its schedule.
      parents: role → fingerprint, e.g. of the passages; a worker refuses a snapshot
        whose roles differ from its own.
      keep: how many of the newest snapshots stay.

    Raises:
      ValueError: an array has a dtype that the file format lacks.
    """
    path = folder.local(root)
    (path / folder.SNAPSHOTS).mkdir(parents=True, exist_ok=True)
    private = path / folder.SNAPSHOTS / folder.private_name(step)
    final = path / folder.SNAPSHOTS / folder.step_name(step)
    try:
        _fill(private, step, arrays, meta or {}, parents or {})
        written = load_manifest(private, verify=False)
        if final.exists() and not _is(final, written):
            folder.forget(path, step)
        atomic.place_directory(private, final)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    retention.prune(path, keep=keep)
    return open_snapshot(root, step, verify=False)


def open_snapshot(
    root: epath.PathLike,
    step: int,
    *,
    parents: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Snapshot:
    """Opens the snapshot of one step.

    Args:
      root: the shared folder.
      step: which.
      parents: role → fingerprint that it must come from; roles that it does not have
        are refused as well.
      verify: recompute checksums.

    Raises:
      UserError: it is missing, damaged, or of other parents.
    """
    path = folder.local(root) / folder.SNAPSHOTS / folder.step_name(step)
    return Snapshot(step, load_manifest(path, parents=parents, verify=verify))


def newest_snapshot(
    root: epath.PathLike,
    *,
    parents: Mapping[str, str] | None = None,
    at_most: int | None = None,
    verify: bool = True,
) -> Snapshot | None:
    """Opens the newest snapshot (up to step `at_most`); see `open_snapshot`.

    Returns:
      The snapshot; None where there is none.
    """
    found = folder.steps(folder.local(root) / folder.SNAPSHOTS)
    found = [step for step in found if at_most is None or step <= at_most]
    if not found:
        return None
    return open_snapshot(root, found[-1], parents=parents, verify=verify)


def _fill(
    directory: pathlib.Path,
    step: int,
    arrays: Mapping[str, HostArray],
    meta: Mapping[str, Any],
    parents: Mapping[str, str],
) -> None:
    contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    for name, array in contiguous.items():
        if array.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}; publish it as float32")
    stage = artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config={"step": step},
        parents=parents,
        made_by=MADE_BY,
    )
    with stage.write(_FILE) as path:
        safetensors.numpy.save_file(contiguous, path)
    stage.commit(meta)


def _is(directory: pathlib.Path, wanted: artifacts.Manifest) -> bool:
    try:
        return load_manifest(directory, verify=True).fingerprint == wanted.fingerprint
    except UserError:
        return False  # A damaged one is replaced.
