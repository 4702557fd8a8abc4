"""Annotations made elsewhere: by document, in bytes, and one line for bad ones."""

import gzip
import json
import lzma

import pytest
import tiny_passages

from realm_retro.data import annotations
from realm_retro.errors import UserError

TEXTS = ["é river born", "old town", "green"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return tiny_passages.write_passages(
        folder / "passages",
        tiny_passages.documents(TEXTS),
        tokenizer_json=tiny_passages.save_tokenizer(folder),
        length=2,
    )


def write(path, *records):
    openers = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_spans_by_document_and_passage(store, tmp_path, suffix):
    path = write(
        tmp_path / f"a.jsonl{suffix}",
        {"id": "doc 0", "spans": [[9, 13], [3, 8], [0, 2], [3, 13]]},
        {"id": "somewhere else", "spans": [[0, 1]]},
        {"id": "doc 2", "spans": []},
    )
    found = annotations.read(path, store)
    assert found.unknown == 1
    assert sorted(found.by_document) == [0, 2]
    # "é river" and "born" are the passages of the first document.
    assert found.of_passage(0, 0, 8) == ([(0, 2), (3, 8)], 1)
    assert found.of_passage(0, 9, 13) == ([(0, 4)], 0)
    assert found.of_passage(1, 0, 8) == found.of_passage(2, 0, 5) == ([], 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], r"a\.jsonl:2: is not an annotation; it needs"),
        ({"id": "doc 1"}, r"a\.jsonl:2: is not an annotation"),
        ({"id": "doc 1", "spans": [[2, 2]]}, r"a\.jsonl:2: the spans of 'doc 1'"),
        ({"id": "doc 1", "spans": [[-1, 2]]}, r"a\.jsonl:2: the spans of 'doc 1'"),
        ({"id": "doc 1", "spans": [[0, 1.5]]}, r"a\.jsonl:2: the spans of 'doc 1'"),
        ({"id": "doc 1", "spans": 3}, r"a\.jsonl:2: the spans of 'doc 1'"),
        ({"id": "doc 1", "spans": [[0, 9]]}, "up to byte 9, but .* has 8 bytes"),
        ({"id": "doc 0", "spans": []}, "annotates 'doc 0' a second time"),
    ],
)
def test_bad_lines(store, tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"id": "doc 0", "spans": [[0, 2]]}, record)
    with pytest.raises(UserError, match=message):
        annotations.read(path, store)


def test_bad_files(store, tmp_path):
    with pytest.raises(UserError, match=r"config\.spans\.path: there is no file"):
        annotations.read(str(tmp_path / "none.jsonl"), store)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"a\.jsonl:1: is not JSON"):
        annotations.read(str(tmp_path / "a.jsonl"), store)
    (tmp_path / "b.jsonl.gz").write_text("not gzip")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: is damaged or cut short"):
        annotations.read(str(tmp_path / "b.jsonl.gz"), store)
    (tmp_path / "c.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"c\.jsonl: is damaged"):
        annotations.read(str(tmp_path / "c.jsonl"), store)
