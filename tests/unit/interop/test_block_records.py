"""Block records in every form that they come in, pickles without running them."""

import gzip
import json
import lzma
import os
import pickle

import numpy as np
import pytest

from realm_retro.errors import UserError
from realm_retro.interop import block_records

TEXTS = ["Paris is a city.", "Zürich too — 東京", "x" * 300, "with\ttab"]


def objects(values=None):
    values = [text.encode() for text in TEXTS] if values is None else values
    array = np.empty(len(values), object)
    array[:] = values
    return array


def write_pickled(path, array, protocol):
    """What np.save does, at any protocol."""
    with path.open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(array, file, protocol=protocol)


def write(path):
    name = path.name
    if name.endswith("object.npy"):
        np.save(path, objects(), allow_pickle=True)
    elif name.endswith("strings.npy"):
        np.save(path, np.array(TEXTS))
    elif name.endswith(".npy"):
        np.save(path, np.array([text.encode() for text in TEXTS]))
    elif name.endswith(".npz"):
        np.savez(path, block_records=np.array([t.encode() for t in TEXTS]), more=[1])
    else:
        plain = name.split(".")[1]
        lines = TEXTS
        if plain == "jsonl":
            lines = [
                json.dumps(TEXTS[0]),
                *(json.dumps({"text": t}) for t in TEXTS[1:]),
            ]
        data = "".join(f"{line}\n" for line in lines).encode()
        pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(data))


@pytest.mark.parametrize(
    "name",
    "object.npy strings.npy bytes.npy a.npz a.txt a.txt.gz a.jsonl a.jsonl.xz".split(),  # noqa: SIM905
)
def test_every_form(tmp_path, name):
    write(tmp_path / name)
    assert list(block_records.read(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("count", [1, 3, 2500])  # lists are pickled in runs of 1000
def test_pickles_of_any_protocol(tmp_path, protocol, count):
    texts = [f"block {i}".encode() for i in range(count)]
    write_pickled(tmp_path / "a.npy", objects(texts), protocol)
    found = list(block_records.read(tmp_path / "a.npy"))
    assert found == [text.decode() for text in texts]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, *call):
        self._call = call

    def __reduce__(self):
        return self._call[0], self._call[1:]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_in_the_pickle_is_not_run(tmp_path, protocol):
    trace = tmp_path / "it ran"
    array = objects([b"first", Call(os.mkdir, str(trace))])
    write_pickled(tmp_path / "a.npy", array, protocol)
    with pytest.raises(UserError, match=r"a.npy: is damaged, or holds no block"):
        list(block_records.read(tmp_path / "a.npy"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "values",
    [[b"a", 3], [b"a", None], [b"same"] * 2, [b"a", [b"b"]]],
    ids=["number", "none", "twice", "list"],
)
def test_what_is_no_text_is_refused(tmp_path, values):
    write_pickled(tmp_path / "a.npy", objects(values), 4)
    with pytest.raises(UserError, match=r"a.npy: is damaged"):
        list(block_records.read(tmp_path / "a.npy"))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no.npy: is missing"):
        list(block_records.read(tmp_path / "no.npy"))
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01")
    np.save(tmp_path / "b.npy", np.zeros(3))
    np.savez(tmp_path / "c.npz", other=np.array(["a"]))
    (tmp_path / "d.jsonl").write_text('"a"\n{"title": "b"}\n')
    (tmp_path / "e.csv").write_text("a\n")
    write_pickled(tmp_path / "f.npy", objects(), 4)
    (tmp_path / "f.npy").write_bytes((tmp_path / "f.npy").read_bytes()[:-200])
    for name in ("a.npy", "b.npy", "c.npz", "d.jsonl", "e.csv", "f.npy"):
        with pytest.raises(UserError, match=f"{name}: is damaged, or holds no") as e:
            list(block_records.read(tmp_path / name))
        assert "\n" not in str(e.value)
    np.save(tmp_path / "g.npy", np.array([b"a", b"\xff"]))
    with pytest.raises(UserError, match="record 1 is not UTF-8"):
        list(block_records.read(tmp_path / "g.npy"))
