"""The stage as a user meets it: reports, resumes, and one clear line for bad input."""

import json
import subprocess
import sys

import ml_collections
import pytest
import tiny_passages
from etils import epath

from realm_retro.cli import prepare
from realm_retro.data import datasets
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError

TEXTS = [
    f"Document {i} tells of the number {i * i} and of nothing else." for i in range(60)
]


@pytest.fixture
def folder(tmp_path):
    rows = [json.dumps({"text": text, "title": text[:11]}) for text in TEXTS]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(rows))
    return tmp_path / "in"


def config_of(folder, **sections):
    config = {
        "name": "retro",
        "corpus": {"source": "text_files", "path": str(folder)},
        "tokenizer": {"vocab_size": 300},
        "chunks": {"length": 16, "validation_fraction": 0.2},
    }
    for name, section in sections.items():
        config[name].update(section)
    return ml_collections.ConfigDict(config)


def run(folder, workdir, **sections):
    prepare.main(config_of(folder, **sections), epath.Path(workdir))


def test_documents_become_chunks(folder, tmp_path, capsys):
    run(folder, tmp_path / "w")
    corpus = datasets.open_corpus(tmp_path / "w" / "corpus")
    store = ChunkStore.open(
        tmp_path / "w" / "chunks", parents={"corpus": corpus.manifest.fingerprint}
    )
    assert [corpus[i].text for i in range(len(corpus))] == TEXTS
    for row, text in enumerate(TEXTS):
        first, end = store.documents.first_chunk[row : row + 2]
        assert "".join(store.texts(range(first, end))) == text
    for manifest in (corpus.manifest, store.manifest):
        assert manifest.meta["seconds"] >= 0
    said = capsys.readouterr().out
    assert "corpus: 60 documents" in said
    assert "tokenizer: 300 pieces" in said
    assert f"chunks: {len(store):,} chunks" in said
    assert "chunks: validation: " in said


