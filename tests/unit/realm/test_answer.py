"""Answers are the most probable spans, cut out of the passages as they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qa
from realm_examples import random_realm

from realm_retro.errors import UserError
from realm_retro.parallel.mesh import local_mesh
from realm_retro.realm import model, packing, reader, search
from realm_retro.realm.answer import Answerer
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.evidence import Retrieved, Seconds
from realm_retro.text import answers

CONFIG = RealmConfig(**tiny_qa.SIZES, score_scale=0.5)
PARAMS = random_realm(CONFIG, model.FINETUNING)
# Words of two bytes a letter, and one that several passages share.
EXTRA = ["Zürich: naïve café, ZORK.", "zork and Zork, the river"]
QUESTIONS = ["born bado", "river", "where was lufa born in the old town"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("answer")
    return tiny_qa.write_passages(workdir, corpus=tiny_qa.texts() + EXTRA)


@pytest.fixture(scope="module")
def vectors(store):
    make = search.passage_embedder(CONFIG, store)
    arrays = {k: np.asarray(v) for k, v in search.tower_arrays(CONFIG, PARAMS).items()}
    return make(arrays)(0, len(store))


@pytest.fixture(scope="module")
def answerer(store, vectors):
    return make(store, vectors)


def test_a_tower_in_pieces_embeds_the_same(store, vectors):
    make = search.passage_embedder(CONFIG, store, mesh=local_mesh(2, 2))
    arrays = {k: np.asarray(v) for k, v in search.tower_arrays(CONFIG, PARAMS).items()}
    np.testing.assert_allclose(make(arrays)(0, len(store)), vectors, atol=1e-5)


def make(store, vectors, params=PARAMS, **settings):
    index = search.build_index(vectors, backend="exact")
    return Answerer(CONFIG, params, store, index, **{"read": 3, **settings})


def inner(vectors, question, store):
    """f(x, z) of all passages, in float64."""
    query, lengths, _ = search.tokenise_questions(CONFIG, store.tokenizer, [question])
    x = search.embed_all_queries(CONFIG, PARAMS, query, lengths)[0]
    return CONFIG.score_scale * vectors.astype(np.float64) @ x, x


def expected(store, vectors, question):
    """Every span of the passages that are read, scored one passage at a time."""
    scores, _ = inner(vectors, question, store)
    rows = np.argsort(-scores, kind="stable")[:3]
    query, lengths, _ = search.tokenise_questions(CONFIG, store.tokenizer, [question])
    found = []
    for row in rows.tolist():
        body = np.zeros((1, CONFIG.body_length), np.int32)
        size = int(store.lengths[row])
        body[0, :size] = store.body[row][:size]
        span_scores, legal = reader.score_spans(
            CONFIG, PARAMS, query, lengths, body, np.array([size])
        )
        table = reader.spans(CONFIG.joint_tokens, CONFIG.span_width)
        places, text = store.token_spans(row), store.text(row)
        for number in np.flatnonzero(np.asarray(legal)[0]):
            start, end = table[number] - (int(lengths[0]) + 2)
            said = answers.token_text(text, places, start, end)
            found.append((scores[row] + float(span_scores[0, number]), row, said))
    found.sort(key=lambda item: -item[0])
    total = np.logaddexp.reduce([score for score, _, _ in found])
    best = answers.normalise(found[0][2])
    mass = sum(
        np.exp(score - total)
        for score, _, said in found[:20]
        if answers.normalise(said) == best
    )
    return rows.tolist(), found[0][2], mass


def test_answers_are_the_best_spans(answerer, store, vectors):
    for question, given in zip(QUESTIONS, answerer.answer(QUESTIONS), strict=True):
        rows, text, mass = expected(store, vectors, question)
        assert given.question == question
        assert [passage.row for passage in given.passages] == rows
        assert given.text == text
        assert given.probability == pytest.approx(mass, rel=1e-3)
        pieces = store.tokenizer.encode(question, add_special_tokens=False).ids
        assert given.cut == (len(pieces) > CONFIG.query_length)


def test_the_answer_is_marked_where_it_stands(answerer, store):
    marked = 0
    for given in answerer.answer([*QUESTIONS, "Zürich naïve", "zork"]):
        for passage in given.passages:
            assert passage.text == store.text(passage.row)
            assert passage.title == store.title(passage.row)
            assert passage.document == f"doc {passage.row}"
            if passage.span:
                start, end = passage.span
                said = passage.text[start:end]
                assert answers.normalise(said) == answers.normalise(given.text)
                marked += 1
        assert any(passage.span for passage in given.passages)
    assert marked >= 5


def test_what_retrieval_thinks_of_each_passage(answerer, store, vectors):
    nothing, zero = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)
    ids, mask = packing.document_inputs(nothing, zero, nothing, zero)
    null = np.asarray(model.embed_documents(CONFIG, PARAMS, ids, mask))[0]
    for question, given in zip(QUESTIONS, answerer.answer(QUESTIONS), strict=True):
        scores, x = inner(vectors, question, store)
        top = np.sort(scores)[::-1][:3]
        weights = np.exp([*top, CONFIG.score_scale * float(null @ x)])
        expected_prior = weights / weights.sum()
        found = [passage.probability for passage in given.passages]
        np.testing.assert_allclose(found, expected_prior[:3], rtol=1e-3)
        assert given.null_mass == pytest.approx(expected_prior[3], rel=1e-3)
        np.testing.assert_allclose(
            [passage.score for passage in given.passages], top, rtol=1e-4, atol=1e-5
        )


def test_company_changes_no_answer(answerer, store, vectors):
    together = answerer.answer(QUESTIONS)
    few = make(store, vectors, batch_size=2)
    for given in ([answerer.answer([q])[0] for q in QUESTIONS], few.answer(QUESTIONS)):
        for one, other in zip(given, together, strict=True):
            assert one.text == other.text
            assert one.probability == pytest.approx(other.probability, rel=1e-4)


def test_without_a_reader_passages_are_found(store, vectors, answerer):
    bare = make(store, vectors, params={"query": PARAMS["query"]})
    assert not bare.reads
    [given] = bare.answer(QUESTIONS[:1])
    [other] = answerer.answer(QUESTIONS[:1])
    assert given.text is given.probability is given.null_mass is None
    assert [p.row for p in given.passages] == [p.row for p in other.passages]
    assert sum(p.probability for p in given.passages) == pytest.approx(1)
    assert all(p.span is None for p in given.passages)
    assert given.seconds.read < 0.1


def test_fewer_passages_than_are_read(tmp_path):
    few = tiny_qa.write_passages(tmp_path, corpus=tiny_qa.texts()[:2])
    vectors = np.ones((2, CONFIG.vector_dim), np.float32)
    [given] = make(few, vectors, read=5).answer(["born bado"])
    assert len(given.passages) == 2
    assert given.text
    assert sum(p.probability for p in given.passages) + given.null_mass == (
        pytest.approx(1)
    )


def test_a_question_that_is_too_long_is_noted(answerer):
    long = "the river flows " * 20
    assert [a.cut for a in answerer.answer(["born", long])] == [False, True]


def test_odd_questions(answerer):
    assert answerer.answer([]) == []
    [empty] = answerer.answer([""])
    assert len(empty.passages) == 3


def test_an_index_of_another_corpus_is_refused(store, vectors):
    with pytest.raises(UserError, match="of another corpus or encoder"):
        make(store, vectors[:-1])


def test_times_add_up(answerer):
    found = answerer.retrieve(QUESTIONS, 3)
    given = [a for part in answerer.read(QUESTIONS, found) for a in part]
    total = Seconds.sum([answer.seconds for answer in given])
    assert total.embed == pytest.approx(found.seconds.embed)
    assert total.tokenise > 0 < total.read
    assert total.total == pytest.approx(
        total.tokenise + total.embed + total.search + total.gather + total.read
    )


def test_parts_join_to_the_whole(answerer):
    found = answerer.retrieve(QUESTIONS, 4)
    again = Retrieved.join([found[:1], found[1:]])
    np.testing.assert_array_equal(again.ids, found.ids)
    np.testing.assert_array_equal(again.query, found.query)
    assert again.seconds.total == pytest.approx(found.seconds.total)
    assert jax.tree.map(len, (found[:1].ids, found[1:].scores)) == (1, 2)
