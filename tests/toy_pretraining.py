"""A tokenizer of few words, a small corpus and a tiny REALM, from text to training.

As a program it pre-trains, slowly enough to be stopped in between:

  python tests/toy_pretraining.py CONFIG.py WORKDIR [seconds each step takes]
"""

import dataclasses
import functools
import json
import runpy
import string
import sys
import time

import jax
import ml_collections
import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, processors

from realm_retro import config as config_lib
from realm_retro.cli import prepare, realm_recipes, tag_spans
from realm_retro.parallel import hosts
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.realm.config import CLS_ID, MASK_ID, PAD_ID, SEP_ID
from realm_retro.train import loop
from realm_retro.train.config import TrainConfig
from realm_retro.train.metrics import FILE
from realm_retro.train.optim import OptimizerConfig

VOCAB_SIZE = 320
RIVERS = ("Amazon", "Danube", "Ganges", "Loire", "Mekong", "Niger", "Oder", "Volga")
COUNTRIES = ("Brazil", "Austria", "India", "France", "Laos", "Mali", "Poland", "Russia")
WORDS = ("the", "flows", "through", "in", "river", *RIVERS, *COUNTRIES)
CLOCK = ("tokens_per_second", "seconds_per_step")
# What decides the weights, besides the sections that every model has.
DECISIVE = ("task", "model", "init", "pretrain")


def save_tokenizer(folder, words=WORDS, *, size=VOCAB_SIZE):
    """Writes ``tokenizer.json``: `words` and letters, special ids as BERT has them."""
    special = {"[PAD]": PAD_ID, "[UNK]": 100, "[CLS]": CLS_ID, "[SEP]": SEP_ID}
    special["[MASK]"] = MASK_ID
    spelt = string.ascii_lowercase + string.digits
    pieces = [*(word.lower() for word in words), *spelt, *string.punctuation]
    pieces += [f"##{letter}" for letter in spelt]
    vocabulary = {piece: 104 + i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary |= special
    assert max(vocabulary.values()) < size
    found = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    found.add_special_tokens(list(special))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.BertProcessing(("[SEP]", SEP_ID), ("[CLS]", 101))
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_rivers(folder, documents=24, seed=0):
    """A tokenizer and a corpus whose documents share their facts."""
    rng = np.random.default_rng(seed)
    save_tokenizer(folder / "tokenizer")
    with (folder / "documents.jsonl").open("w") as file:
        for i in range(documents):
            which = rng.integers(len(RIVERS), size=4)
            years = rng.integers(1900, 2000, size=4)
            text = " ".join(
                f"The {RIVERS[w]} flows through {COUNTRIES[w]} in {year}."
                for w, year in zip(which, years, strict=True)
            )
            print(
                json.dumps({"id": str(i), "title": f"river {i}", "text": text}),
                file=file,
            )


def make_config(folder, **sections):
    """The config of a tiny pre-training over ``folder/documents.jsonl``."""
    config = {
        "name": "realm",
        "task": "realm_pretrain",
        "seed": 0,
        "corpus": {
            "source": "text_files",
            "path": str(folder / "documents.jsonl"),
            "id_field": "id",
        },
        "encoder": {"path": str(folder / "tokenizer")},
        "passages": {"length": 24, "title_length": 4, "validation_fraction": 0.0},
        "spans": {"tagger": "rules"},
        "init": {"bert": ""},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "width": 16,
            "num_layers": 1,
            "num_heads": 2,
            "hidden": 32,
            "max_positions": 48,
            "title_length": 4,
            "body_length": 24,
            "query_length": 16,
            "embed_dim": 8,
            "candidates": 4,
            "max_masks": 5,
            "dropout": 0.1,
        },
        "pretrain": {"depth": 1, "refresh": "inline"},
        "refresh": {"every": 3, "shard_rows": 16},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2},
        "train": {
            "steps": 8,
            "batch_size": 4,
            "log_every": 1,
            "checkpoint_every": 4,
        },
    }
    return changed(ml_collections.ConfigDict(config), **sections)


def changed(config, **sections):
    """A copy with other values: ``changed(config, name="b", train={"steps": 9})``."""
    values = config.to_dict()
    for name, value in sections.items():
        if isinstance(value, dict):
            value = {**values.get(name, {}), **value}
        values[name] = value
    return ml_collections.ConfigDict(values)


def prepared(config, workdir):
    """Runs the stages before the training; returns the workdir."""
    prepare.main(config, workdir)
    tag_spans.main(config, workdir)
    return workdir


def write_config(path, config):
    """A config file as the commands take it."""
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({config.to_dict()!r})\n"
    )
    return path


def train(
    config,
    workdir,
    *hooks,
    mesh=None,
    report=lambda line: None,
    change=lambda recipe: recipe,
):
    """What ``cli.train`` does, on one device, with further hooks or changes."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    recipe = realm_recipes.pretrain(config, workdir, mesh)
    return loop.train(
        change(dataclasses.replace(recipe, hooks=(*recipe.hooks, *hooks))),
        run_dir(config, workdir),
        config=config_lib.build(TrainConfig, config.train, name="config.train"),
        optimizer=config_lib.build(
            OptimizerConfig, config.optimizer, name="config.optimizer"
        ),
        mesh=mesh,
        seed=config.seed,
        settings={name: config.to_dict()[name] for name in DECISIVE},
        report=report,
    )


def quick(folder):
    """Environment of processes that compile fast rather than well, and once."""
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_dir(config, workdir):
    return workdir / "runs" / config.name


def records(config, workdir):
    """What was logged and does not depend on the clock, a dict for each record."""
    lines = (run_dir(config, workdir) / FILE).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in found]


def main(config_path, workdir, pause="0"):
    config = runpy.run_path(config_path)["get_config"]()
    hosts.initialise()
    mesh = config_lib.section(config, "mesh")
    outcome = train(
        config,
        epath.Path(workdir),
        lambda at: time.sleep(float(pause)),
        mesh=make_mesh(config_lib.build(MeshConfig, mesh, name="config.mesh")),
        report=functools.partial(print, flush=True),
    )
    print(f"ended after {outcome.step}", flush=True)
    return 0 if outcome.finished else 143


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
