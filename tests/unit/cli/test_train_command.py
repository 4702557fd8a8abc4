"""Which settings are fixed for the life of a run."""

import ml_collections
import pytest
import tiny_qa

from realm_retro.cli import train

QA = {
    "questions": "q.jsonl",
    "recall_at": (1, 5),
    "bm25": True,
    "eval_batch_size": 4,
    "data_dir": "",
    "test": "",
    "holdout": 0.3,
}


def decisive(task, **sections):
    config = {"name": "a", "task": task, "model": {"width": 4}, "init": {"run": ""}}
    sections = {name: {**config.get(name, {}), **x} for name, x in sections.items()}
    return train.decisive(ml_collections.ConfigDict({**config, **sections}))


@pytest.mark.parametrize(
    "changes",
    [
        {"qa": {"recall_at": (1, 20)}},
        {"qa": {"bm25": False}},
        {"qa": {"eval_batch_size": 64}},
        {"qa": {"data_dir": "elsewhere"}},
        {"qa": {"beam": 5000}},  # what it is by default
        {"retrieval": {"depth": 1}},
        {"refresh": {"shard_rows": 7}},
        {"pretrain": {"masking": "span"}},
        {"name": "b"},
    ],
)
def test_what_fine_tuning_does_not_read_may_change(changes):
    changes = {n: {**QA, **x} if n == "qa" else x for n, x in changes.items()}
    name = changes.pop("name", None)
    changed = decisive("realm_finetune", **{"qa": QA, **changes})
    assert changed == decisive("realm_finetune", qa=QA)
    assert name is None or "name" not in changed


@pytest.mark.parametrize(
    "changes",
    [
        {"qa": {"beam": 4000}},
        {"qa": {"holdout": 0.2}},
        {"qa": {"questions": "other.jsonl"}},
        {"qa": {"test": "test.jsonl"}},  # nothing is held out any more
        {"qa": {"train_documents": True}},
        {"retrieval": {"depth": 0}},
        {"retrieval": {"index": "scann"}},
        {"refresh": {"dtype": "float16"}},
        {"model": {"width": 8}},
        {"init": {"run": "ict"}},
    ],
)
def test_what_fine_tuning_depends_on_is_fixed(changes):
    changes = {n: {**QA, **x} if n == "qa" else x for n, x in changes.items()}
    changed = decisive("realm_finetune", **{"qa": QA, **changes})
    assert changed != decisive("realm_finetune", qa=QA)


def test_other_questions_for_the_test_change_nothing():
    one, other = (
        decisive("realm_finetune", qa={**QA, "test": name, "holdout": holdout})
        for name, holdout in (("a.jsonl", 0.3), ("b.jsonl", 0.1))
    )
    assert one == other


def test_each_task_has_its_sections():
    sections = {"qa": QA, "pretrain": {"depth": 1}, "ict": {"mask_rate": 0.9}}
    assert decisive("realm_pretrain", **sections).keys() == {
        *("task", "model", "init", "pretrain")
    }
    assert decisive("realm_ict", **sections).keys() == {"task", "model", "init", "ict"}
    assert decisive("retro", **sections).keys() == {"task", "model", "init"}


def test_a_run_of_before_there_was_a_start_goes_on():
    config = ml_collections.ConfigDict({"name": "a", "model": {"width": 4}})
    assert train.decisive(config) == {"model": {"width": 4}}


def test_a_resume_with_another_depth_is_refused(tmp_path):
    """The settings as the loop has them, for a whole config of question answering."""
    found = train.decisive(tiny_qa.config(tmp_path / "q.jsonl"))
    assert found["retrieval"] == {"depth": 1, "index": "exact"}
    assert found["qa"]["beam"] == 6
