"""The pipeline on Beam's local runner writes what one process writes, to the last byte.

Beam is an extra: pip install -e '.[test,beam]', then pytest -m slow.
"""

import gzip
import importlib.util
import json
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from etils import epath

from realm_retro.cli import prepare
from realm_retro.data import datasets, records
from realm_retro.data.corpus import Document

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("apache_beam") is None,
        reason="needs the extra beam: pip install 'realm_retro[beam]'",
    ),
    # 2026-11: what TFDS calls of the protobuf that Beam wants.
    pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning"),
]

MULTI_PROCESSING = ["direct_running_mode=multi_processing", "direct_num_workers=2"]
SHARD = 16  # documents of a file, so that there are several
COMMAND = "from realm_retro.cli import prepare_beam; prepare_beam.entry()"
SMALL = f"from realm_retro.data import records; records._SHARD_DOCUMENTS = {SHARD}\n"


def article(rng, words=120):
    return [f"w{i}" for i in rng.integers(3000, size=words)]


def texts_of(rng, count):
    """Articles, of which some are copies of earlier ones, or nearly."""
    texts = [" ".join(article(rng))]
    while len(texts) < count:
        kind = rng.integers(4)
        words = texts[rng.integers(len(texts))].split()
        if kind == 0:
            words[0] = words[0].upper()
        elif kind == 1:
            words[rng.integers(8)] = "changed"
        elif kind == 2:
            words = article(rng)
        texts.append(" ".join(words))
    return texts


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of all kinds, 90 documents; and an evaluation set of six of them."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    texts = texts_of(rng, 90)
    (folder / "in").mkdir()
    rows = [json.dumps({"text": t, "title": f"t{i}"}) for i, t in enumerate(texts)]
    (folder / "in" / "a.jsonl").write_text("\n".join(rows[:30]))
    with gzip.open(folder / "in" / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[30:60]) + '\n{"text": " "}')
    for i, text in enumerate(texts[60:]):
        (folder / "in" / f"c{i:02d}.txt").write_text(text)
    (folder / "in" / "d.txt").write_bytes(b"\xff is not UTF-8")
    (folder / "in" / "e.txt").write_text("🙂")
    (folder / "in" / "f.txt").write_text("🙂")
    (folder / "in" / "g.pdf").write_text("")
    (folder / "eval.jsonl").write_text("\n".join(rows[::15]))
    return folder


def config_of(sources, **dedupe):
    return {
        "name": "retro",
        "corpus": {"source": "text_files", "path": str(sources / "in")},
        "dedupe": {"enabled": True, "against": str(sources / "eval.jsonl"), **dedupe},
        "tokenizer": {"vocab_size": 300},
        "chunks": {"length": 16, "validation_fraction": 0.2},
    }


