"""Which stages a config has, and with which words each is started."""

import json
import pathlib
import sys

import ml_collections
import pytest

from realm_retro.cli import quickstart_stages
from realm_retro.cli.quickstart_stages import CommandLine
from realm_retro.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
REALM = f"--config={ROOT}/configs/realm/quickstart.py"


def realm(*flags):
    """Stages of REALM's half by name, and the command line that they come from."""
    line = CommandLine.of([REALM, "--workdir=w", *flags])
    return {stage.name: stage for stage in quickstart_stages.realm(line)}, line


def words(stages, line, name):
    python, _, module, *rest = line.words(stages[name].module, stages[name])
    assert python == sys.executable
    assert module == f"realm_retro.cli.{name.partition(':')[0]}"
    return rest


@pytest.mark.parametrize("style", [["--config=a.py:b"], ["--config", "a.py:b"]])
def test_the_config_is_taken_out_of_the_words(style):
    line = CommandLine.of(
        ["--workdir", "w", *style, "--config.x.y", "3", "--noconfig.z"]
    )
    assert (line.file, line.variant) == ("a.py", "b")
    values = [("--workdir", "w"), ("--config.x.y", "3"), ("--noconfig.z",)]
    assert list(line.others) == values


def test_questions_can_be_changed_after_pretraining():
    flags = ["--config.qa.questions", "q.jsonl", "--config.train.steps=7"]
    stages, line = realm(*flags)
    assert words(stages, line, "train")[2:] == ["--workdir=w", flags[2]]
    assert words(stages, line, "train:finetune")[1:] == ["--workdir=w", *flags]


def test_the_road_of_the_default_corpus():
    stages, line = realm("--config.train.steps=7")
    assert {name: stage.output for name, stage in stages.items()} == {
        "prepare": "passages/manifest.json",
        "tag_spans": "spans/manifest.json",
        "evaluate_qa:zero_shot": "runs/zero_shot/evaluation_qa.json",
        "train": "runs/realm/manifest.json",
        "train:finetune": "runs/qa/manifest.json",
        "evaluate_qa:finetune": "runs/qa/evaluation_qa.json",
        "ask:finetune": "runs/qa/answers.jsonl",
    }
    given = ["--workdir=w", "--config.train.steps=7"]
    workers = "--config.pretrain.refresh=workers"
    assert words(stages, line, "prepare") == [REALM, *given]
    assert words(stages, line, "train") == [REALM, workers, *given]
    assert words(stages, line, "train:finetune") == [f"{REALM}:finetune", *given]
    assert words(stages, line, "ask:finetune") == [
        f"{REALM}:finetune",
        "--json",
        *given,
    ]
    assert {s.companion for s in stages.values()} == {"", "refresh_index"}
    assert stages["train"].companion == "refresh_index"


def test_a_stage_sees_its_variant_and_the_callers_values():
    _, line = realm("--config.train.batch_size=2")
    config = line.load("finetune", ("--json", "--config.qa.read=3"))
    assert (config.name, config.train.batch_size, config.qa.read) == ("qa", 2, 3)


def test_without_workers_nothing_runs_beside_the_training():
    stages, line = realm("--config.pretrain.refresh=inline")
    assert stages["train"].companion == ""
    assert words(stages, line, "train")[-1] == "--config.pretrain.refresh=inline"


OWN_TEXT = ("--config.corpus.source=text_files", "--config.corpus.path=docs")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ((), True),
        (OWN_TEXT, False),
        ((*OWN_TEXT, "--config.qa.questions=q.jsonl"), True),
        (("--config.corpus.language=fr",), False),
    ],
)
def test_own_text_has_no_questions(flags, asked):
    stages, _ = realm(*flags)
    assert ("ask:finetune" in stages) == asked
    assert list(stages)[:2] == ["prepare", "tag_spans"]
    assert asked or list(stages)[2:] == ["train"]


def test_one_name_for_all_runs_is_refused():
    with pytest.raises(UserError, match=r"--config.name=qa would give all runs"):
        realm("--config.name=qa")


def test_retro_is_passed_on_as_it_is():
    config = ml_collections.ConfigDict({"name": "plain"})
    assert not quickstart_stages.is_realm(config)
    line = CommandLine.of(["--config=r.py:plain", "--workdir=w"])
    stages = {stage.name: stage for stage in quickstart_stages.retro(config)}
    assert next(iter(stages)) == "prepare"
    assert stages["train"].output == "runs/plain/manifest.json"
    assert words(stages, line, "train") == ["--config=r.py:plain", "--workdir=w"]


def test_the_surest_questions_are_asked(tmp_path):
    run = tmp_path / "runs" / "qa"
    run.mkdir(parents=True)
    records = [
        {"question": f"q{i}", "probability": p}
        for i, p in enumerate([0.1, 0.9, None, 0.3, 0.3])
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "predictions_qa.jsonl").write_text(text)
    stages, _ = realm()
    asked = stages["ask:finetune"].late(tmp_path)
    assert asked == ["--question=q1", "--question=q3", "--question=q4"]
