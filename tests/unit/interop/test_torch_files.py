"""PyTorch files without torch: the same numbers, and no code is ever run."""

import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch_pickles
from torch_pickles import tensor

from realm_retro.errors import UserError
from realm_retro.interop import torch_files, torch_pickle

RECORDED = pathlib.Path(__file__).parents[2] / "golden" / "torch_files"
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_files_that_torch_wrote(name):
    found = torch_files.load(RECORDED / name)
    wanted = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.float32([0.5, -1.5]),
        "transposed": MATRIX.T,
        "row": MATRIX[1],
        "half": np.float16([0.5, -2]),
        "bfloat16": np.float32([1, -3.140625]),
        "double": np.float64([[1e300]]),
        "long": np.int64([1, -(2**40)]),
        "bool": np.array([True, False]),
        "scalar": np.float32(7),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": np.float32([4]),
    }
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)
        assert not found[key].flags.writeable or not found[key].size


def write(tmp_path, tensors, storages=None, **kwargs):
    path = tmp_path / "model.bin"
    storages = {"0": MATRIX.tobytes()} if storages is None else storages
    torch_pickles.write_zip(path, torch_pickles.state_dict(tensors), storages, **kwargs)
    return path


def test_bytes_are_mapped_not_copied(tmp_path):
    path = write(tmp_path, {"a": tensor("0", 12, (3, 4), (4, 1))})
    found = torch_files.load(path)["a"]
    np.testing.assert_array_equal(found, MATRIX)
    base = found
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize(
    "described",
    [
        tensor("0", 12, (4, 4), (4, 1)),
        tensor("0", 12, (3, 4), (4, 1), offset=1),
        tensor("0", 12, (3, 4), (4, 1), offset=-1),
        tensor("0", 12, (2, 2), (-1, 1), offset=3),
        tensor("0", 12, (2,), (2**60,)),
        tensor("0", 12, (-2, -3), (1, 1)),
        tensor("0", 12, (3,), (1, 1)),
        tensor("0", 13, (3,), (1,)),
        tensor("0", 2**61, (3,), (1,)),
        tensor("1", 12, (3,), (1,)),
        tensor("../0", 12, (3,), (1,)),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path, described):
    with pytest.raises(UserError, match=r"model.bin: is damaged, or no PyTorch"):
        torch_files.load(write(tmp_path, {"a": described}))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path, protocol, zipped):
    trace = tmp_path / "it ran"
    evil = {"a": Call(os.mkdir, str(trace))}
    path = tmp_path / "model.bin"
    if zipped:
        torch_pickles.write_zip(path, pickle.dumps(evil, protocol), {})
    else:
        path.write_bytes(pickle.dumps(evil, protocol))
    with pytest.raises(UserError, match=r"model.bin: (names|is damaged)") as error:
        torch_files.load(path)
    if protocol >= 2:
        assert "names posix.mkdir, which no plain checkpoint needs" in str(error.value)
    assert not trace.exists()
    assert "\n" not in str(error.value)


def _nested(name):
    """A call of a known name with arguments of the file's own making."""
    call = f"c{name}\n".encode() + torch_pickles.text("x") + b"\x85R"
    return b"\x80\x02}" + torch_pickles.text("a") + call + b"s."


@pytest.mark.parametrize(
    "pickled",
    [
        _nested("collections\nOrderedDict"),
        _nested("torch._utils\n_rebuild_parameter"),
        _nested("torch._utils\n_rebuild_tensor_v2"),
        _nested("torch\nFloatStorage"),
        _nested("builtins\neval"),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.",
        b"\x80\x02)}b.",  # the state of a tuple
        b"\x80\x02)\x81.",  # an object made without its constructor
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02h\x05.",
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x0fa",  # longer than memory
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02}",
        b"\x80\x02(l.",
        b"",
        pickle.dumps({"step": 3}, 2),
        pickle.dumps([1, 2], 2),
        pickle.dumps({"array": np.zeros(2)}, 2),
    ],
)
def test_other_pickles_are_refused_in_one_line(tmp_path, pickled):
    path = tmp_path / "model.bin"
    torch_pickles.write_zip(path, pickled, {})
    with pytest.raises(UserError, match=r"model\.bin: ") as error:
        torch_files.load(path)
    assert "\n" not in str(error.value)


def test_a_training_checkpoint_says_what_to_save(tmp_path):
    path = write(tmp_path, {"model": b"}"})
    with pytest.raises(UserError, match=r"'model' is no tensor; .* model.state_dict"):
        torch_files.load(path)


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(tmp_path, name, share):
    data = (RECORDED / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=rf"{name}: is damaged, or no PyTorch"):
        torch_files.load(path)


def test_compressed_and_big_endian_archives_are_refused(tmp_path):
    described = {"a": tensor("0", 12, (12,), (1,))}
    path = write(tmp_path, described, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        torch_files.load(path)
    path = write(tmp_path, described)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(UserError, match="big-endian"):
        torch_files.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no.bin: is missing"):
        torch_files.load(tmp_path / "no.bin")


def test_a_row_of_pickles_is_read_one_by_one():
    file = io.BytesIO(pickle.dumps((1, "a"), 2) + pickle.dumps([True, None, 2.5], 4))
    assert torch_pickle.read(file) == (1, "a")
    assert torch_pickle.read(file) == [True, None, 2.5]