def test_a_finished_stage_says_so_and_does_nothing(folder, tmp_path, capsys):
    run(folder, tmp_path / "w")
    files = sorted((tmp_path / "w").rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
    capsys.readouterr()
    (folder / "a.jsonl").unlink()
    run(folder, tmp_path / "w")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all("finished already" in line for line in said)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_counts_reach_the_console_and_the_manifest(folder, tmp_path, capsys):
    (folder / "b.txt").write_bytes(b"\xff is not UTF-8")
    (folder / "c.txt").write_text("")
    (folder / "d.pdf").write_text("")
    (folder / "e.txt").write_text("x")
    run(folder, tmp_path / "w")
    said = capsys.readouterr().out
    assert f"1 documents had invalid UTF-8, replaced by U+FFFD: {folder}/b.txt" in said
    assert "1 empty documents were left out" in said
    assert "1 files of other kinds were ignored" in said
    assert "1 documents have a single token" in said
    meta = datasets.open_corpus(tmp_path / "w" / "corpus").manifest.meta
    assert meta["empty"] == meta["invalid_utf8"] == meta["ignored_files"] == 1
    assert meta["invalid_utf8_in"] == [str(folder / "b.txt")]


def test_another_config_in_the_same_workdir_is_refused(folder, tmp_path):
    run(folder, tmp_path / "w")
    with pytest.raises(UserError, match=r"chunks: .*chunks\.length: 16 there, 32 here"):
        run(folder, tmp_path / "w", chunks={"length": 32})
    with pytest.raises(UserError, match=r"corpus: was made with other settings"):
        run(folder, tmp_path / "w", corpus={"text_field": "title"})


def test_a_setting_can_be_mended_in_the_same_workdir(folder, tmp_path):
    with pytest.raises(UserError, match="has no field 'body'"):
        run(folder, tmp_path / "w", corpus={"text_field": "body"})
    with pytest.raises(UserError, match="vocab_size=9000 is more than this text"):
        run(folder, tmp_path / "w", tokenizer={"vocab_size": 9000})
    run(folder, tmp_path / "w")


def test_nothing_held_out_is_said(folder, tmp_path, capsys):
    run(folder, tmp_path / "w", chunks={"validation_fraction": 0.0})
    assert "no document is held out" in capsys.readouterr().out


def test_sections_may_be_absent_but_not_misspelt(folder, tmp_path):
    config = config_of(folder)
    del config.chunks
    prepare.main(config, epath.Path(tmp_path / "w"))
    assert ChunkStore.open(tmp_path / "w" / "chunks").chunk_length == 64
    with pytest.raises(UserError, match=r"config\.chunks\.lenght is not a setting"):
        run(folder, tmp_path / "w", chunks={"lenght": 3})


def test_a_damaged_corpus_is_not_cut_into_chunks(folder, tmp_path):
    with pytest.raises(UserError, match="vocab_size"):
        run(folder, tmp_path / "w", tokenizer={"vocab_size": 9000})
    [shard] = (tmp_path / "w" / "corpus").glob("*array_record*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="array_record-00000: is damaged"):
        run(folder, tmp_path / "w")


def test_the_command_ends_in_one_line(folder, tmp_path):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"body": "b"}\n')
    (tmp_path / "config.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"  return ml_collections.ConfigDict({config_of(folder).to_dict()!r})\n"
    )
    command = [sys.executable, "-m", "realm_retro.cli.prepare"]
    command += [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/w"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"prepare: error: {folder}/a.jsonl:2: has no field 'text'; it has: body"
    )
    assert "Traceback" not in done.stderr


# Passages


def with_passages(folder, tmp_path, **passages):
    config = config_of(folder)
    del config.chunks
    encoder = tiny_passages.save_tokenizer(tmp_path / "encoder").parent
    config.encoder = {"path": str(encoder)}
    config.passages = {"length": 12, "validation_fraction": 0.2, **passages}
    return config


def test_documents_become_passages(folder, tmp_path, capsys):
    (folder / "b.txt").write_text("\u200b")
    (folder / "c.txt").write_text("\U0001f600 and words")
    config = with_passages(folder, tmp_path, title_length=4)
    prepare.main(config, epath.Path(tmp_path / "w"))
    corpus = datasets.open_corpus(tmp_path / "w" / "corpus")
    store = PassageStore.open(
        tmp_path / "w" / "passages", parents={"corpus": corpus.manifest.fingerprint}
    )
    assert store.length == 12
    for row in range(len(corpus)):
        first, end = store.first_passage[row : row + 2]
        text = " ".join(store.texts(range(first, end)))
        assert text == (corpus[row].text if end > first else "")
    assert not (tmp_path / "w" / "chunks").exists()
    said = capsys.readouterr().out
    assert f"passages: {len(store):,} passages" in said
    assert "passages: validation: " in said
    assert "passages: 1 documents hold no wordpiece" in said
    assert "titles were cut to 4 wordpieces; raise config.passages" in said
    assert "passages: 1 words are unknown" in said
    prepare.main(config, epath.Path(tmp_path / "w"))
    assert "passages: finished already" in capsys.readouterr().out


def test_chunks_and_passages_split_a_corpus_alike(folder, tmp_path):
    config = with_passages(folder, tmp_path)
    config.chunks = {"length": 16, "validation_fraction": 0.2}
    prepare.main(config, epath.Path(tmp_path / "w"))
    chunks = ChunkStore.open(tmp_path / "w" / "chunks")
    passages = PassageStore.open(tmp_path / "w" / "passages")
    assert passages.split.tolist() == chunks.documents.split.tolist()
    assert len(set(passages.split.tolist())) > 1


def test_a_missing_tokenizer_is_said_before_the_corpus_is_read(folder, tmp_path):
    config = with_passages(folder, tmp_path)
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: is missing; config\.enc"):
        prepare.main(config, epath.Path(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_passage_length_can_be_mended_in_the_same_workdir(folder, tmp_path):
    (folder / "b.txt").write_text("zxyzxyzxyzxyzxyzxy")
    with pytest.raises(UserError, match="raise it"):
        prepare.main(with_passages(folder, tmp_path), epath.Path(tmp_path / "w"))
    config = with_passages(folder, tmp_path, length=20)
    prepare.main(config, epath.Path(tmp_path / "w"))
