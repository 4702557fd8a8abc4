"""The quickstart's REALM half on a few facts, as a user starts it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RIVERS = ("Amazon", "Danube", "Ganges", "Loire", "Mekong", "Niger", "Oder", "Volga")
COUNTRIES = ("Brazil", "Austria", "India", "France", "Laos", "Mali", "Poland", "Russia")

# Random towers that are small enough to train in seconds.
TINY = {
    "init.bert": "",
    "model.width": 32,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.hidden": 64,
    "model.body_length": 24,
    "passages.length": 24,
    "refresh.every": 3,
    "refresh.max_staleness": 4,
    "refresh.shard_rows": 8,
    "train.steps": 9,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "qa.read": 2,
}


def write_facts(folder):
    folder.mkdir()
    facts = list(zip(RIVERS, COUNTRIES, strict=True))
    documents = [
        {
            "id": f"{river}-{i}",
            "title": river,
            "text": f"The {river} is a river of {country}. Measured in {1900 + i}.",
        }
        for river, country in facts
        for i in range(3)
    ]
    questions = [
        {"id": river, "question": f"Where does the {river} flow?", "answers": [country]}
        for river, country in facts
    ]
    for name, records in (("docs", documents), ("questions", questions)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)


def quickstart(folder, *flags):
    values = {
        "corpus.source": "text_files",
        "corpus.path": folder / "docs.jsonl",
        "corpus.id_field": "id",
        **TINY,
    }
    words = [f"--config.{name}={value}" for name, value in values.items()]
    command = [sys.executable, "-m", "realm_retro.cli.quickstart"]
    config = f"--config={ROOT}/configs/realm/quickstart.py"
    return subprocess.run(
        [*command, config, f"--workdir={folder / 'work'}", *words, *flags],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_from_text_to_answers_and_again(tmp_path):
    folder = tmp_path / "facts"
    write_facts(folder)

    first = quickstart(folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[3/3] train, beside it refresh_index" in first.stdout
    assert "--config.qa.questions=FILE.jsonl" in first.stdout
    searched = {
        x["index_step"] for x in records(folder / "work/runs/realm/metrics.jsonl")
    }
    assert searched >= {0.0, 3.0}

    asked = f"--config.qa.questions={folder / 'questions.jsonl'}"
    second = quickstart(folder, asked, "--config.qa.holdout=0.5")
    assert second.returncode == 0, second.stdout + second.stderr
    for label in ("before training", "pre-trained", "fine-tuned"):
        assert f"\n{label}" in second.stdout
    given = records(folder / "work/runs/qa/answers.jsonl")
    assert 1 <= len(given) <= 3
    for answer in given:
        assert answer["question"] in second.stdout
        assert len(answer["passages"]) == 2
    assert "  beside it refresh_index" in second.stdout

    third = quickstart(folder, asked, "--config.qa.holdout=0.5")
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("finished before") == 7
    # The same page: nothing was measured anew.
    page = second.stdout[second.stdout.index("Pre-training:") :]
    assert third.stdout.endswith(page)
