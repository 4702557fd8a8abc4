"""What came from elsewhere is read as data: nothing in it is ever run.

Every file of every artefact is replaced by pickles that call a function when they are
loaded, under a manifest that fits them, so that the checksums do not save the day.
"""

import io
import json
import os
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import tiny_artefacts
from tiny_artefacts import ARTEFACTS

from realm_retro import artifacts
from realm_retro.data import datasets
from realm_retro.errors import UserError

# Python tells of each name that an unpickler looks up, in C code too. A hook cannot be
# taken away again, so it looks away when it is not asked.
_LOOKED_UP = []
_WATCHING = [False]


def _watch(event, args):
    if _WATCHING[0] and event == "pickle.find_class":
        _LOOKED_UP.append(args)


sys.addaudithook(_watch)


@pytest.fixture
def unpickled():
    """Names that were looked up by unpicklers during the test."""
    _LOOKED_UP.clear()
    _WATCHING[0] = True
    yield _LOOKED_UP
    _WATCHING[0] = False


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def poisons(trace):
    """Files that make the folder `trace` when they are loaded the wrong way."""
    evil = Call(os.mkdir, str(trace))
    array = np.empty(3, object)
    array[:] = [evil, evil, evil]
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, array, allow_pickle=True)
    np.savez(npz, vectors=array)
    return [pickle.dumps(evil, 2), pickle.dumps(evil), npy.getvalue(), npz.getvalue()]


def fit_manifest(directory):
    """A manifest for whatever the folder's files are now, as an attacker's would be."""
    path = directory / artifacts.MANIFEST
    body = json.loads(path.read_text())
    for name in body["files"]:
        file = directory / name
        body["files"][name] = {
            "bytes": file.stat().st_size,
            "sha256": artifacts.sha256(file),
        }
    keys = ("kind", "format_version", "config", "parents", "files")
    body["fingerprint"] = artifacts.fingerprint_of({k: body[k] for k in keys})
    body.pop(artifacts.CHECKSUM)
    path.write_text(json.dumps(artifacts.seal(body)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_artefacts.write_all(tmp_path_factory.mktemp("whole") / "run", 0)


@pytest.fixture
def workdir(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


# ScaNN's own files are read by a C++ library, which is not fed with rubbish here; its
# one pickle has a test of its own.
OPAQUE = ("scann/",)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_no_file_of_an_artefact_is_unpickled(workdir, tmp_path, unpickled, name):
    artefact = ARTEFACTS[name]
    directory = workdir / artefact.directory
    trace = tmp_path / "it ran"
    names = json.loads((directory / artifacts.MANIFEST).read_text())["files"]
    artefact.open(workdir)
    for file in names:
        if file.startswith(OPAQUE):
            continue
        path = directory / file
        kept = path.read_bytes()
        for poison in poisons(trace):
            path.unlink()
            path.write_bytes(poison)
            fit_manifest(directory)
            # TFDS's two files are for others; here nobody reads them.
            if path.name in ("dataset_info.json", "features.json", "blocks.jsonl"):
                artefact.open(workdir)
            else:
                with pytest.raises(UserError, match=str(directory)) as error:
                    artefact.open(workdir)
                assert "\n" not in str(error.value)
        path.unlink()
        path.write_bytes(kept)
        fit_manifest(directory)
    assert not trace.exists()
    assert not unpickled


@pytest.mark.skipif("scann_index" not in ARTEFACTS, reason="ScaNN does not run here")
@pytest.mark.parametrize("listed", [True, False])
def test_scann_is_given_no_pickle(workdir, tmp_path, unpickled, listed):
    directory = workdir / ARTEFACTS["scann_index"].directory
    path = directory / "scann" / "scann_docids.pkl"
    path.write_bytes(poisons(tmp_path / "it ran")[0])
    if listed:
        manifest = directory / artifacts.MANIFEST
        body = json.loads(manifest.read_text())
        body["files"]["scann/scann_docids.pkl"] = {}
        manifest.write_text(json.dumps(body))
        fit_manifest(directory)
    with pytest.raises(UserError, match=r"scann_docids\.pkl: does not belong"):
        ARTEFACTS["scann_index"].open(workdir)
    assert not unpickled


def test_the_hook_sees_what_it_looks_for(tmp_path, unpickled):
    trace = tmp_path / "it ran"
    pickle.loads(poisons(trace)[0])
    assert trace.exists()
    assert ("posix", "mkdir") in unpickled


def test_a_corpus_names_no_module_and_no_path(workdir, tmp_path, monkeypatch):
    """TFDS's own reader would import what ``features.json`` names."""
    (tmp_path / "evil_features.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    directory = workdir / "corpus"
    features = json.loads((directory / "features.json").read_text())
    features["pythonClassName"] = "evil_features.Text"
    (directory / "features.json").write_text(json.dumps(features))
    info = json.loads((directory / "dataset_info.json").read_text())
    info["moduleName"] = "evil_features"
    for split in info["splits"]:
        split["filepathTemplate"] = "/etc/{SHARD_X_OF_Y}"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    # A file beside those that the manifest lists is none of the corpus.
    shard = directory / "documents-train.array_record-00000"
    shutil.copy(shard, directory / "documents-train.array_record-00001")
    fit_manifest(directory)
    corpus = datasets.open_corpus(directory)
    assert len(corpus) == 5
    assert corpus[4].text.startswith("The river 4")
    assert "evil_features" not in sys.modules
