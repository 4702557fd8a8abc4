"""From a config and a workdir to a recipe of REALM: warm start, pre-training, QA."""

from __future__ import annotations

from typing import TypeVar

from etils import epath
from jax.sharding import Mesh

from realm_retro import config as config_lib
from realm_retro.cli import common, refresh_index, towers
from realm_retro.data.passages import PassageStore
from realm_retro.data.span_store import SpanStore
from realm_retro.errors import UserError
from realm_retro.parallel import hosts
from realm_retro.realm import examples, model
from realm_retro.realm import ict_recipe as ict_lib
from realm_retro.realm import pretrain as pretrain_lib
from realm_retro.realm.live_index import LiveIndex
from realm_retro.realm.pretrain import PretrainConfig
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Recipe
from realm_retro.typing import Config

T = TypeVar("T")


def pretrain(config: Config, workdir: epath.Path, mesh: Mesh) -> Recipe:
    """Masked queries over ``WORKDIR/passages``; the index in ``WORKDIR/refresh/NAME``.

    Raises:
      UserError: an artefact is missing or does not fit the config.
    """
    towers.check_start(config, workdir)
    realm = towers.model_config(config)
    settings = _build(config, "pretrain", PretrainConfig)
    train = _build(config, "train", TrainConfig)
    store = towers.open_store(config, workdir)
    spans = None
    if settings.masking == "salient":
        spans = SpanStore.open(
            workdir / "spans", parents={"passages": store.fingerprint}
        )
    return pretrain_lib.make(
        realm,
        settings,
        train,
        store=store,
        examples=examples.make(
            store,
            spans,
            realm,
            masking=settings.masking,
            seed=config.seed,
            batch_size=train.batch_size,
        ),
        index=_live_index(config, workdir, mesh, store, settings, train),
        mesh=mesh,
        weights=lambda: towers.start_params(config, workdir, model.PRETRAINING),
    )


def _live_index(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    store: PassageStore,
    settings: PretrainConfig,
    train: TrainConfig,
) -> LiveIndex:
    realm, refreshing = towers.model_config(config), refresh_index.settings(config)
    say = hosts.main_only(common.say)
    on_host = settings.placement == "host"
    if refreshing.target_overlap and not on_host:
        raise UserError(
            f"config.refresh.target_overlap={refreshing.target_overlap} needs the query"
            " vectors of config.pretrain.placement=host; with placement=device set it"
            " to 0 and choose config.refresh.every"
        )
    return LiveIndex(
        refresh_index.folder(config, workdir),
        config=realm,
        settings=refreshing,
        mode=settings.refresh,
        target=refresh_index.target(config, store),
        make_embedder=towers.passage_embedder(config, workdir),
        build=pretrain_lib.index_builder(
            realm, settings, mesh, say, batch_size=train.batch_size
        ),
        depth=settings.depth if on_host else 0,
        keep_checkpoints=train.keep,
        report=say,
    )


def ict(config: Config, workdir: epath.Path, mesh: Mesh) -> Recipe:
    """The inverse cloze task over ``WORKDIR/passages``: a warm start of both towers.

    Raises:
      UserError: the passages are missing or do not fit the config.
    """
    towers.check_start(config, workdir)
    realm = towers.model_config(config)
    return ict_lib.make(
        realm,
        _build(config, "ict", ict_lib.IctConfig),
        _build(config, "train", TrainConfig),
        store=towers.open_store(config, workdir),
        seed=config.seed,
        mesh=mesh,
        weights=lambda: towers.start_params(config, workdir, model.TOWERS),
    )


def finetune(config: Config, workdir: epath.Path, mesh: Mesh) -> Recipe:
    """Question answering over ``WORKDIR/passages``, as ORQA is fine-tuned.

    Raises:
      UserError: an artefact or a question file is missing or does not fit the config.
    """
    from realm_retro.cli import qa_setup

    return qa_setup.recipe(config, workdir, mesh)


def _build(config: Config, name: str, cls: type[T]) -> T:
    section = config_lib.section(config, name)
    return config_lib.build(cls, section, name=f"config.{name}")
