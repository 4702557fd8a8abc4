"""What is dropped is what the slow definition drops, and everything is counted."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_retro.data import corpus as corpus_lib
from realm_retro.data import datasets, dedupe, dedupe_local, dedupe_writer, records
from realm_retro.data.corpus import CorpusConfig, Document
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.errors import UserError
from realm_retro.text.near_duplicates import words_of

# So sure to compare every pair that a miss would be an error.
SURE = {"enabled": True, "words": 2, "threshold": 0.6, "miss": 1e-6}


def runs(text, length):
    words = words_of(text)
    length = min(length, len(words))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)} - {()}


def slow_marks(texts, evaluation, config):
    """The definition: every pair is compared."""
    marks = {}
    sets = [runs(text, config.words) for text in texts]
    words = [words_of(text) or text for text in texts]
    for second in range(evaluation, len(texts)):
        found = []
        for first in range(second):
            union = sets[first] | sets[second]
            similarity = len(sets[first] & sets[second]) / max(1, len(union))
            same = words[first] == words[second]
            if not same and similarity < config.threshold:
                continue
            reason = dedupe.EXACT if texts[first] == texts[second] else dedupe.NEAR
            reason = dedupe.EVALUATION if first < evaluation else reason
            mark = (reason, first - evaluation, 1.0 if same else similarity)
            found.append((0 if same else 1, first if same else 0, mark))
        if found:
            marks[second - evaluation] = min(found)[-1]
    return marks


def documents_of(texts):
    return [Document(id=f"d{i}", title="", text=t) for i, t in enumerate(texts)]


def found_marks(texts, evaluation, config):
    with tempfile.TemporaryDirectory() as folder:
        return dedupe_local.find(
            documents_of(texts), evaluation, config, epath.Path(folder)
        )[0]


TEXT = st.lists(st.sampled_from(["a", "b", "c", "A", "…"]), max_size=9).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXT, min_size=1, max_size=12), evaluation=st.integers(0, 4))
def test_marks_are_those_of_the_definition(texts, evaluation):
    config = DedupeConfig(**SURE)
    evaluation = min(evaluation, len(texts) - 1)
    slow = slow_marks(texts, evaluation, config)
    assert found_marks(texts, evaluation, config) == slow


def test_the_threshold_itself_is_alike():
    config = DedupeConfig(**SURE)
    one, other = (dedupe.shingles(text, config) for text in ("a b c d e", "a b c d"))
    assert dedupe.mark_of_pair(3, one, other, config) == (dedupe.NEAR, 3, 0.75)
    for threshold, found in ((0.75, True), (0.76, False)):
        config = DedupeConfig(**{**SURE, "threshold": threshold})
        assert bool(dedupe.mark_of_pair(0, one, other, config)) == found


def article(rng, words=200):
    return [f"w{i}" for i in rng.integers(5000, size=words)]


def changed(rng, words, times):
    words = list(words)
    for place in rng.choice(len(words), times, replace=False):
        words[place] = f"x{rng.integers(5000)}"
    return words


def test_long_documents_with_the_papers_settings():
    """13-grams at 0.8: a changed word changes 13 of 188 runs."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        words = article(rng)
        texts.append(" ".join(words))
        texts.extend(" ".join(changed(rng, words, times)) for times in (1, 3))
    config = DedupeConfig(enabled=True)
    slow = slow_marks(texts, 5, config)
    near = [row for row in range(120) if row % 3 == 1]
    assert set(slow) >= {row - 5 for row in near if row > 5}
    assert any(row % 3 == 2 and row - 5 not in slow for row in range(5, 120))
    assert found_marks(texts, 5, config) == slow


# As an artefact


def write_jsonl(path, texts):
    rows = [
        json.dumps({"text": text, "title": f"t{i}"}) for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    """Six documents, of which two remain, and an evaluation set."""
    (tmp_path / "in").mkdir()
    texts = ["one two three four", "five six seven eight", "one two three four"]
    texts += ["One, two, three: four!", "one two three four five", "e v a l"]
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    against = write_jsonl(tmp_path / "eval.jsonl", ["E V A L", "other"])
    return {"path": str(tmp_path / "in"), "against": against}


def build(directory, path, **wanted):
    config = CorpusConfig(source="text_files", path=path)
    wanted = DedupeConfig(**SURE, **wanted)
    stage = corpus_lib.open_stage(config, directory, dedupe=dedupe.settings(wanted))
    with stage.released_on_error():
        report = datasets.build(config, stage, wanted)
    stage.commit(report.as_meta())
    return datasets.open_corpus(directory)


def lines_of(directory):
    files = sorted(pathlib.Path(directory).glob("dropped-*.jsonl"))
    return [json.loads(r) for file in files for r in file.read_text().splitlines()]


def test_a_corpus_without_duplicates(tmp_path, sources):
    corpus = build(tmp_path / "c", **sources)
    assert [corpus[i].id for i in range(len(corpus))] == ["a.jsonl:1", "a.jsonl:2"]
    dropped = [
        (d["id"], d["reason"], d["of"], d["jaccard"]) for d in lines_of(tmp_path / "c")
    ]
    assert dropped == [
        ("a.jsonl:3", "exact", "a.jsonl:1", 1.0),
        ("a.jsonl:4", "near", "a.jsonl:1", 1.0),
        ("a.jsonl:5", "near", "a.jsonl:1", 0.75),
        ("a.jsonl:6", "evaluation", f"{sources['against']}:1", 1.0),
    ]
    meta = corpus.manifest.meta
    assert meta["documents"] == 2
    assert meta["text_bytes"] == len("one two three fourfive six seven eight")
    assert meta["dedupe"] == {
        "evaluation": 1,
        "exact": 1,
        "near": 2,
        "evaluation_documents": 2,
        "pairs_compared": 1,
        "pairs_left_out": 0,
    }
    assert "dropped-00000.jsonl" in corpus.manifest.files
    assert not (tmp_path / "c" / ".parts").exists()


def test_what_was_dropped_is_said(tmp_path, sources):
    config = CorpusConfig(source="text_files", path=sources.pop("path"))
    wanted = DedupeConfig(**SURE, **sources)
    report = datasets.build(
        config, corpus_lib.open_stage(config, tmp_path / "c"), wanted
    )
    said = "\n".join(report.lines())
    assert "1 documents were dropped: another has the same text" in said
    assert "2 documents were dropped: another is nearly the same" in said
    assert "1 documents were dropped: config.dedupe.against has them" in said


def test_nothing_to_drop_leaves_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 4)
    path = write_jsonl(tmp_path / "a.jsonl", [f"x{i} y{i}" for i in range(11)])
    corpus = build(tmp_path / "c", path)
    config = CorpusConfig(source="text_files", path=path)
    stage = corpus_lib.open_stage(config, tmp_path / "plain")
    plain = stage.commit(datasets.build(config, stage).as_meta())
    assert corpus.manifest.files == plain.files
    assert len(plain.files) == 5


