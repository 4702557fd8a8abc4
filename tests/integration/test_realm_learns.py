"""Retrieval is learned from masked words alone, and a stale index slows it down."""

import os
import subprocess
import sys

import numpy as np
import pytest
import toy_facts
import toy_pretraining as toy
from etils import epath

from realm_retro.cli import towers
from realm_retro.data.chunk_store import DATABASE

pytestmark = pytest.mark.slow

STALER = 30  # times as many steps between two refreshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    toy_facts.write(folder)
    return folder


@pytest.fixture(scope="module")
def workdir(folder):
    config = toy_facts.make_config(folder)
    workdir = toy.prepared(config, epath.Path(folder / "work"))
    toy_facts.learn_to_read(config, folder, workdir)
    return workdir


def train(config, folder, workdir):
    """Trains by the command, as fast as two cores can: on one device."""
    path = toy.write_config(folder / f"{config.name}.py", config)
    command = [sys.executable, "-m", "realm_retro.cli.train"]
    done = subprocess.run(
        [*command, f"--config={path}", f"--workdir={workdir}"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return towers.run_params(config, workdir, config.name)


@pytest.fixture(scope="module")
def before(folder, workdir):
    """The weights that trainings start from."""
    return towers.start_params(toy_facts.make_config(folder), workdir)


@pytest.fixture(scope="module")
def fresh(folder, workdir):
    """A training whose index is refreshed often: config and weights."""
    config = toy_facts.make_config(folder, name="fresh")
    return config, train(config, folder, workdir)


@pytest.fixture(scope="module")
def stale(folder, workdir, fresh):
    every = STALER * fresh[0].refresh.every
    config = toy_facts.make_config(folder, name="stale", refresh={"every": every})
    return config, train(config, folder, workdir)


def test_what_is_asked_and_what_is_found(folder, workdir):
    store = towers.open_store(toy_facts.make_config(folder), workdir)
    people = len(toy_facts.FIRST) * len(toy_facts.LAST)
    assert len(store) == 2 * (people + len(toy_facts.THINGS)), "a passage a document"
    assert not len(store.passages_of(DATABASE)), "each passage is asked from"
    assert set(store.lengths.tolist()) == {5}, "a wordpiece each word"


def test_the_encoder_reads_and_knows_no_fact(workdir, before, fresh):
    config, _ = fresh
    for split in (toy_facts.TRAIN, toy_facts.VALIDATION):
        asked = toy_facts.evaluate(config, workdir, before, split=split)
        assert asked.null_mlm > 0.8 * np.log(len(toy_facts.LIKES))
    things = toy_facts.evaluate(config, workdir, before, things=True)
    assert things.null_mlm < 0.5


def test_masked_words_alone_teach_to_retrieve(workdir, before, fresh):
    config, params = fresh
    first = toy_facts.evaluate(config, workdir, before)
    after = toy_facts.evaluate(config, workdir, params)
    # Of people that no training sentence was about.
    assert first.recall < 3 * first.chance
    assert after.recall > 0.8
    assert after.gain > 1.0, "what is retrieved is of use"


def test_null_mass_tells_which_masks_need_a_document(workdir, before, fresh):
    config, params = fresh
    facts_before = toy_facts.evaluate(config, workdir, before)
    facts = toy_facts.evaluate(config, workdir, params)
    things_before = toy_facts.evaluate(config, workdir, before, things=True)
    things = toy_facts.evaluate(config, workdir, params, things=True)
    assert facts.null < 0.5 * facts_before.null
    assert things.null >= things_before.null
    assert things.null > 10 * facts.null
    assert abs(things.gain) < 0.1


def test_a_staler_index_learns_slower(workdir, fresh, stale):
    gains = [
        np.mean([record["gain"] for record in toy.records(config, workdir)])
        for config, _ in (fresh, stale)
    ]
    assert gains[1] < 0.75 * gains[0]
    recalls = [
        toy_facts.evaluate(config, workdir, params).recall
        for config, params in (fresh, stale)
    ]
    assert recalls[1] < recalls[0]
    staleness = [
        toy.records(config, workdir)[-1]["staleness"] for config, _ in (fresh, stale)
    ]
    assert staleness[1] > 10 * staleness[0]
