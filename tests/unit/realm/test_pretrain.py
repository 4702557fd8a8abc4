"""What pre-training says of itself, and which searches it refuses."""

import jax
import numpy as np
import pytest
import tiny_passages
from realm_examples import random_batch, random_realm, small_realm

from realm_retro.errors import UserError
from realm_retro.parallel.mesh import make_mesh
from realm_retro.realm import device_search, examples, model, pretrain
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.train.config import TrainConfig

CONFIG = small_realm()


@pytest.mark.parametrize("target", [0.0, -0.5, 1.01])
def test_a_recall_target_is_a_share(target):
    with pytest.raises(UserError, match=rf"recall_target={target} must be above 0"):
        PretrainConfig(recall_target=target)


def test_the_recall_target_of_the_devices_is_told(tmp_path):
    store = tiny_passages.write_passages(
        tmp_path / "passages",
        tiny_passages.documents(["one two three"] * 4),
        tokenizer_json=tiny_passages.save_tokenizer(tmp_path / "tokenizer"),
        length=7,
        validation_fraction=0.0,
    )
    made = examples.make(store, None, CONFIG, masking="span", seed=0, batch_size=2)
    mesh = make_mesh(devices=jax.devices()[:1])

    def said(**changes):
        settings = PretrainConfig(masking="span", **changes)
        return pretrain._description(CONFIG, settings, made, TrainConfig(3), mesh)

    found = said(placement="device", recall_target=0.9)
    assert found.endswith("1 device that search with a recall target of 0.9")
    assert "recall" not in said()


def test_the_share_of_lost_targets_is_a_metric():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = random_batch(CONFIG, rows=2)
    notes = dict.fromkeys(pretrain._NOTES, np.ones(2, np.float32))
    counts = {"wanted_targets": [6.0, 2.0], "lost_targets": [1.0, 0.0]}
    counts = {name: np.array(x, np.float32) for name, x in counts.items()}
    batch = {**batch, **notes, **counts}
    assert batch.keys() == pretrain.BATCH_SPEC.keys()
    assert counts.keys() <= device_search.BATCH_SPEC.keys()
    params = random_realm(CONFIG, model.PRETRAINING)
    loss = jax.jit(pretrain.loss_fn(CONFIG, mesh))
    _, _, metrics = loss(params, batch, jax.random.key(0))
    assert tuple(map(float, metrics["lost_targets"])) == (1, 8)
