"""Question answering end to end on eight facts: what is learnt, kept, and resumed."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_qa
from absl import flags
from absl.testing import flagsaver
from etils import epath

from realm_retro.cli import ask, evaluate_qa, qa_setup, train
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import model
from realm_retro.train import checkpoint, loop
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import FILE as METRICS
from realm_retro.train.optim import OptimizerConfig

ROAD = pathlib.Path(__file__).parents[1] / "qa_road.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("qa")
    tiny_qa.write_passages(workdir)
    tiny_qa.write_questions(workdir / "q.jsonl")
    return workdir


@pytest.fixture
def workdir(prepared, tmp_path):
    (tmp_path / "passages").symlink_to(prepared / "passages")
    (tmp_path / "q.jsonl").symlink_to(prepared / "q.jsonl")
    return epath.Path(tmp_path)


def config_of(workdir, **changes):
    return tiny_qa.config(
        workdir / "q.jsonl", **{"train__steps": 3, "train__log_every": 1, **changes}
    )


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, other):
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def fit(config, workdir, *, name="qa", hooks=()):
    """Trains on one device: eight simulated ones on few cores are slow."""
    mesh = make_mesh(devices=jax.devices()[:1])
    recipe = qa_setup.recipe(config, workdir, mesh)
    loop.train(
        dataclasses.replace(recipe, hooks=hooks),
        workdir / "runs" / name,
        config=TrainConfig(**config.train),
        optimizer=OptimizerConfig(**config.optimizer),
        mesh=mesh,
        report=lambda line: None,
    )
    init = recipe.init
    return checkpoint.restore_params(workdir / "runs" / name, init, mesh)


def evaluate(config, workdir):
    evaluate_qa.main(config, workdir)
    run_dir = workdir / "runs" / config.name
    return json.loads((run_dir / evaluate_qa.REPORT).read_text())


def start_of(config, workdir):
    return qa_setup.start_weights(config, workdir, model.FINETUNING).params


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A workdir after `qa_road`, and what it said."""
    workdir = tmp_path_factory.mktemp("road")
    done = subprocess.run(
        [sys.executable, str(ROAD), str(workdir)],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",
            # Toys take longer to compile than to run.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_before_training_retrievers_are_measured(road):
    workdir, _ = road
    before = json.loads((workdir / "before.json").read_text())
    assert before["step"] is None
    assert before["results"][0]["label"] == "zero-shot"
    assert "exact_match" not in before["results"][0]
    assert (before["questions"], before["answerable"], before["passages"]) == (9, 8, 8)


def test_the_facts_are_learnt(road):
    workdir, said = road
    assert "8 questions, 1 that no passage answers left out" in said
    lines = (workdir / "runs" / "qa" / METRICS).read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert last["loss"] < first["loss"] / 2
    assert last["span_match"] > 0.8
    assert last["beam"] == 6

    after = json.loads((workdir / "after.json").read_text())
    before = json.loads((workdir / "before.json").read_text())
    trained, start, *lexical = after["results"]
    assert (trained["label"], start["label"]) == ("qa", "zero-shot")
    assert start["recall"] == before["results"][0]["recall"]
    for row in lexical:  # where the package is installed
        assert row["label"] == "BM25"
        assert row["recall"]["1"]["value"] == pytest.approx(8 / 9)
    assert lexical or "BM25 is left out" in said
    assert trained["recall"]["3"]["value"] == pytest.approx(8 / 9)
    assert trained["recall"]["1"]["value"] > start["recall"]["1"]["value"] + 0.3
    assert trained["exact_match"]["questions"] == 8
    assert trained["exact_match"]["value"] > 0.7
    assert trained["regex_match"]["questions"] == 1
    assert set(trained["seconds_per_question"]) == set(
        "tokenise embed search gather read".split()  # noqa: SIM905
    )


def test_predictions_carry_their_evidence(road):
    workdir, _ = road
    path = workdir / "runs" / "qa" / evaluate_qa.PREDICTIONS
    predictions = [json.loads(line) for line in path.read_text().splitlines()]
    assert [p["id"] for p in predictions] == [*tiny_qa.PEOPLE, "none"]
    assert not predictions[-1]["correct"]
    right = [p for p in predictions if p["correct"]]
    assert len(right) > 5
    for prediction in right:
        person = tiny_qa.PEOPLE.index(prediction["id"])
        place = tiny_qa.PLACES[person].title()
        assert prediction["prediction"] == place
        [evidence] = [p for p in prediction["passages"] if p["has_answer"]]
        assert evidence["row"] == person
        assert evidence["title"] == prediction["id"].title()
        start, end = evidence["span"]
        assert evidence["text"][start:end] == place


def test_answers_are_shown_with_their_evidence(road):
    _, said = road
    shown, as_json = said.split("ask:\n")[1].split("ask --json:\n")
    riva, sumo = map(json.loads, as_json.splitlines())
    assert (riva["question"], sumo["question"]) == ("born riva", "born sumo")
    for answer in (riva, sumo):
        assert f"Answer:   {answer['text']}   (p = " in shown
        assert 0 < answer["probability"] <= 1
        masses = [p["probability"] for p in answer["passages"]]
        assert sum(masses) + answer["null_mass"] == pytest.approx(1)
    assert "null document: p(z|x) = " in shown
    assert "[[" in shown
    assert "time in ms: tokenise " in shown


@pytest.mark.slow
def test_the_document_tower_stays_and_one_index_serves_all(workdir):
    """With the command itself, on eight devices."""
    config = config_of(workdir)
    train.main(config, workdir)
    trained = qa_setup.trained_weights(config, workdir)
    assert trained is not None
    start = start_of(config, workdir)
    assert same(trained.params["document"], start["document"])
    for part in ("query", "reader"):
        assert not same(trained.params[part], start[part]), part
    report = evaluate(config, workdir)
    assert [row["label"] for row in report["results"]] == ["qa", "zero-shot"]
    assert report["results"][0]["exact_match"] is not None
    assert len(list((workdir / "indexes").iterdir())) == 1


@pytest.mark.slow
def test_training_the_documents_makes_another_index(workdir):
    config = config_of(workdir, qa__train_documents=True)
    trained, _ = fit(config, workdir)
    assert not same(trained["document"], start_of(config, workdir)["document"])
    found = qa_setup.trained_weights(config, workdir)
    assert found is not None
    qa_setup.open_index(config, workdir, found, 3)
    assert len(list((workdir / "indexes").iterdir())) == 2


@pytest.mark.slow
def test_tied_towers_part(workdir):
    config = config_of(workdir, model__tied=True)
    trained, _ = fit(config, workdir)
    start = start_of(config, workdir)
    assert same(trained["document"], start["query"])
    assert not same(trained["query"], start["query"])
    found = qa_setup.trained_weights(config, workdir)
    assert found is not None
    assert not found.model.tied
    # The index of the start, not a second one, is that of the run.
    assert qa_setup.index_folder(workdir, found).exists()
    assert len(list((workdir / "indexes").iterdir())) == 1


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(workdir):
    config = config_of(workdir, train__steps=4, train__checkpoint_every=2)

    def stop(state):
        if state.step == 3:
            raise KeyboardInterrupt

    whole = fit(config, workdir, name="whole")
    with pytest.raises(KeyboardInterrupt):
        fit(config, workdir, name="cut", hooks=(stop,))
    cut = fit(config, workdir, name="cut")
    assert whole[1] == cut[1] == 4
    assert same(whole[0], cut[0])


def test_before_there_is_a_run_passages_are_found(workdir, capsys):
    with flagsaver.flagsaver():
        flags.FLAGS["question"].value = ["born riva"]
        ask.answer_all(config_of(workdir), workdir, as_json=True)
    shown = capsys.readouterr()
    assert "there is no run 'qa'" in shown.err
    [line] = shown.out.splitlines()
    found = json.loads(line)
    assert found["text"] is None
    assert len(found["passages"]) == 3
    assert found["null_mass"] > 0


def test_bad_questions_are_one_line(workdir):
    (workdir / "bad.jsonl").write_text('{"question": "who"}\n')
    config = config_of(workdir, qa__questions=str(workdir / "bad.jsonl"))
    for command in (train.main, evaluate_qa.main):
        with pytest.raises(UserError, match=r"bad\.jsonl:1: has no answers"):
            command(config, workdir)
    config = config_of(workdir, qa__holdout=0.0)
    with pytest.raises(UserError, match="holds out no question"):
        evaluate_qa.main(config, workdir)
