"""The tensors of a published checkpoint's folder, by name; each is taken once."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from realm_retro.errors import UserError
from realm_retro.interop import torch_files
from realm_retro.interop.name_table import Shape
from realm_retro.interop.torch_pickle import BFLOAT16
from realm_retro.typing import HostArray, JsonDict

# In order of preference; the second of a pair lists the files of a large checkpoint.
FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": BFLOAT16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
# Checkpoints of 2018 call the scale and bias of a norm by these names.
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


class Tensors:
    """The tensors of one checkpoint; see the module docstring."""

    def __init__(self, place: epath.PathLike, found: Mapping[str, HostArray]):
        """Args are the file or folder, for errors, and name → tensor."""
        self.place = place
        self._found = dict(found)

    @classmethod
    def open(cls, path: epath.PathLike) -> Tensors:
        """Memory-maps the tensors of a folder or of one file.

        Args:
          path: a .safetensors, .bin or .pt file, or a folder with one of `FILES`.

        Raises:
          UserError: it is missing, damaged, or of another kind.
        """
        path = epath.Path(path).expanduser()
        found = {
            _modern(name): tensor
            for file in files_of(path)
            for name, tensor in _load(file).items()
        }
        return cls(path, found)

    def names(self) -> set[str]:
        """Names of the tensors that nobody took yet."""
        return set(self._found)

    def take(self, name: str, shape: Shape | None = None) -> HostArray:
        """Takes one tensor as float32.

        Args:
          name: its name.
          shape: the shape that it must have; None for any.

        Raises:
          UserError: it is missing, of another shape, or holds no numbers.
        """
        if name not in self._found:
            raise UserError(f"{self.place}: has no tensor {name!r}")
        value = self._found.pop(name)
        if shape is not None and value.shape != tuple(shape):
            raise UserError(
                f"{self.place}: tensor {name!r} has shape {value.shape}, but"
                f" config.json asks for {tuple(shape)}"
            )
        if value.dtype.kind != "f":
            raise UserError(
                f"{self.place}: tensor {name!r} holds {value.dtype}, no weights"
            )
        return value.astype(np.float32, copy=False)

    def under(self, prefix: str) -> Callable[[str, Shape], HostArray]:
        """`take` for names without their prefix."""
        return lambda name, shape: self.take(f"{prefix}{name}", shape)

    def drop(self, names: Iterable[str]) -> list[str]:
        """Takes away those of `names` that are there, and returns them."""
        return [name for name in names if self._found.pop(name, None) is not None]

    def refuse_leftovers(self) -> None:
        """Raises a `UserError` that names the tensors that nobody took."""
        left = sorted(self._found)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UserError(
                f"{self.place}: tensors without a place in this model:"
                f" {', '.join(left[:3])}{more}; is it another kind of model?"
            )


def read_safetensors(path: epath.PathLike) -> dict[str, HostArray]:
    """Name → memory-mapped array; bfloat16 becomes float32.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        # The library says of a file that may not be read that it is missing.
        open(os.fspath(path), "rb").close()
        with safetensors.safe_open(os.fspath(path), framework="numpy"):
            pass  # The library has checked the header against the file.
        whole = np.memmap(os.fspath(path), np.uint8, "r")
        start = 8 + int.from_bytes(bytes(whole[:8]), "little")
        header: JsonDict = json.loads(bytes(whole[8:start]))
        header.pop("__metadata__", None)
        return {name: _view(whole[start:], info) for name, info in header.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: is damaged ({error}); install or download it again"
        ) from None


def write_safetensors(
    path: epath.PathLike,
    arrays: Mapping[str, HostArray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a .safetensors file that whoever may read this process' files may read."""
    name = os.fspath(path)
    with open(name, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    # The library makes a new file, its owner's alone.
    safetensors.numpy.save_file(dict(arrays), name, metadata=metadata)
    os.chmod(name, mode)


def _view(data: HostArray, info: JsonDict) -> HostArray:
    start, end = info["data_offsets"]
    return torch_files.typed(data[start:end], _DTYPES[info["dtype"]]).reshape(
        info["shape"]
    )


def files_of(path: epath.Path) -> list[epath.Path]:
    """The files of tensors that `Tensors.open` reads.

    Raises:
      UserError: a folder has none.
    """
    if not path.is_dir():
        return [path]
    for single, index in FILES:
        if (path / single).exists():
            return [path / single]
        if (path / index).exists():
            return [path / name for name in _listed(path / index)]
    names = ", ".join(name for pair in FILES for name in pair)
    raise UserError(f"{path}: has no weights; looked for {names}")


def _listed(index: epath.Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise UserError(f"{index}: is damaged ({error}); download it again") from None
    for name in names:
        if not isinstance(name, str) or epath.Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not a file of its folder")
    return names


def _load(path: epath.Path) -> dict[str, HostArray]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return torch_files.load(path)
    raise UserError(
        f"{path}: is not a folder, .safetensors, .bin or .pt file; name the folder of"
        " a published checkpoint"
    )


def _modern(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
