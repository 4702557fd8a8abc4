"""PyTorch checkpoints (``.bin``, ``.pt``) as numpy arrays, without torch or its code.

Such a file is a pickle that says how tensors are put together (`torch_pickle` reads it
as data), and their raw bytes, which are memory-mapped. Two layouts: a zip archive
(since torch 1.6) and a row of pickles (before; many published BERTs).
"""

from __future__ import annotations

import errno
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from etils import epath

from realm_retro.errors import UserError
from realm_retro.interop import torch_pickle
from realm_retro.interop.torch_pickle import BFLOAT16, Refused, Storage, Tensor
from realm_retro.typing import HostArray

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_ZIP_MAGIC = b"PK\x03\x04"
# Whatever a damaged file makes of the code below.
_DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    EOFError,
    RuntimeError,  # of an archive with a password
    zipfile.BadZipFile,
    zlib.error,
)

# A storage → its bytes.
RawFn = Callable[[Storage], HostArray]


def load(path: epath.PathLike) -> dict[str, HostArray]:
    """Reads a state dict.

    Args:
      path: a file of ``torch.save(model.state_dict(), path)``.

    Returns:
      Name → read-only array, memory-mapped where numpy has the dtype; bfloat16
      becomes float32. Tensors that share memory do so here.

    Raises:
      UserError: the file is missing or damaged, holds something else than tensors, or
        names code.
    """
    try:
        with open(os.fspath(path), "rb") as file:
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            file.seek(0)
            whole = np.memmap(os.fspath(path), np.uint8, "r")
            found, raw = (_zipped if zipped else _legacy)(file, whole)
        _check_state_dict(found, path)
        return {name: _array(tensor, raw) for name, tensor in found.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except UserError:
        raise
    except OSError as error:
        # An archive may name a place before its own beginning.
        if error.errno != errno.EINVAL:
            raise
        raise _refusal(path, error) from None
    except Refused as error:
        raise UserError(
            f"{path}: names {error}, which no plain checkpoint needs and which is not"
            " run; save model.state_dict() of it, or use safetensors"
        ) from None
    except _DAMAGED as error:
        raise _refusal(path, error) from None


def _refusal(path: epath.PathLike, error: Exception) -> UserError:
    return UserError(
        f"{path}: is damaged, or no PyTorch checkpoint ({error}); download it again"
    )


def typed(raw: HostArray, dtype: str) -> HostArray:
    """Bytes as numbers of a dtype, `BFLOAT16` included (as float32)."""
    if dtype == BFLOAT16:
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    return raw.view(dtype)


def _check_state_dict(found: Any, path: epath.PathLike) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {name!r} is no tensor; a checkpoint of weights alone is"
                " needed: save model.state_dict()"
            )


def _zipped(file: IO[bytes], whole: HostArray) -> tuple[Any, RawFn]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        (name,) = (name for name in members if name.endswith("/data.pkl"))
        _check_stored(members[name])
        folder = name.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        found = torch_pickle.read(io.BytesIO(archive.read(name)))

    def raw(storage: Storage) -> HostArray:
        info = members[f"{folder}data/{storage.key}"]
        _check_stored(info)
        # The bytes stand behind a local header that ends in a name and an extra field.
        header = bytes(whole[info.header_offset : info.header_offset + 30])
        if header[:4] != _ZIP_MAGIC:
            raise ValueError(f"{info.filename} is not where the archive says")
        name_bytes = int.from_bytes(header[26:28], "little")
        extra_bytes = int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + name_bytes + extra_bytes
        return whole[start : start + info.file_size]

    return found, raw


def _check_stored(info: zipfile.ZipInfo) -> None:
    # torch compresses nothing; a few bytes could stand for more than memory holds.
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")


def _legacy(file: IO[bytes], whole: HostArray) -> tuple[Any, RawFn]:
    for expected in (_LEGACY_MAGIC, _LEGACY_VERSION):
        if torch_pickle.read(file) != expected:
            raise ValueError("it does not begin as one")
    if not torch_pickle.read(file)["little_endian"]:
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}
    found = torch_pickle.read(file, storages)
    keys = torch_pickle.read(file)
    starts = {}
    position = file.tell()
    for key in keys:
        # Each storage: how many numbers, then the numbers.
        count = int.from_bytes(bytes(whole[position : position + 8]), "little")
        if count != storages[key].size:
            raise ValueError(f"storage {key} has {count} numbers")
        starts[key] = position + 8
        position += 8 + storages[key].num_bytes

    def raw(storage: Storage) -> HostArray:
        start = starts[storage.key]
        return whole[start : start + storage.num_bytes]

    return found, raw


def _array(tensor: Tensor, raw: RawFn) -> HostArray:
    storage = tensor.storage
    data = raw(storage)
    if len(data) != storage.num_bytes:
        raise ValueError(f"storage {storage.key} is cut short")
    flat = typed(data, storage.dtype)
    # A stride or an offset of the file's own making must not lead out of the storage.
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
    if min(tensor.offset, *tensor.strides, *tensor.shape, 0) < 0:
        raise ValueError(f"a tensor begins before storage {storage.key}")
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, flat.dtype)
    if last >= len(flat):
        raise ValueError(f"a tensor reaches beyond storage {storage.key}")
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :],
        tensor.shape,
        [stride * flat.itemsize for stride in tensor.strides],
        writeable=False,
    )
