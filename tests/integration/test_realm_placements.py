"""Searching on the host and inside the step: the same candidates, the same losses."""

import json

import ml_collections
import numpy as np
import pytest
from etils import epath

from realm_retro.cli import prepare, tag_spans, train

pytestmark = pytest.mark.slow  # four trainings on eight devices

NAMES = ("Alder", "Birch", "Cedar", "Dahlia", "Ember", "Fern", "Hazel", "Iris")
PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul", "Perth")


def write_corpus(path):
    rng, previous = np.random.default_rng(0), ""
    with path.open("w") as file:
        for i in range(48):
            name, place = NAMES[i % 8], PLACES[rng.integers(8)]
            text = f"The sailor {name} Finch came to {place} in {1900 + i} by ship."
            if i % 6 == 5:  # a copy in another document
                text = previous
            previous = text
            record = {"id": f"d{i}", "title": f"{name} {i}", "text": text}
            file.write(json.dumps(record) + "\n")


def make_config(corpus, name, **pretrain):
    return ml_collections.ConfigDict(
        {
            "name": name,
            "task": "realm_pretrain",
            "seed": 0,
            "corpus": {
                "source": "text_files",
                "path": str(corpus),
                "id_field": "id",
            },
            "passages": {
                "length": 24,
                "title_length": 6,
                "validation_fraction": 0.0,
            },
            "spans": {"tagger": "rules"},
            "init": {"bert": ""},
            "model": {
                "width": 16,
                "num_layers": 1,
                "num_heads": 2,
                "hidden": 32,
                "embed_dim": 8,
                "title_length": 6,
                "body_length": 24,
                "query_length": 20,
                "candidates": 4,
                "max_masks": 4,
            },
            "pretrain": {
                "depth": 0,
                "refresh": "never",
                "index": "exact",
                "extra": 6,
                **pretrain,
            },
            "refresh": {"shard_rows": 16},
            "optimizer": {"peak_learning_rate": 1e-3, "warmup_steps": 1},
            "train": {
                "steps": 6,
                "batch_size": 8,
                "log_every": 1,
                "checkpoint_every": 6,
            },
        }
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("placements"))
    write_corpus(folder / "docs.jsonl")
    config = make_config(folder / "docs.jsonl", "any")
    prepare.main(config, folder)
    tag_spans.main(config, folder)
    return folder


def metrics(workdir, name, *, mesh=None, every=500, **pretrain):
    config = make_config(workdir / "docs.jsonl", name, **pretrain)
    config.mesh = mesh or {"data": 8}
    config.refresh.every = every
    train.main(config, workdir)
    lines = (workdir / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def host(workdir):
    return metrics(workdir, "host")


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_both_placements_give_the_same_losses(workdir, host, mesh):
    device = metrics(workdir, f"device{len(mesh)}", mesh=mesh, placement="device")
    for there, here in zip(host, device, strict=True):
        assert there["step"] == here["step"]
        for what in ("loss", "own_hits", "copies", "retrieved", "null_posterior"):
            assert here[what] == pytest.approx(there[what], abs=1e-5), what
    assert sum(record["own_hits"] for record in host) > 0
    assert sum(record["copies"] for record in host) > 0


def test_a_refresh_reaches_the_search_on_the_devices(workdir):
    records = metrics(
        workdir, "refreshed", every=2, placement="device", refresh="inline"
    )
    assert [record["index_step"] for record in records] == [0, 0, 2, 2, 4, 4]
    assert [record["staleness"] for record in records] == [0, 1, 0, 1, 0, 1]
