"""Fine-tuning for open-domain questions (section 4.2; Lee et al. 2019, section 5).

Retrieval is in the loop: the query tower moves, so a batch's beam is searched with
current weights (`Live`). The document index stays as it was at the start. The document
tower is frozen (query-side fine-tuning, as published) or, with
``config.qa.train_documents``, trained on the passages that are read; then the rest of
the beam keeps the vectors of the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from realm_retro import artifacts
from realm_retro import config as config_lib
from realm_retro.arrays import ShardedArray
from realm_retro.data import loader
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.passages import PassageStore
from realm_retro.data.questions import Question
from realm_retro.parallel import axes, hosts
from realm_retro.parallel import mesh as meshes
from realm_retro.realm import model, qa, search
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.question_batches import Examples, check_fits
from realm_retro.realm.question_sets import QaConfig, RetrievalConfig
from realm_retro.retrieval.index.base import Index
from realm_retro.train.config import TrainConfig
from realm_retro.train.recipe import Live, LossFn, Recipe, no_batches
from realm_retro.typing import Array, Batch, Config, HostArray, JsonDict, PyTree

T = TypeVar("T")


def make(
    config: Config,
    store: PassageStore,
    questions: Sequence[Question],
    answer_store: AnswerStore,
    vectors: ShardedArray | HostArray,
    index: Index,
    mesh: Mesh,
    weights: Callable[[], PyTree] | None,
    *,
    parents: Sequence[str] = (),
) -> Recipe:
    """The recipe of fine-tuning.

    Args:
      config: sections ``model``, ``train``, ``qa`` and ``retrieval``, and ``seed``.
      store: the passages.
      questions: to train on.
      answer_store: of these questions, in this order, over these passages.
      vectors: float [N, d] of all passages by the document tower of `weights`.
      index: over `vectors`; ids are rows.
      mesh: the devices that train.
      weights: parameters to start from, parts `model.FINETUNING` (with tied towers
        ``document`` may be missing); None for random ones.
      parents: fingerprints of whatever else the batches depend on.

    Raises:
      UserError: questions, passages, vectors and config do not fit together.
    """
    settings = config_lib.read(config, "qa", QaConfig)
    depth = config_lib.read(config, "retrieval", RetrievalConfig).depth
    train = config_lib.read(config, "train", TrainConfig)
    sizes = model_for(config_lib.read(config, "model", RealmConfig), settings)
    check_fits(sizes, store, vectors.shape)
    examples = Examples(sizes, settings, store, questions, answer_store, vectors)
    order = loader.batches(examples, seed=config.seed, batch_size=train.batch_size)

    def asked(step: int) -> dict[str, HostArray]:
        chosen = [questions[row] for row in order[step]["question"]]
        return {
            "id": np.asarray([one.id for one in chosen]),
            "question": np.asarray([one.question for one in chosen]),
        }

    return dataclasses.replace(
        outline(sizes, settings, train, mesh, gold=examples.names_gold),
        description=_description(sizes, examples, train, mesh),
        batch_at=_live(sizes, depth, examples, index, order),
        fingerprint=artifacts.fingerprint_of(
            [store.fingerprint, answer_store.fingerprint, *parents]
        ),
        weights=weights and (lambda: with_document(sizes, weights())),
        examples=asked,
    )


def outline(
    config: RealmConfig,
    settings: QaConfig,
    train: TrainConfig,
    mesh: Mesh,
    *,
    gold: bool = False,
) -> Recipe:
    """The recipe without data: all that a train step is compiled from.

    Args:
      config: from `model_for`.
      settings: the beam and what is read.
      train: steps and batch size.
      mesh: the devices that train.
      gold: see `loss_fn`.
    """
    tokens = config.query_tokens + settings.read * config.joint_tokens
    return Recipe(
        description="question answering",
        init=lambda key: model.init(config, key, model.FINETUNING),
        loss=loss_fn(config, settings, mesh, gold=gold),
        batch_at=no_batches,
        batch_spec=batch_spec(settings),
        tokens_per_step=train.batch_size * tokens,
        flops_per_step=flops(config, settings, train.batch_size),
        fingerprint="",
        trainable=functools.partial(trainable, settings=settings),
    )


def model_for(config: RealmConfig, settings: QaConfig) -> RealmConfig:
    """The model as it is fine-tuned: tied towers part where only one is trained.

    Else the document tower would follow the query tower away from the frozen index.
    """
    if config.tied and not settings.train_documents:
        return dataclasses.replace(config, tied=False)
    return config


def with_document(config: RealmConfig, params: PyTree) -> PyTree:
    """Parameters with the part ``document``, a copy of ``query`` if it is missing."""
    if config.tied or "document" in params:
        return params
    return {**params, "document": jax.tree.map(jnp.copy, params["query"])}


def trainable(params: PyTree, settings: QaConfig) -> PyTree:
    """Tree of bools: query tower and reader, and the document tower where asked."""
    frozen = () if settings.train_documents else ("document",)
    return {
        part: jax.tree.map(lambda _, chosen=part not in frozen: chosen, tree)
        for part, tree in params.items()
    }


def batch_spec(settings: QaConfig) -> Mapping[str, axes.Names]:
    """Logical axes of each array of a batch."""
    notes = ("unreachable", "gold_named", "gold_read")
    spec = {**qa.BATCH_SPEC, **{name: ("batch",) for name in notes}}
    return {**spec, **qa.TITLE_SPEC} if settings.train_documents else spec


def loss_fn(
    config: RealmConfig, settings: QaConfig, mesh: Mesh, *, gold: bool = False
) -> LossFn:
    """(parameters, batch, key) → Σ (L_early + L_full), questions, metrics.

    Beside those of `qa.finetune_loss` there are ``beam``, the passages that were found,
    and ``unreachable``, the answers in what is read that no legal span can give: longer
    than ``config.model.span_width``. With `gold` there is ``gold_recall``: of the
    questions that name their gold document, the share that has a passage of it to read.
    """

    def loss(params: PyTree, batch: Batch, key: Array):
        with meshes.active(mesh):
            total, weight, metrics = qa.finetune_loss(
                config,
                params,
                batch,
                key if config.dropout else None,
                train_documents=settings.train_documents,
            )
        found = jnp.sum(batch["beam_valid"].astype(jnp.float32))
        more = {
            "beam": (found, weight),
            "unreachable": (jnp.sum(batch["unreachable"]), weight),
        }
        if gold:
            named, read = batch["gold_named"], batch["gold_read"]
            more["gold_recall"] = jnp.sum(read), jnp.sum(named)
        return total, weight, {**metrics, **more}

    return loss


def flops(config: RealmConfig, settings: QaConfig, batch_size: int) -> float:
    """Floating point operations of a step by formula: 6 per weight and token.

    Attention's own products and everything elementwise are left out.
    """
    layer = 4 * config.width**2 + 2 * config.width * config.hidden
    tokens = config.query_tokens + settings.read * config.joint_tokens
    if settings.train_documents:
        tokens += settings.read * config.document_tokens
    beam = settings.beam * config.vector_dim
    return 6.0 * batch_size * (tokens * config.num_layers * layer + beam)


def _live(
    config: RealmConfig,
    depth: int,
    examples: Examples,
    index: Index,
    order: loader.Batches,
) -> Live:
    def ask(step: int, params: PyTree) -> Array | HostArray:
        rows = order[step]["question"]
        query, lengths = examples.query[rows], examples.query_len[rows]
        tower = {"query": params["query"]}
        vectors = search.query_vectors(config, tower, query, lengths)
        return hosts.readable(vectors)

    def find(step: int, asked: Array | HostArray) -> JsonDict:
        return {"ids": index.search(np.asarray(asked), examples.beam).ids.tolist()}

    def batch(step: int, found: JsonDict) -> dict[str, HostArray]:
        rows = order[step]["question"]
        ids = np.asarray(found["ids"], np.int64).reshape(len(rows), -1)
        return examples.batch(rows, ids)

    # The index never changes: there is nothing to carry from one start to the next.
    return Live(depth, ask, find, batch, carry=dict, resume=lambda *_: None)


def _description(
    config: RealmConfig, examples: Examples, train: TrainConfig, mesh: Mesh
) -> str:
    settings, store = examples.settings, examples.store
    shapes = jax.eval_shape(
        lambda: model.init(config, jax.random.key(0), model.FINETUNING)
    )
    sizes = jax.tree.map(lambda leaf: leaf.size, axes.unbox(shapes))
    mask = trainable(sizes, settings)
    trained = sum(
        size
        for size, chosen in zip(
            jax.tree.leaves(sizes), jax.tree.leaves(mask), strict=True
        )
        if chosen
    )
    parts = [
        f"question answering, {trained / 1e6:.1f}M of"
        f" {sum(jax.tree.leaves(sizes)) / 1e6:.1f}M parameters trained",
        f"{len(examples):,} questions",
    ]
    if examples.unanswerable:
        done = "left out" if settings.drop_unanswerable else "kept, without a loss"
        parts.append(f"{examples.unanswerable:,} that no passage answers {done}")
    if examples.cut:
        parts.append(f"{examples.cut:,} cut to {config.query_length} wordpieces")
    if len(store) < settings.read:
        parts.append(f"only {len(store)} passages for config.qa.read={settings.read}")
    epochs = train.steps * train.batch_size / len(examples)
    parts += [
        f"a beam of {examples.beam:,} of {len(store):,} passages, {settings.read} read",
        f"{train.steps} steps = {epochs:.1f} epochs",
        f"{mesh.size} device{'s' if mesh.size > 1 else ''}",
    ]
    return ", ".join(parts)
