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
from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION

pytestmark = pytest.mark.slow

STALER = 30  # times as many steps between two refreshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    toy_facts.write(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return toy_facts.make_config(folder, name="fresh")


@pytest.fixture(scope="module")
def workdir(config, folder):
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
def before(config, workdir):
    """The weights that trainings start from."""
    return towers.start_params(config, workdir)


@pytest.fixture(scope="module")
def fresh(config, folder, workdir):
    """Weights of a training whose index is refreshed often."""
    return train(config, folder, workdir)


@pytest.fixture(scope="module")
def stale_config(config):
    every = STALER * config.refresh.every
    return toy.changed(config, name="stale", refresh={"every": every})


@pytest.fixture(scope="module")
def stale(stale_config, folder, workdir):
    return train(stale_config, folder, workdir)


def test_what_is_asked_and_what_is_found(folder, workdir):
    store = towers.open_store(toy_facts.make_config(folder), workdir)
    of_things = toy_facts.COPIES * len(toy_facts.THINGS)
    assert len(store) == 3 * len(toy_facts.NAMES) + of_things
    assert not len(store.passages_of(DATABASE)), "each passage is asked from"
    lengths = np.bincount(store.lengths[:])
    # A wordpiece each word, and no sentence shares its passage.
    assert lengths[toy_facts.LENGTH] == 3 * len(toy_facts.NAMES)
    assert lengths[toy_facts.LENGTH - 4] == of_things


def test_the_encoder_reads_and_knows_no_fact(config, workdir, before):
    for split in (TRAIN, VALIDATION):
        asked = toy_facts.evaluate(config, workdir, before, split=split)
        assert asked.null_mlm > 0.9 * np.log(len(toy_facts.LIKES))
    things = toy_facts.evaluate(config, workdir, before, things=True, split=TRAIN)
    assert things.null_mlm < 0.5


def test_masked_words_alone_teach_to_retrieve(config, workdir, before, fresh):
    first = toy_facts.evaluate(config, workdir, before)
    after = toy_facts.evaluate(config, workdir, fresh)
    # With sentences that nothing was asked from.
    assert first.recall < 4 * first.chance
    assert after.recall > 0.8
    assert after.gain > 1.0, "what is retrieved is of use"


def test_null_mass_tells_which_masks_need_a_document(config, workdir, before, fresh):
    def null(params, **which):
        return toy_facts.evaluate(config, workdir, params, **which).null

    things = {"things": True, "split": TRAIN}
    assert null(fresh) < 0.7 * null(before)
    assert null(fresh, **things) > null(before, **things)
    assert null(fresh, **things) > 4 * null(fresh)


def test_a_staler_index_learns_slower(config, stale_config, workdir, fresh, stale):
    often, seldom = (toy.records(c, workdir) for c in (config, stale_config))
    gains = [np.mean([record["gain"] for record in log]) for log in (often, seldom)]
    assert gains[1] < 0.75 * gains[0]
    assert often[-1]["staleness"] < 20 < 100 < seldom[-1]["staleness"]
    recalls = [
        toy_facts.evaluate(config, workdir, params).recall for params in (fresh, stale)
    ]
    assert recalls[1] < recalls[0]