def test_a_shard_of_duplicates_leaves_no_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_DOCUMENTS", 2)
    texts = ["a b", "c d", "a b", "c d", "e f", "a b", "g h"]
    corpus = build(tmp_path / "c", write_jsonl(tmp_path / "a.jsonl", texts))
    assert [corpus[i].text for i in range(4)] == ["a b", "c d", "e f", "g h"]
    names = [name for name in corpus.manifest.files if "array_record" in name]
    assert names == [records.shard_name(i) for i in range(3)]
    assert [line["id"] for line in lines_of(tmp_path / "c")] == [
        f"{tmp_path}/a.jsonl:{line}" for line in (3, 4, 6)
    ]


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path, sources, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    fresh = build(tmp_path / "fresh", **sources).manifest
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_metadata", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c", **sources)
    (tmp_path / "c" / "dropped-00007.jsonl").write_text("older")
    again = build(tmp_path / "c", **sources).manifest
    assert again.fingerprint == fresh.fingerprint
    assert [d["id"] for d in lines_of(tmp_path / "c")] == [
        f"a.jsonl:{line}" for line in (3, 4, 5, 6)
    ]


def test_writing_a_shard_twice_is_writing_it_once(tmp_path):
    documents = list(enumerate(documents_of(["a", "b", "c"])))
    results = [
        dedupe_writer.write_shard(
            epath.Path(tmp_path), 0, documents, {1: (dedupe.NEAR, "d0", 0.9)}
        )
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_evaluation_set_is_its_content_not_its_place(tmp_path, sources):
    one = DedupeConfig(**SURE, against=sources["against"])
    moved = tmp_path / "moved.jsonl"
    pathlib.Path(sources["against"]).rename(moved)
    two = DedupeConfig(**SURE, against=str(moved))
    with pytest.raises(UserError, match="matches no file"):
        dedupe.settings(one)
    before = dedupe.settings(two)
    moved.write_text(moved.read_text() + '\n{"text": "more"}')
    assert dedupe.settings(two) != before
    assert dedupe.settings(DedupeConfig()) == {}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"words": 0}, "words=0 must be 1 or more"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
        ({"threshold": 1.5}, "threshold=1.5 must be above 0, at most 1"),
        ({"miss": 0.0}, "miss=0.0 must be between 0 and 1"),
        (
            {"threshold": 0.01},
            r"takes more than 256 hashes .* raise config\.dedupe\.thr",
        ),
        ({"against": "e.jsonl"}, r"set config\.dedupe\.enabled=True"),
    ],
)
def test_bad_settings_are_one_line(wanted, said):
    with pytest.raises(UserError, match=said):
        DedupeConfig(**wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"^config\.dedupe\.against: '.*eval\.jsonl' matches no file"),
        ("", r"config\.dedupe\.against \(.*eval\.jsonl\) holds no text"),
        ('{"text": " "}', r"config\.dedupe\.against \(.*eval\.jsonl\) holds no text"),
        (
            '{"question": "q"}',
            r"eval\.jsonl:1: has no field 'text'.* config\.dedupe\.field",
        ),
    ],
)
def test_a_wrong_evaluation_set_is_one_line(tmp_path, sources, content, said):
    file = pathlib.Path(sources["against"])
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=said):
        build(tmp_path / "c", **sources)


def test_a_corpus_that_is_an_evaluation_set_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one two three", "one two three."])
    with pytest.raises(UserError, match="drops every document"):
        build(tmp_path / "c", path, against=path)


def test_an_id_twice_is_refused_before_anything_is_dropped(tmp_path):
    rows = [json.dumps({"text": "same", "id": 7})] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config = CorpusConfig(
        source="text_files", path=str(tmp_path / "a.jsonl"), id_field="id"
    )
    stage = corpus_lib.open_stage(config, tmp_path / "c")
    with pytest.raises(UserError, match=r"a\.jsonl:1 and .*:2 have the same id '7'"):
        datasets.build(config, stage, DedupeConfig(**SURE))
