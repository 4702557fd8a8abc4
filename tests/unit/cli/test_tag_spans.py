"""The stage as a user meets it: spans of every passage, resumed, counted, reported."""

import json

import ml_collections
import numpy as np
import pytest
import tiny_passages
from etils import epath

from realm_retro.cli import tag_spans
from realm_retro.data.span_store import SpanStore
from realm_retro.errors import UserError
from realm_retro.text import spans as spans_lib

TEXTS = [
    "the river Thames flows through London. The old town of Rome, born 1994",
    "the green field",
    "in Zürich the river Limmat flows 中国人。 by É",
    "They saw Zxcvbnmasdfghjkl in the town.",
]


@pytest.fixture
def workdir(tmp_path):
    path = tiny_passages.save_tokenizer(tmp_path / "t")
    tiny_passages.write_passages(
        tmp_path / "w" / "passages",
        tiny_passages.documents(TEXTS),
        tokenizer_json=path,
        length=24,
    )
    return epath.Path(tmp_path / "w")


def run(workdir, **settings):
    config = {"name": "realm", "spans": {"tagger": "rules", **settings}}
    tag_spans.main(ml_collections.ConfigDict(config), workdir)
    return SpanStore.open(workdir / "spans")


def store_of(workdir):
    return tag_spans.PassageStore.open(workdir / "passages")


def texts_of(workdir, spans):
    store = store_of(workdir)
    found = []
    for row in range(len(store)):
        data, pieces = store.text(row).encode(), store.token_spans(row)
        for start, end in spans.of(row):
            found.append(data[pieces[start, 0] : pieces[end - 1, 1]].decode())
    return found


def test_every_passage_has_its_spans(workdir, capsys):
    spans = run(workdir)
    store = store_of(workdir)
    assert len(spans) == len(store)
    assert texts_of(workdir, spans) == [
        "Thames",
        "London",
        "Rome",
        "1994",
        "Zürich",
        "Limmat",
        "Zxcvbnmasdfghjkl",
    ]
    meta = spans.manifest.meta
    assert meta["spans"] == 7
    assert meta["tagger"] == "rules"
    assert meta["too_long"] == 1
    without = sum(not len(spans.of(row)) for row in range(len(spans)))
    assert meta["passages_without"] == without > 0
    said = capsys.readouterr().out
    assert f"spans: 7 spans in {len(store)} passages by rules" in said
    assert "1 spans are longer than config.spans.max_masks" in said
    assert f"{without} passages have no span" in said


def test_shards_do_not_change_the_content(workdir, monkeypatch):
    whole = run(workdir)
    (workdir / "spans").rmtree()
    monkeypatch.setattr(tag_spans, "_GROUP", 2)
    parts = run(workdir, shard_passages=3)
    np.testing.assert_array_equal(parts.offsets, whole.offsets)
    np.testing.assert_array_equal(parts.spans[:], whole.spans[:])
    for name in ("spans", "passages_without", "too_long", "widened"):
        assert parts.manifest.meta[name] == whole.manifest.meta[name]


def test_an_interrupted_run_resumes_at_the_first_missing_shard(workdir, monkeypatch):
    seen = []

    def tagger(texts):
        seen.extend(texts)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [[(0, 3)] for _ in texts]

    monkeypatch.setattr(spans_lib, "rule_tagger", tagger)
    with pytest.raises(KeyboardInterrupt):
        run(workdir, shard_passages=1)
    with pytest.raises(UserError, match="spans unfinished"):
        SpanStore.open(workdir / "spans")
    spans = run(workdir, shard_passages=1)
    assert len(seen) == len(spans) + 1, "only the passage that failed is read again"
    assert spans.manifest.meta["spans"] == len(spans)


def test_a_finished_stage_says_so_and_does_nothing(workdir, capsys, monkeypatch):
    before = run(workdir).fingerprint
    capsys.readouterr()
    assert run(workdir).fingerprint == before
    # "default" is whatever it was when the spans were made.
    monkeypatch.setattr(spans_lib, "has_spacy", lambda: True)
    assert run(workdir, tagger="default").fingerprint == before
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in said] == [
        "spans: finished already, 7 spans"
    ] * 2
    with pytest.raises(UserError, match=r"max_masks: 10 there, 9 here"):
        run(workdir, max_masks=9)


def test_without_spacy_the_default_is_the_rules(workdir, capsys, monkeypatch):
    monkeypatch.setattr(spans_lib, "has_spacy", lambda: False)
    spans = run(workdir, tagger="default")
    assert spans.manifest.meta["tagger"] == "rules"
    assert "less exact; to have it, run: pip install" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"spaCy or .* is not installed"):
        run(epath.Path(workdir), tagger="spacy")


def test_annotations(workdir, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    records = [
        {"id": "doc 0", "spans": [[10, 16], [12, 14], [4, 60], [9, 10]]},
        {"id": "doc 9", "spans": []},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    spans = run(workdir, tagger="annotations", path=str(path))
    assert texts_of(workdir, spans) == ["Thames"]
    said = capsys.readouterr().out
    assert "1 spans began or ended within a word and were widened" in said
    assert "1 spans go beyond the end of a passage" in said
    assert "1 spans hold no wordpiece" in said
    assert "3 documents have no annotation" in said
    assert "1 annotations are of documents that the corpus does not have" in said


def test_annotations_of_another_corpus_are_refused(workdir, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "other", "spans": [[0, 1]]}\n')
    with pytest.raises(UserError, match="annotates none of the 4 documents"):
        run(workdir, tagger="annotations", path=str(path))


def test_passages_come_first(tmp_path):
    with pytest.raises(UserError, match=r"passages missing; run: .*cli\.prepare"):
        run(epath.Path(tmp_path))
