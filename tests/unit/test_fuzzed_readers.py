"""Readers of files from elsewhere: whatever stands in one, it is read or refused.

Refused means a `UserError` of one line; another exception would be a traceback for a
user, and a hang would be worse. The same cases come in every run; the slow run has more
of them, with hypothesis's profile ``fuzz``.
"""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
import spoilt
import tiny_artefacts
import tiny_bert
import tiny_passages
import tiny_realm
import torch_pickles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm_retro import artifacts, leases
from realm_retro.arrays import open_npy
from realm_retro.cli import ask
from realm_retro.data import annotations, questions, text_files
from realm_retro.data.corpus import CorpusConfig, Report
from realm_retro.data.records import Records
from realm_retro.errors import UserError
from realm_retro.interop import bert, block_records, realm, tensors, torch_files
from realm_retro.retrieval.refresh import folder as refresh_folder
from realm_retro.retrieval.refresh import jobs
from realm_retro.text import wordpiece
from realm_retro.train import metrics

# Of pickletools, which reads the strings of pickles as Python would.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "torch_files"
FEW = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("fuzz", parent=FEW, max_examples=700)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, and the files that it is given.

    Attributes:
      read: path → anything; reads all that is in the file.
      files: strategy of (suffix of the name, content).
      total: whether it has an answer to everything and refuses nothing.
    """

    read: Callable
    files: st.SearchStrategy
    total: bool = False


def named(suffix, contents):
    return st.tuples(st.just(suffix), contents)


def packed(suffix, contents):
    """With the suffixes of what is compressed behind the first."""
    return spoilt.compressed(contents).map(lambda pair: (suffix + pair[0], pair[1]))


def as_bytes(value):
    return json.dumps(value).encode(errors="surrogatepass")


# Text, questions, spans

DOCUMENT = {"id": "7", "title": "Zürich", "text": "old\ntown", "other": [1]}
QUESTION = {"id": 7, "question": "who?", "answers": ["a", "b"], "document": "d"}
REGEX = {"question": "when?", "answer_regex": "(1|2)9[0-9]+"}
CANDIDATES = {"question": "where?", "answers": [0], "candidates": ["here"]}
SPANS = {"id": "doc 0", "spans": [[0, 2], [3, 8]]}
OTHER_SPANS = {"id": "doc 1", "spans": []}


def lines(*samples):
    whole = b"".join(as_bytes(sample) + b"\n" for sample in samples)
    return st.one_of(spoilt.records(*samples), spoilt.files(whole))


def read_text_files(path):
    for id_field in ("", "id"):
        config = CorpusConfig(
            source="text_files", path=os.fspath(path), id_field=id_field
        )
        for document in text_files.text_files(config, Report()):
            for value in dataclasses.astuple(document):
                value.encode()


def read_question_line(path):
    for line in path.read_bytes().split(b"\n"):
        ask._field(line.decode(errors="replace"), "--questions_file")


# Artefacts


def manifest_reader(body):
    """Reads manifests of an artefact of one file, fitted to their own checksums."""

    def read(path):
        directory = path.parent / "artefact"
        directory.mkdir(exist_ok=True)
        (directory / "a.bin").write_bytes(b"abc")
        path.replace(directory / artifacts.MANIFEST)
        artifacts.load(
            directory,
            kind="spans",
            format_version=1,
            made_by="realm_retro.cli.tag_spans",
            parents={"passages": "p"},
        )

    return Reader(read, named("", body))


def whole_manifest():
    files = {"a.bin": {"bytes": 3, "sha256": "0" * 64}}
    files["a.bin"]["sha256"] = (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    return fitted(
        {
            "kind": "spans",
            "format_version": 1,
            "config": {"path": "x", "sizes": [1, 2]},
            "parents": {"passages": "p"},
            "made_by": "realm_retro.cli.tag_spans",
            "meta": {"num_shards": 1},
            "files": files,
        }
    )


def fitted(body):
    """As somebody who knows how would make it fit."""
    body.pop(artifacts.CHECKSUM, None)
    keys = ("kind", "format_version", "config", "parents", "files")
    try:
        part = {key: body[key] for key in keys}
        body["fingerprint"] = artifacts.fingerprint_of(part)
        return artifacts.seal(body)
    except (KeyError, ValueError):  # not a number, or it is gone
        return body


def read_request(path):
    directory = path.parent / "stage"
    directory.mkdir(exist_ok=True)
    path.replace(directory / artifacts.REQUEST)
    artifacts.Stage.open(
        directory,
        kind="spans",
        format_version=1,
        config={"seed": 1},
        parents={},
        made_by="realm_retro.cli.tag_spans",
    )


REQUEST = {
    "config": {"seed": 1},
    "format_version": 1,
    "kind": "spans",
    "made_by": "realm_retro.cli.tag_spans",
    "parents": {},
}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(member):
    file = io.BytesIO()
    np.savez(file, block_records=member)
    return file.getvalue()


MATRIX = npy(np.arange(12, dtype=np.float32).reshape(3, 4))
RECORDS = npy(np.zeros(3, [("document", "<i4"), ("bytes", "<i8", (2,))]))


def read_npy(path):
    np.asarray(open_npy(path)).tobytes()


def read_corpus(path):
    name = "documents-train.array_record-00000"
    path.replace(path.parent / name)
    found = Records.open(path.parent, [name])
    for row in range(min(len(found), 20)):
        assert found[row].text is not None


# Checkpoints of others


def zipped(pickled):
    file = io.BytesIO()
    torch_pickles.write_zip(file, pickled, {"0": bytes(48)})
    return file.getvalue()


STATE = torch_pickles.state_dict(
    {
        "a": torch_pickles.tensor("0", 12, (3, 4), (4, 1)),
        "b": torch_pickles.tensor("0", 12, (2,), (1,), offset=3),
    }
)


def read_torch(path):
    for array in torch_files.load(path).values():
        # A stride of 0 makes a large array of little.
        if array.size < 1 << 20:
            array.tobytes()


def read_safetensors(path):
    for array in tensors.read_safetensors(path).values():
        array.tobytes()


def safetensors_file():
    values = {"a": np.arange(3, dtype=np.float32), "b": np.zeros((0, 2), np.int64)}
    return safetensors.numpy.save(values, metadata={"format": "pt"})


def byte_strings():
    array = np.empty(3, object)
    array[:] = [b"one", "zwei", b"three"]
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def read_published(path):
    path.replace(MADE["published"] / "config.json")
    realm.load(MADE["published"])


def read_weight_index(path):
    path.replace(path.parent / "model.safetensors.index.json")
    tensors.files_of(artifacts.epath.Path(path.parent))


def read_tokenizer(path):
    wordpiece.encode(wordpiece.load_tokenizer(path), ["a river"])


# What a training keeps beside its artefacts


def read_marks(path):
    using = path.parent / refresh_folder.USING
    using.mkdir(exist_ok=True)
    path.replace(using / "trainer.json")
    refresh_folder.in_use(path.parent)


def read_plan(path):
    path.replace(path.parent / "plan.json")
    jobs.must_finish(path.parent)


def read_lease(path):
    path.replace(path.parent / "shard-00000.0001.json")
    leases.num_live(path.parent)


def read_metrics(path):
    metrics.cut_after(artifacts.epath.Path(path), 3)


READERS = {
    "text": Reader(read_text_files, packed(".txt", spoilt.files("Zürich\n".encode()))),
    "jsonl": Reader(read_text_files, packed(".jsonl", lines(DOCUMENT))),
    "questions": Reader(
        questions.load_questions,
        packed(".jsonl", lines(QUESTION, REGEX, CANDIDATES)),
    ),
    "asked": Reader(read_question_line, named(".jsonl", lines(QUESTION))),
    "annotations": Reader(
        lambda path: annotations.read(os.fspath(path), passages()),
        packed(".jsonl", lines(SPANS, OTHER_SPANS)),
    ),
    "corpus records": Reader(
        read_corpus, st.deferred(lambda: named("", spoilt.files(array_record())))
    ),
    "manifest": manifest_reader(
        st.deferred(lambda: spoilt.files(as_bytes(whole_manifest())))
    ),
    "fitted manifest": manifest_reader(
        st.deferred(lambda: spoilt.edited_json(whole_manifest()))
        .map(fitted)
        .map(as_bytes)
    ),
    "request": Reader(
        read_request,
        named(
            "",
            spoilt.files(as_bytes(REQUEST)) | spoilt.edited_json(REQUEST).map(as_bytes),
        ),
    ),
    "npy": Reader(read_npy, named(".npy", spoilt.files(MATRIX, RECORDS))),
    "torch": Reader(
        read_torch,
        st.deferred(
            lambda: named(
                ".bin",
                spoilt.files(
                    zipped(STATE),
                    (GOLDEN / "zip.bin").read_bytes(),
                    (GOLDEN / "legacy.bin").read_bytes(),
                ),
            )
        ),
    ),
    "torch pickle": Reader(
        read_torch,
        named(
            ".bin",
            spoilt.files(STATE, pickle.dumps({"a": [1, (2,)]}, 4)).map(zipped),
        ),
    ),
    "safetensors": Reader(
        read_safetensors,
        st.deferred(lambda: named(".safetensors", spoilt.files(safetensors_file()))),
    ),
    "block records": Reader(
        lambda path: list(block_records.read(path)),
        st.deferred(
            lambda: st.one_of(
                named(".npy", spoilt.files(byte_strings(), npy(np.array([b"a"])))),
                named(".npz", spoilt.files(archive(np.array(["a", "b"])))),
                packed(".jsonl", spoilt.files(b'"a"\n{"text": "b"}\n')),
                packed(".txt", spoilt.files(b"a\nb\n")),
            )
        ),
    ),
    "bert config": Reader(
        lambda path: bert.read_config(artifacts.epath.Path(path)),
        named(
            ".json",
            spoilt.files(as_bytes(tiny_bert.config_json()))
            | spoilt.edited_json(tiny_bert.config_json()).map(as_bytes),
        ),
    ),
    "realm config": Reader(
        read_published,
        named("", spoilt.edited_json(tiny_realm.config_json()).map(as_bytes)),
    ),
    "weight index": Reader(
        read_weight_index,
        named(
            "",
            spoilt.edited_json({"weight_map": {"a": "x.safetensors"}}).map(as_bytes)
            | spoilt.files(b'{"weight_map": {"a": "x.safetensors"}}'),
        ),
    ),
    "tokenizer": Reader(
        read_tokenizer,
        st.deferred(
            lambda: named(
                ".json",
                spoilt.files(tiny_passages.tokenizer().to_str().encode())
                | spoilt.edited_json(
                    json.loads(tiny_passages.tokenizer().to_str())
                ).map(as_bytes),
            )
        ),
    ),
    "marks": Reader(read_marks, named("", spoilt.files(b'{"steps": [1, 2]}'))),
    "plan": Reader(read_plan, named("", spoilt.files(b'{"must_finish": true}'))),
    "lease": Reader(
        read_lease, named("", spoilt.files(b'{"seconds": 60.0}')), total=True
    ),
    "metrics": Reader(
        read_metrics,
        named("", spoilt.files(b'{"step": 1}\n{"step": 4}\n')),
        total=True,
    ),
}
MADE = {}


def passages():
    return MADE["passages"]


def array_record():
    return MADE["array_record"]


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory):
    """What takes a file system to make."""
    work = artifacts.epath.Path(tmp_path_factory.mktemp("made"))
    tiny_artefacts.write_corpus(work, 0)
    [path] = (work / "corpus").glob("*array_record*")
    MADE["array_record"] = path.read_bytes()
    MADE["published"] = tiny_realm.write(
        pathlib.Path(work / "published"), tiny_realm.embedder()
    )
    MADE["passages"] = tiny_passages.write_passages(
        work / "passages",
        tiny_passages.documents(["é river born", "old town", "green"]),
        tokenizer_json=tiny_passages.save_tokenizer(work),
        length=2,
    )
    yield
    MADE.clear()


def check(name, directory, data):
    reader = READERS[name]
    suffix, content = data.draw(reader.files)
    path = directory / f"file{suffix}"
    path.write_bytes(content)
    try:
        reader.read(path)
        return
    except UserError as error:
        said = str(error)
    assert not reader.total, said
    assert len(said.splitlines()) == 1, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", READERS)
@FEW
@given(data=st.data())
def test_it_is_read_or_refused(folder, name, data):
    check(name, folder, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_it_is_read_or_refused_very_often(folder, name, data):
    check(name, folder, data)


def test_the_slow_run_has_ten_thousand_cases():
    assert len(READERS) * settings.get_profile("fuzz").max_examples >= 10_000


# What chance does not find


@pytest.mark.parametrize("depth", [300, 900, 990, 5_000, 200_000])
@pytest.mark.parametrize("field", ["id", "title", "text", "question", "answers"])
def test_lists_within_lists(folder, field, depth):
    record = {**DOCUMENT, **QUESTION, "id": "doc 0", field: "HERE"}
    line = as_bytes(record).replace(b'"HERE"', spoilt.nested(depth))
    (folder / "deep.jsonl").write_bytes(line)
    for read in (read_text_files, questions.load_questions):
        try:
            read(folder / "deep.jsonl")
        except UserError as error:
            said = str(error)
            assert "deep.jsonl:1" in said


def test_spans_beyond_any_number(folder):
    (folder / "far.jsonl").write_bytes(
        as_bytes({"id": "doc 0", "spans": [[0, 10**30]]})
    )
    with pytest.raises(UserError, match="spans of 'doc 0' are not a list"):
        annotations.read(os.fspath(folder / "far.jsonl"), passages())


def test_an_archive_with_a_password(folder):
    """Its first bit of flags says so; no password is asked for."""
    data = bytearray(zipped(STATE))
    for place in range(len(data)):
        if data[place : place + 4] == b"PK\x01\x02":
            data[place + 8] |= 1
        if data[place : place + 4] == b"PK\x03\x04":
            data[place + 6] |= 1
    (folder / "locked.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"locked\.bin: is damaged"):
        torch_files.load(folder / "locked.bin")


def test_few_bytes_do_not_become_many(folder):
    """A pickle of a gigabyte in a compressed archive is not unpacked."""
    with zipfile.ZipFile(folder / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(UserError, match="is compressed"):
        torch_files.load(folder / "bomb.bin")


def test_a_field_with_line_breaks_is_told_in_one_line(folder):
    (folder / "breaks.jsonl").write_bytes(as_bytes({"a\nb": 1, "c\u2028d": 2}))
    with pytest.raises(UserError, match="it has: a b, c d") as error:
        read_text_files(folder / "breaks.jsonl")
    assert "\n" not in str(error.value)