def run_beam(tmp_path, config, *flags, beam=(), prelude=""):
    """The command, as another process that begins with `prelude`."""
    (tmp_path / "config.py").write_text(
        "import ml_collections\n"
        f"def get_config(): return ml_collections.ConfigDict({config!r})\n"
    )
    command = [
        sys.executable,
        "-c",
        prelude + COMMAND,
        f"--config={tmp_path}/config.py",
    ]
    command += [f"--workdir={tmp_path}/beam", *flags, *(f"--beam={b}" for b in beam)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def manifest_of(workdir):
    return datasets.open_corpus(workdir / "corpus").manifest


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", SHARD)


def prepare_alone(tmp_path, config):
    prepare.main(ml_collections.ConfigDict(config), epath.Path(tmp_path / "alone"))
    return manifest_of(tmp_path / "alone")


@pytest.mark.parametrize("dedupe", [True, False])
def test_the_runner_writes_what_one_process_writes(
    tmp_path, sources, dedupe, small_shards, capsys
):
    config = config_of(sources)
    if not dedupe:
        del config["dedupe"]
    done = run_beam(tmp_path, config, prelude=SMALL)
    assert done.returncode == 0, done.stderr
    ours, alone = manifest_of(tmp_path / "beam"), prepare_alone(tmp_path, config)
    assert ours.fingerprint == alone.fingerprint
    assert ours.files == alone.files
    assert sum("array_record" in name for name in ours.files) > 1
    assert {**ours.meta, "seconds": 0} == {**alone.meta, "seconds": 0}
    said = capsys.readouterr().out
    for line in done.stdout.splitlines()[1:]:
        assert line in said
    if dedupe:
        assert all(ours.meta["dedupe"][why] > 2 for why in ("exact", "near"))
        assert ours.meta["dedupe"]["evaluation"] >= 6
        assert ours.meta["dedupe"]["pairs_compared"] > 2
    # The road goes on from there.
    prepare.main(ml_collections.ConfigDict(config), epath.Path(tmp_path / "beam"))
    assert "corpus: finished already" in capsys.readouterr().out
    assert (tmp_path / "beam" / "chunks" / "manifest.json").exists()
    again = run_beam(tmp_path, config)
    assert again.stdout.startswith("corpus: finished already")


def test_processes_write_what_one_process_writes(tmp_path, sources):
    config = config_of(sources)
    done = run_beam(tmp_path, config, beam=MULTI_PROCESSING)
    assert done.returncode == 0, done.stderr
    alone = prepare_alone(tmp_path, config)
    assert manifest_of(tmp_path / "beam").fingerprint == alone.fingerprint


def test_no_two_documents_that_are_kept_are_alike(tmp_path, sources):
    done = run_beam(tmp_path, config_of(sources))
    assert done.returncode == 0, done.stderr
    corpus = datasets.open_corpus(tmp_path / "beam" / "corpus")
    kept = [runs(corpus[i].text) for i in range(len(corpus))]
    rows = (sources / "eval.jsonl").read_text().splitlines()
    against = [runs(json.loads(row)["text"]) for row in rows]
    for i, one in enumerate(kept):
        for other in against + kept[:i]:
            assert len(one & other) < 0.8 * len(one | other) or not one
    lines = (tmp_path / "beam" / "corpus" / "dropped-00000.jsonl").read_text()
    dropped = [json.loads(line) for line in lines.splitlines()]
    ids = [line["id"] for line in dropped]
    ids += [corpus[i].id for i in range(len(corpus))]
    assert len(ids) == len(set(ids)) == 93


def runs(text):
    words = text.lower().split()
    return {tuple(words[i : i + 13]) for i in range(max(0, len(words) - 12))}


def test_a_tfds_dataset_is_read_in_ranges(tmp_path, small_shards):
    folder = epath.Path(tmp_path / "tfds" / "documents" / "1.0.0")
    folder.mkdir(parents=True)
    texts = texts_of(np.random.default_rng(1), 50)
    records.write(folder, (Document(f"d{i}", "", t) for i, t in enumerate(texts)))
    config = config_of(tmp_path, against="")
    config["corpus"] = {
        "source": "tfds:documents:train",
        "data_dir": str(tmp_path / "tfds"),
    }
    ranges = "from realm_retro.data import datasets; datasets._PART_ROWS = 7\n"
    done = run_beam(tmp_path, config, prelude=SMALL + ranges)
    assert done.returncode == 0, done.stderr
    alone = prepare_alone(tmp_path, config)
    assert manifest_of(tmp_path / "beam").fingerprint == alone.fingerprint


def last_line(done, *, alone=True):
    assert done.returncode == 2, done.stderr
    assert not alone or "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_workers_error_is_one_line(tmp_path, sources):
    folder = tmp_path / "in"
    folder.mkdir()
    config = config_of(sources)
    config["corpus"]["path"] = str(folder)
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"body": "b"}\n')
    for beam in ([], MULTI_PROCESSING):
        # Worker processes log for themselves.
        said = last_line(run_beam(tmp_path, config, beam=beam), alone=not beam)
        assert said == (
            f"prepare_beam: error: {folder}/a.jsonl:2: has no field 'text'; it has:"
            " body; set config.corpus.text_field"
        )
    (folder / "a.jsonl").write_text('{"text": "fine", "id": 1}\n{"text": "b", "id": 1}')
    config["corpus"]["id_field"] = "id"
    said = last_line(run_beam(tmp_path, config))
    assert "a.jsonl:1 and " in said
    assert "have the same id '1'" in said
    (folder / "a.jsonl").write_text('{"text": "", "id": 1}')
    assert "holds no text (1 empty" in last_line(run_beam(tmp_path, config))
    (folder / "a.jsonl").write_text('{"text": "mended", "id": 1}')
    config["dedupe"]["field"] = "body"
    assert "no field 'body'" in (said := last_line(run_beam(tmp_path, config)))
    assert said.endswith("set config.dedupe.field")
    del config["dedupe"]["field"]
    config["dedupe"]["against"] = ""
    assert run_beam(tmp_path, config).returncode == 0


@pytest.mark.parametrize(
    ("flags", "beam", "said"),
    [
        (["--runner=NoRunner"], [], "--runner=NoRunner: Unexpected pipeline runner"),
        ([], ["direct_num_wrokers=2"], "--beam=direct_num_wrokers: Beam's Direct"),
        ([], ["direct_num_workers=two"], "invalid int value: 'two'"),
        (["--workdir=gs://bucket/w"], [], "is a bucket"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, sources, flags, beam, said):
    config = config_of(sources)
    assert said in last_line(run_beam(tmp_path, config, *flags, beam=beam))
    assert not pathlib.Path(tmp_path / "beam" / "corpus" / "manifest.json").exists()
