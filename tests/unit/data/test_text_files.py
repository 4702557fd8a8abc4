"""Files become documents; what is wrong with them is said in one line, or counted."""

import gzip
import json
import lzma
import os
import tracemalloc

import pytest

from realm_retro.data import text_files as text_files_lib
from realm_retro.data.corpus import CorpusConfig, Report
from realm_retro.data.text_files import text_files
from realm_retro.errors import UserError

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def read(path, **settings):
    """The documents of `path` and the report."""
    if not isinstance(path, tuple):
        path = str(path)
    report = Report()
    config = CorpusConfig(source="text_files", path=path, **settings)
    return list(report.keep(text_files(config, report))), report


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path, **settings):
    with pytest.raises(UserError) as error:
        read(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", list(OPENERS))
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl"])
def test_every_kind_and_compression(tmp_path, kind, compression):
    text = "Première ligne\n\tzweite 行\n"
    content = json.dumps({"text": text, "title": "T"}) if kind == ".jsonl" else text
    path = tmp_path / "sub" / f"v1.2 notes{kind}{compression}"
    path.parent.mkdir()
    with OPENERS[compression](path, "wb") as file:
        file.write(content.encode())
    [document], report = read(tmp_path)
    assert document.text == text
    name = f"sub/v1.2 notes{kind}{compression}"
    assert document.id == (f"{name}:1" if kind == ".jsonl" else name)
    assert document.title == ("T" if kind == ".jsonl" else "v1.2 notes")
    assert document.origin == str(path) + (":1" if kind == ".jsonl" else "")
    assert (report.documents, report.text_bytes) == (1, len(text.encode()))
    assert report.lines() == []


def test_folders_globs_files_and_lists(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md", "deep/e.pdf", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    documents, report = read(tmp_path)
    assert [d.id for d in documents] == ["a.txt", "b.txt", "deep/c.txt", "deep/d.md"]
    assert report.ignored_files == 2
    assert report.lines() == ["2 files of other kinds were ignored"]
    monkeypatch.chdir(tmp_path)
    assert [d.id for d in read("**/*.txt")[0]] == ["a.txt", "b.txt", "deep/c.txt"]
    assert [d.id for d in read(f"{tmp_path}/deep/*.[tm]*")[0]] == [
        f"{tmp_path}/deep/c.txt",
        f"{tmp_path}/deep/d.md",
    ]
    assert [d.id for d in read("b.txt")[0]] == ["b.txt"]
    # What two patterns find is read once.
    both = read(("deep", "deep/*.md", "a.txt"))[0]
    assert [d.id for d in both] == ["a.txt", "deep/c.txt", "deep/d.md"]


def test_a_pattern_that_matches_nothing(tmp_path):
    assert "'nowhere' matches no file" in refusal("nowhere")
    assert "known are .txt, .md, .py, .jsonl, each also with .gz" in refusal("nowhere")
    assert "matches no file" in refusal(f"{tmp_path}/*.txt")
    assert "matches no file" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert "'b*' matches no file" in refusal((str(tmp_path), "b*"))


def test_only_files_of_other_kinds(tmp_path):
    (tmp_path / "a.pdf").write_text("a")
    assert "holds no readable file; these are .txt, .md" in refusal(tmp_path)


def test_jsonl_fields(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"body": ["one", "two"], "name": "N", "key": 7},
        {"body": "three", "name": None, "key": "x"},
    )
    settings = {"text_field": "body", "title_field": "name", "id_field": "key"}
    documents, report = read(path, **settings)
    assert [d.text for d in documents] == ["one\ntwo", "three"]
    assert [d.id for d in documents] == ["7", "x"]
    assert [d.title for d in documents] == ["N", ""]
    assert report.untitled == 1
    assert report.lines() == ["1 documents have no title"]


def test_a_missing_field_names_place_and_fields(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"body": "b", "n": 1})
    message = refusal(path)
    assert f"{path}:2: has no field 'text'; it has: body, n" in message
    assert "config.corpus.text_field" in message
    assert ":1: has no field 'key'" in refusal(path, id_field="key")
    write_jsonl(path, {})
    assert "it has: none" in refusal(path)


@pytest.mark.parametrize("text", [3, {"a": 1}, ["a", 1], True])
def test_a_text_of_another_type(tmp_path, text):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": text})
    assert f"{path}:1: field 'text' is" in refusal(path)


