"""Documents are counted, grouped and sampled without losing any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_retro.data.corpus import (
    CorpusConfig,
    Document,
    Report,
    batched_by_size,
    open_stage,
    sample,
)
from realm_retro.errors import UserError


def corpus_of(texts):
    return [Document(id=str(i), title="t", text=t) for i, t in enumerate(texts)]


@given(sizes=st.lists(st.integers(0, 30)), limit=st.integers(1, 40))
def test_groups_keep_order_and_stay_small(sizes, limit):
    documents = corpus_of("x" * size for size in sizes)
    groups = list(batched_by_size(documents, max_chars=limit))
    assert [d for group in groups for d in group] == documents
    for group in groups:
        assert len(group) == 1 or sum(len(d.text) for d in group) <= limit


def test_groups_are_lazy():
    def endless():
        while True:
            yield Document(id="i", title="", text="x" * 10)

    assert len(next(batched_by_size(endless(), max_chars=100))) == 10


def test_a_sample_is_seeded_capped_and_without_replacement():
    corpus = corpus_of([f"{i:04d}" for i in range(100)])
    drawn = list(sample(corpus, seed=1, max_bytes=40))
    assert len(drawn) == len(set(drawn)) == 10
    assert drawn == list(sample(corpus, seed=1, max_bytes=40))
    assert drawn != list(sample(corpus, seed=2, max_bytes=40))
    assert drawn != [d.text for d in corpus[:10]]
    everything = sample(corpus, seed=1, max_bytes=10**9)
    assert sorted(everything) == [d.text for d in corpus]


def test_report_counts_bytes_not_characters():
    report = Report()
    kept = list(report.keep(corpus_of(["é", "", "😀", " "])))
    assert [d.text for d in kept] == ["é", "😀"]
    assert (report.documents, report.empty, report.text_bytes) == (2, 2, 6)
    assert report.as_meta()["text_bytes"] == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "wikipedia"}, "choose one of vital_articles, text_files, tfds:"),
        ({"source": "text_files"}, "config.corpus.path is empty"),
        ({"source": "text_files", "path": ("",)}, "config.corpus.path is empty"),
        ({"articles": -1}, "articles=-1 is negative; 0 takes all"),
    ],
)
def test_bad_settings_are_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        CorpusConfig(**settings)


def test_a_corpus_of_all_articles_is_one_from_before_there_was_a_choice(tmp_path):
    """Its request on disk is the same to the letter."""
    stage = open_stage(CorpusConfig(), tmp_path / "corpus")
    request = next(tmp_path.rglob("*.json")).read_text()
    assert "articles" not in request.replace("vital_articles", "")
    stage.commit({})
    with pytest.raises(UserError, match="made with other settings"):
        open_stage(CorpusConfig(articles=5), tmp_path / "corpus")
