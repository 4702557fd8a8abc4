"""Batches hold what was found and what it answers; only the right weights move."""

import functools

import jax
import numpy as np
import pytest
import tiny_qa
from realm_examples import random_realm

from realm_retro.data import answer_store
from realm_retro.data.questions import load_questions
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import finetune, model, qa, question_batches, search
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.question_sets import QaConfig
from realm_retro.text import answers

CONFIG = RealmConfig(**tiny_qa.SIZES)
SETTINGS = QaConfig(beam=6, read=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("world")
    store = tiny_qa.write_passages(workdir)
    return store, *answered(workdir, store)


def answered(workdir, store, rows=None):
    questions = load_questions(tiny_qa.write_questions(workdir / "q.jsonl", rows))
    stage = answer_store.open_stage(workdir / "answers", questions, store)
    stage.commit(answer_store.build(questions, store, stage))
    opened = answer_store.AnswerStore.open(workdir / "answers", questions=questions)
    return questions, opened


def vectors_of(store):
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(store), CONFIG.vector_dim)).astype(np.float32)


def examples(world, **changes):
    store, questions, found = world
    settings = QaConfig(**{"beam": 6, "read": 3, **changes})
    return question_batches.Examples(
        CONFIG, settings, store, questions, found, vectors_of(store)
    )


def recipe(world, config=None, index=None, vectors=None, weights=None):
    store, questions, found = world
    vectors = vectors_of(store) if vectors is None else vectors
    return finetune.make(
        config or tiny_qa.config("unused"),
        store,
        questions,
        found,
        vectors,
        index or search.build_index(vectors, backend="exact"),
        make_mesh(),
        weights,
    )


def test_a_batch_holds_what_was_found(world):
    store, questions, _ = world
    asked = np.array([2, 1, 8])
    ids = np.array([[3, 2, 7, 0], [1, 5, -1, -1], [4, 6, 0, 1]])
    batch = examples(world).batch(asked, ids)
    for row, question in enumerate(asked):
        text = questions[question].question
        pieces = store.tokenizer.encode(text, add_special_tokens=False).ids
        assert batch["query"][row][: batch["query_len"][row]].tolist() == pieces
    np.testing.assert_array_equal(batch["beam_valid"], ids >= 0)
    np.testing.assert_array_equal(batch["beam_has"], ids == np.array([[2], [1], [99]]))
    np.testing.assert_array_equal(
        batch["beam_vectors"][ids >= 0], vectors_of(store)[ids[ids >= 0]]
    )
    np.testing.assert_array_equal(batch["slots"], [[0, 1, 2]] * 3)
    for row, slot in np.ndindex(3, 3):
        length = batch["body_len"][row, slot]
        if ids[row, slot] < 0:
            assert length == 0
            continue
        assert length == store.lengths[ids[row, slot]] > 0
        body = store.body[int(ids[row, slot])][:length]
        np.testing.assert_array_equal(batch["body"][row, slot, :length], body)
    assert "title" not in batch


def test_a_batch_can_be_named(world):
    store, questions, _ = world
    made = recipe(world)
    named = made.examples(3)
    assert set(named["id"]) <= {question.id for question in questions}
    # In the order of the batch, which the search has no part in.
    beam = [[0, 1, 2, 3, 4, 5]] * len(named["id"])
    query = made.batch_at.batch(3, {"ids": beam})["query"]
    for row, text in zip(query, named["question"], strict=True):
        pieces = store.tokenizer.encode(str(text), add_special_tokens=False).ids
        assert row[: len(pieces)].tolist() == pieces


def test_correct_spans_read_as_the_answers(world):
    store = world[0]
    ids = np.array([[3, 2, 7], [1, 0, -1], [0, 1, 2]])
    batch = examples(world).batch(np.array([2, 1, 8]), ids)
    found = {}
    for row, slot, start, width in np.argwhere(batch["correct"]):
        passage = int(ids[row, slot])
        spans = store.token_spans(passage)
        text = answers.token_text(store.text(passage), spans, start, start + width + 1)
        found[int(row), int(slot)] = text
    assert found == {(0, 1): "Vibo", (1, 0): "Quem"}
    assert not batch["unreachable"].any()


def test_an_answer_that_no_span_can_give_is_counted(tmp_path):
    store = tiny_qa.write_passages(tmp_path)
    long = [{"question": "born", "answers": ["in Zork, the old town"]}]
    made = examples((store, *answered(tmp_path, store, long)))
    batch = made.batch(np.array([0]), np.array([[0, 1, 2]]))
    assert batch["beam_has"][0, 0]
    assert not batch["correct"].any()
    assert batch["unreachable"].tolist() == [1]


def test_recall_of_gold_documents_where_they_are_known(tmp_path):
    store = tiny_qa.write_passages(tmp_path)
    documents = [store.document_id(int(d)) for d in store.document[:4]]
    rows = [
        {"question": "born", "answers": ["Zork"], "document": documents[0]},
        {"question": "born where", "answers": ["Zork"], "document": documents[1]},
        {"question": "who", "answers": ["Zork"]},
        {"question": "who else", "answers": ["Zork"], "document": "of another corpus"},
    ]
    made = examples((store, *answered(tmp_path, store, rows)))
    assert made.names_gold
    batch = made.batch(
        np.array([0, 1, 2, 3]),
        np.array([[2, 3, 0, 1], [0, 2, 3, 1], [0, 1, 2, 3], [-1, -1, -1, -1]]),
    )
    # Three are read: the fourth of the second question does not count.
    assert batch["gold_named"].tolist() == [1, 1, 0, 1]
    assert batch["gold_read"].tolist() == [1, 0, 0, 0]


