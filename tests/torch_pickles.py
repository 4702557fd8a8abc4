"""PyTorch files written operation by operation, for tests that have no torch."""

import json
import struct
import zipfile

import numpy as np


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(key, size, shape, strides, offset=0, kind="FloatStorage"):
    """The operations that describe one tensor, as torch.save writes them."""
    storage = text("storage") + f"ctorch\n{kind}\n".encode()
    storage += text(key) + text("cpu") + integer(size)
    return b"".join(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            storage + b"tQ" + integer(offset),
            b"(" + b"".join(map(integer, shape)) + b"t",
            b"(" + b"".join(map(integer, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    )


def state_dict(tensors):
    """The pickle of name → operations of its tensor."""
    items = b"".join(text(name) + value for name, value in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def write_zip(path, pickled, storages, *, compression=zipfile.ZIP_STORED):
    """The layout since torch 1.6."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def save(path, arrays):
    """A checkpoint of float32 arrays, and one of int64 for other kinds."""
    described, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        floats = array.dtype.kind == "f"
        array = np.ascontiguousarray(array, "<f4" if floats else "<i8")
        strides = [stride // array.itemsize for stride in array.strides]
        kind = "FloatStorage" if floats else "LongStorage"
        key = str(number)
        described[name] = tensor(key, array.size, array.shape, strides, kind=kind)
        storages[key] = array.tobytes()
    write_zip(path, state_dict(described), storages)


def write_folder(folder, arrays, config):
    """A checkpoint's folder as it was published before safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "pytorch_model.bin", arrays)
    return folder