@pytest.mark.parametrize("identity", [None, "", [1], 1.5])
def test_an_id_of_another_type(tmp_path, identity):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "id": identity})
    assert "which is not an id" in refusal(path, id_field="id")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "is not JSON"),
        ("plain text", "is not JSON"),
        ('["a"]', "is a JSON list, not an object"),
        ('"a"', "is a JSON str, not an object"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    assert f"{path}:3: {said}" in refusal(path)


def test_empty_documents_are_left_out_and_counted(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl",
        *({"text": text, "title": "t"} for text in ("", " \n\t", None, [], "x")),
    )
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("\n\n")
    documents, report = read(tmp_path)
    assert [d.id for d in documents] == ["a.jsonl:5"]
    assert (report.documents, report.empty) == (1, 6)
    assert "6 empty documents were left out" in report.lines()


def test_invalid_utf8_is_replaced_counted_and_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\x80"}\n')
    (tmp_path / "c.txt").write_text("a replacement \ufffd that was there is valid")
    documents, report = read(tmp_path)
    assert [d.text for d in documents[:3]] == ["caf\ufffd \ufffd", "ok", "\ufffd"]
    assert report.invalid_utf8 == 2
    assert report.invalid_utf8_in == [
        str(tmp_path / "a.txt"),
        f"{tmp_path / 'b.jsonl'}:2",
    ]
    [line] = [line for line in report.lines() if "UTF-8" in line]
    assert str(tmp_path / "a.txt") in line
    assert "2 documents" in line


def test_half_a_surrogate_pair_in_json_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        r'{"text": "\ud83d\ude00 \ud83d", "title": "\udc00"}'
    )
    [document], report = read(tmp_path)
    assert (document.text, document.title) == ("😀 \ufffd", "\ufffd")
    assert report.invalid_utf8 == 1


def test_many_invalid_documents_are_counted_but_not_all_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n' * 30)
    report = read(tmp_path)[1]
    assert (report.invalid_utf8, len(report.invalid_utf8_in)) == (30, 10)
    assert report.lines()[-1].endswith(":10 …")


def test_emoji_and_right_to_left_text_stay_as_they_are(tmp_path):
    text = "👩‍👩‍👧‍👦 שלום \u202eabc\u202c עולם e\u0301 ▁\u2581 مرحبا"
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "b.jsonl", {"text": text, "title": text})
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == [text, text]
    assert report.invalid_utf8 == 0


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\x85\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}')
    documents, _ = read(tmp_path)
    assert documents[0].text == "one\r\ntwo\rthree\ufffd\n"
    assert [d.text for d in documents[1:]] == ["x", "y"]


@pytest.mark.parametrize("compression", [".gz", ".xz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbled", "empty", "foreign"])
def test_a_damaged_compressed_file_is_named(tmp_path, kind, compression, damage):
    path = tmp_path / f"a{kind}{compression}"
    with OPENERS[compression](path, "wb") as file:
        for i in range(2000):
            file.write(json.dumps({"text": f"document {i * i} of many"}).encode())
            file.write(b"\n")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    elif damage == "garbled":
        data[30:60] = b"\xff" * 30
    elif damage == "empty":
        data = data[:5]
    else:
        data = bytearray(b"plain words, not compressed")
    path.write_bytes(data)
    message = refusal(tmp_path)
    assert str(path) in message
    assert "damaged or cut short" in message or "is not JSON" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert "a.txt: may not be read" in refusal(tmp_path)


def test_a_large_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files_lib, "MAX_DOCUMENT_BYTES", 100)
    text = "".join(f"line {i}\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    documents, report = read(tmp_path)
    assert "".join(d.text for d in documents) == text
    assert all(d.text.endswith("\n") for d in documents)
    assert [d.id for d in documents[:3]] == ["a.txt", "a.txt#2", "a.txt#3"]
    assert [d.title for d in documents[:2]] == ["a", "a (2)"]
    assert report.cut_files == 1
    assert "1 large text files were cut" in report.lines()[0]


def test_memory_does_not_grow_with_a_jsonl_file(tmp_path):
    line = json.dumps({"text": "some words " * 100}) + "\n"
    peaks = []
    for count in (200, 20_000):
        (tmp_path / "a.jsonl").write_text(line * count)
        config = CorpusConfig(source="text_files", path=str(tmp_path))
        tracemalloc.start()
        assert sum(1 for _ in text_files(config, Report())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000