def test_titles_come_with_the_document_tower(world):
    store = world[0]
    ids = np.array([[4, -1, 2]])
    batch = examples(world, train_documents=True).batch(np.array([0]), ids)
    titles, lengths = store.title_tokens(ids[0, [0, 2]])
    np.testing.assert_array_equal(batch["title"][0, [0, 2]], titles)
    np.testing.assert_array_equal(batch["title_len"][0, [0, 2]], lengths)
    assert batch["title_len"][0, 1] == 0
    spec = finetune.batch_spec(QaConfig(train_documents=True))
    assert batch.keys() == spec.keys()


def test_fewer_passages_than_are_read(world):
    made = examples(world, beam=12, read=10)
    assert made.beam == 8
    batch = made.batch(np.array([0]), np.arange(8)[None, :])
    assert batch["beam_valid"].tolist() == [[True] * 8 + [False] * 2]
    assert batch["slots"].tolist() == [list(range(10))]
    assert batch["body_len"][0, 8:].tolist() == [0, 0]


def test_questions_that_no_passage_answers(world):
    assert len(examples(world)) == 8
    assert len(examples(world, drop_unanswerable=False)) == 9
    config = tiny_qa.config("unused")
    assert "8 questions, 1 that no passage answers left out" in (
        recipe(world, config).description
    )
    config.qa.drop_unanswerable = False
    assert "9 questions, 1 that no passage answers kept, without a loss" in (
        recipe(world, config).description
    )


def test_no_question_of_this_corpus_is_an_error(tmp_path):
    store = tiny_qa.write_passages(tmp_path)
    none = [{"question": "born nobody", "answers": ["Atlantis"]}]
    with pytest.raises(UserError, match="no passage answers any of the 1 questions"):
        examples((store, *answered(tmp_path, store, none)))


def test_what_does_not_fit_is_named(world):
    vectors = np.zeros((7, CONFIG.vector_dim), np.float32)
    with pytest.raises(UserError, match=r"shape \(7, 8\).*ask for \(8, 8\)"):
        recipe(world, vectors=vectors)
    config = tiny_qa.config("unused")
    config.model.body_length = 20
    with pytest.raises(
        UserError, match=r"passages\.length was 32, above config\.model"
    ):
        recipe(world, config)


def test_batches_are_functions_of_the_step(world):
    live = recipe(world).batch_at
    params = random_realm(CONFIG, model.FINETUNING)

    def batch(live, step):
        return live.batch(step, live.find(step, live.ask(step, params)))

    again = recipe(world).batch_at
    for step in (3, 0):
        jax.tree.map(
            np.testing.assert_array_equal, batch(live, step), batch(again, step)
        )
    # An epoch has each question once.
    asked = {tuple(row) for row in batch(live, 0)["query"]}
    assert len(asked) == 8
    assert not np.array_equal(batch(live, 0)["query"], batch(live, 1)["query"])


def test_a_search_finds_the_best_for_the_weights(world):
    store = world[0]
    live = recipe(world).batch_at
    for seed in (0, 5):
        params = random_realm(CONFIG, model.FINETUNING, seed=seed)
        found = live.find(0, live.ask(0, params))
        batch = live.batch(0, found)
        vectors = search.embed_all_queries(
            CONFIG, params, batch["query"], batch["query_len"]
        )
        best = np.argsort(-(vectors @ vectors_of(store).T), axis=1)[:, :6]
        np.testing.assert_array_equal(np.array(found["ids"]), best)


@pytest.mark.parametrize("train_documents", [False, True])
def test_what_is_trained(train_documents):
    settings = QaConfig(train_documents=train_documents)
    params = random_realm(CONFIG, model.FINETUNING)
    mask = finetune.trainable(params, settings)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    moving = {part for part in mask if all(jax.tree.leaves(mask[part]))}
    still = {part for part in mask if not any(jax.tree.leaves(mask[part]))}
    assert moving | still == {"query", "document", "reader"}
    assert ("document" in moving) == train_documents


def test_tied_towers_part_before_one_of_them_moves():
    tied = RealmConfig(**tiny_qa.SIZES, tied=True)
    params = random_realm(tied, model.FINETUNING)
    assert "document" not in params
    apart = finetune.model_for(tied, QaConfig())
    assert not apart.tied
    copied = finetune.with_document(apart, params)
    jax.tree.map(np.testing.assert_array_equal, copied["document"], copied["query"])
    both = QaConfig(train_documents=True)
    assert finetune.model_for(tied, both).tied
    assert "document" not in finetune.with_document(tied, params)


def test_the_loss_and_its_metrics(world):
    made = recipe(world)
    params = random_realm(CONFIG, model.FINETUNING)
    live = made.batch_at
    batch = live.batch(0, live.find(0, live.ask(0, params)))
    found = jax.jit(made.loss)(params, batch, jax.random.key(0))
    lean = {name: batch[name] for name in qa.BATCH_SPEC}
    expected = jax.jit(functools.partial(qa.finetune_loss, CONFIG))(params, lean, None)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    assert found[1] == 8
    assert tuple(map(float, found[2]["beam"])) == (8 * 6, 8)
    assert tuple(map(float, found[2]["unreachable"])) == (0, 8)
    assert "gold_recall" not in found[2], "no question names its document"
    told = {**batch, "gold_named": np.ones(8), "gold_read": np.eye(1, 8)[0]}
    loss = jax.jit(finetune.loss_fn(CONFIG, QaConfig(), make_mesh(), gold=True))
    assert tuple(map(float, loss(params, told, None)[2]["gold_recall"])) == (1, 8)
