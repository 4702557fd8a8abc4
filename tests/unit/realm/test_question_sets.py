"""Every command holds out the same questions, and bad settings are named."""

import json

import pytest

from realm_retro.data.questions import Question
from realm_retro.errors import UserError
from realm_retro.realm import question_sets
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig


def questions(number):
    return [Question(f"id {i}", f"what is {i}", (str(i),)) for i in range(number)]


def write(path, number):
    lines = [
        json.dumps({"id": i, "question": "q", "answer": "a"}) for i in range(number)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def ids(found):
    return [question.id for question in found]


def test_a_question_goes_by_its_id_alone():
    kept, held_out = question_sets.split(questions(3000), 0.3)
    assert sorted(ids(kept + held_out)) == sorted(ids(questions(3000)))
    assert 0.27 < len(held_out) / 3000 < 0.33
    some = questions(3000)[1000:2000][::-1]
    fewer = question_sets.split(some, 0.3)[1]
    assert set(ids(fewer)) == set(ids(held_out)) & set(ids(some))
    more = question_sets.split(questions(3000), 0.5)[1]
    assert set(ids(held_out)) < set(ids(more))
    assert question_sets.split(questions(9), 0.0) == (questions(9), [])


def test_a_part_of_one_file_is_held_out(tmp_path):
    settings = QaConfig(questions=write(tmp_path / "q.jsonl", 50), holdout=0.4)
    kept = ids(question_sets.training_questions(settings))
    held_out = ids(question_sets.test_questions(settings))
    assert kept
    assert held_out
    assert sorted(kept + held_out, key=int) == [str(i) for i in range(50)]


def test_with_a_file_of_test_questions_nothing_is_held_out(tmp_path):
    settings = QaConfig(
        questions=write(tmp_path / "q.jsonl", 50), test=write(tmp_path / "t.jsonl", 7)
    )
    assert len(question_sets.training_questions(settings)) == 50
    assert len(question_sets.test_questions(settings)) == 7


def test_nothing_to_train_or_to_evaluate_on_is_said(tmp_path):
    path = write(tmp_path / "q.jsonl", 3)
    with pytest.raises(
        UserError, match=r"holdout=0\.0 holds out no question of .*q\.j"
    ):
        question_sets.test_questions(QaConfig(questions=path, holdout=0.0))
    with pytest.raises(UserError, match=r"holdout=0\.9999 holds out all 3 questions"):
        question_sets.training_questions(QaConfig(questions=path, holdout=0.9999))


def test_the_package_has_questions():
    settings = QaConfig()
    kept = question_sets.training_questions(settings)
    held_out = question_sets.test_questions(settings)
    assert len(kept) + len(held_out) >= 150
    assert not set(ids(kept)) & set(ids(held_out))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": ""}, "names none"),
        ({"beam": 4, "read": 5}, "beam=4 is less than read=5"),
        ({"read": 0}, "read=0 must be at least 1"),
        ({"holdout": 1.0}, r"holdout=1\.0 must be"),
        ({"recall_at": ()}, "recall_at"),
        ({"recall_at": (5, 0)}, "recall_at"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        QaConfig(**changes)


def test_bad_retrieval_settings():
    with pytest.raises(ValueError, match="depth=2"):
        RetrievalConfig(depth=2)
    with pytest.raises(ValueError, match="index='faiss' must be one of auto, exact"):
        RetrievalConfig(index="faiss")
