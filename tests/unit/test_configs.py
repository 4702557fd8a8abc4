"""Every file in configs/ is loaded, and its model's shapes are worked out."""

import ast
import importlib.util
import inspect
import math
import pathlib
import re

import jax
import ml_collections
import pytest

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.cli.build_index import IndexConfig
from realm_retro.cli.encoders import EncoderConfig
from realm_retro.cli.plan_task import PlanConfig
from realm_retro.cli.towers import InitConfig
from realm_retro.data.chunk_writer import ChunksConfig
from realm_retro.data.corpus import CorpusConfig
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.data.passages import PassageConfig
from realm_retro.data.span_store import SpansConfig
from realm_retro.parallel.mesh import MeshConfig
from realm_retro.realm import model
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.ict_recipe import IctConfig
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig
from realm_retro.retrieval.embed import EmbedConfig
from realm_retro.retrieval.neighbours import NeighboursConfig
from realm_retro.retrieval.refresh import RefreshConfig
from realm_retro.retro import recipe
from realm_retro.retro.config import RetroConfig
from realm_retro.retro.evaluate import EvaluateConfig
from realm_retro.retro.generate import GenerateConfig
from realm_retro.retro.retrofit import InitConfig as RetroInitConfig
from realm_retro.text.tokenizer import TokenizerConfig
from realm_retro.train.config import TrainConfig
from realm_retro.train.optim import OptimizerConfig

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
SHARED = {
    "corpus": CorpusConfig,
    "dedupe": DedupeConfig,
    "encoder": EncoderConfig,
    "embed": EmbedConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
    "plan": PlanConfig,
}
RETRO = {
    **SHARED,
    "tokenizer": TokenizerConfig,
    "chunks": ChunksConfig,
    "index": IndexConfig,
    "neighbours": NeighboursConfig,
    "model": RetroConfig,
    "init": RetroInitConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
}
REALM = {
    **SHARED,
    "passages": PassageConfig,
    "spans": SpansConfig,
    "init": InitConfig,
    "model": RealmConfig,
    "pretrain": PretrainConfig,
    "ict": IctConfig,
    "qa": QaConfig,
    "retrieval": RetrievalConfig,
    "refresh": RefreshConfig,
}
REALM_PARTS = {
    "realm_pretrain": model.PRETRAINING,
    "realm_ict": model.TOWERS,
    "realm_finetune": model.FINETUNING,
}


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(path):
    return str(path.relative_to(ROOT))


def variants():
    """(path, arguments of get_config): ``file.py`` and its variants, if it has any."""
    for path in FILES:
        yield pytest.param(path, (), id=name(path))
        realm = "task" in module_of(path).get_config()
        words = ("ict", "finetune", "zero_shot") if realm else ("plain", "retrofit")
        if inspect.signature(module_of(path).get_config).parameters:
            for word in words:
                yield pytest.param(path, (word,), id=f"{name(path)}:{word}")


VARIANTS = list(variants())


def load(path, arguments):
    return module_of(path).get_config(*arguments)


def test_there_are_configs():
    assert "configs/retro/quickstart.py" in map(name, FILES)


@pytest.mark.parametrize(("path", "arguments"), VARIANTS)
def test_it_is_plain_and_the_same_each_time(path, arguments):
    config = load(path, arguments)
    assert isinstance(config, ml_collections.ConfigDict)
    values = config_lib.as_dict(config)
    again = config_lib.as_dict(load(path, arguments))
    assert artifacts.fingerprint_of(values) == artifacts.fingerprint_of(again)
    assert isinstance(config.name, str)
    assert isinstance(config.seed, int)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_its_docstring_carries_command_cost_and_expected_result(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc is not None
    for word in ("Command:", "Cost", "Expected|result"):
        assert re.search(word, doc), word


def abstract_params(config):
    """Shapes of all parameters that a run of the config has."""
    if "task" not in config:
        return recipe.abstract_params(config)
    realm = config_lib.build(RealmConfig, config.model, name="config.model")
    parts = REALM_PARTS[config.task]
    return jax.eval_shape(lambda: model.init(realm, jax.random.key(0), parts))


@pytest.mark.parametrize(("path", "arguments"), VARIANTS)
def test_the_models_shapes_fit(path, arguments):
    config = load(path, arguments)
    if "model" not in config:
        pytest.skip("settings of a corpus alone")
    leaves = jax.tree.leaves(abstract_params(config))
    assert leaves, "a model without parameters"
    # Shapes alone: nothing may be allocated, whatever the size.
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert all(math.prod(leaf.shape) > 0 for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


@pytest.mark.parametrize(("path", "arguments"), VARIANTS)
def test_every_section_is_one_that_its_stage_reads(path, arguments):
    config = load(path, arguments)
    sections = REALM if "task" in config else RETRO
    for section in set(sections) & set(config):
        config_lib.build(sections[section], config[section], name=f"config.{section}")
    unknown = set(config) - set(sections) - {"name", "seed", "task"}
    assert not unknown, "nobody reads these"
