"""Both towers at work outside a training step: queries and passages to vectors.

Pre-training's retrieval, refresh workers, fine-tuning, evaluation and questions of a
user all embed with these functions, so that a query and an index agree to the last bit
however they came about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from realm_retro.arrays import flatten, unflatten
from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.parallel import axes, hosts
from realm_retro.parallel import mesh as meshes
from realm_retro.parallel.mesh import local_mesh
from realm_retro.realm import model, packing
from realm_retro.realm.config import CLS_ID, SEP_ID, RealmConfig
from realm_retro.retrieval import embed
from realm_retro.retrieval.embed import Embedder
from realm_retro.retrieval.index import probe, tuning
from realm_retro.retrieval.index.base import Index
from realm_retro.retrieval.index.exact import ExactIndex
from realm_retro.typing import Array, Float, HostArray, Int, Params

# Rows of query batches are padded to one of few numbers, so that few programs are
# compiled however many questions come.
_MAX_QUERIES = 64

# Share of the k best that an approximate index has to find.
RECALL_TARGET = 0.95
# Passages for each one that is asked for, below which a tree would be searched whole.
_ROWS_PER_RESULT = 20
# Passages to tune ScaNN on, and as many others to measure it on; fewer where the scores
# of their k best would not fit so many bytes.
_MAX_TRIALS, _MIN_TRIALS, _TRIAL_BYTES = 256, 16, 1 << 28


@functools.partial(jax.jit, static_argnums=0)
def query_vectors(
    config: RealmConfig,
    params: Params,
    query: Int[Array, "rows q"],
    length: Int[Array, " rows"],
) -> Float[Array, "rows d"]:
    """Embed_input(x) of queries, float32, without dropout; dispatched, not waited for.

    Args:
      config: the model's.
      params: a tree with the part ``query``.
      query: wordpieces without special tokens; anything behind their length.
      length: how many are real.
    """
    with jax.default_matmul_precision("float32"):
        ids, mask = packing.query_inputs(query, length)
        return model.embed_queries(config, params, ids, mask)


def embed_all_queries(
    config: RealmConfig, params: Params, query: HostArray, length: HostArray
) -> HostArray:
    """`query_vectors` of any number of queries, in batches; float32 [rows, d]."""
    vectors = np.empty((len(query), config.vector_dim), np.float32)
    for start in range(0, len(query), _MAX_QUERIES):
        part = slice(start, start + _MAX_QUERIES)
        rows = len(query[part])
        padded = min(_MAX_QUERIES, 1 << (rows - 1).bit_length()) - rows
        found = query_vectors(
            config,
            params,
            np.pad(query[part].astype(np.int32), [(0, padded), (0, 0)]),
            np.pad(length[part].astype(np.int32), [(0, padded)]),
        )
        vectors[part] = np.asarray(found)[:rows]
    return vectors


def tokenise_questions(
    config: RealmConfig, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> tuple[HostArray, HostArray, int]:
    """Questions as the query tower and the reader take them.

    Returns:
      int32 [texts, query_length] padded with 0, int32 [texts] lengths, and how many
      were longer than `query_length` and are cut.
    """
    ids = np.zeros((len(texts), config.query_length), np.int32)
    lengths = np.zeros(len(texts), np.int32)
    cut = 0
    for row, encoding in enumerate(
        tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ):
        pieces = encoding.ids[: config.query_length]
        cut += len(encoding.ids) > len(pieces)
        ids[row, : len(pieces)], lengths[row] = pieces, len(pieces)
    return ids, lengths, cut


def passage_embedder(
    config: RealmConfig,
    store: PassageStore,
    *,
    batch_tokens: int = 0,
    mesh: Mesh | None = None,
) -> Callable[[Mapping[str, HostArray]], Callable[[int, int], HostArray]]:
    """What embeds passages with a document tower's parameters.

    Args:
      config: the model's.
      store: the passages.
      batch_tokens: of a batch on one device, padding included; 0 chooses by the kind
        of device.
      mesh: the devices; where it is None those of this process, with a copy of the
        weights on each.

    Returns:
      A function of parameters (as `tower_arrays` gives them) to a function of a range
      of rows [start, stop) to their vectors, float32 [stop − start, d].
    """
    mesh = mesh or local_mesh()
    shares = axes.row_shares(mesh)
    if not batch_tokens:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        batch_tokens = 1024 if on_cpu else 65_536
    part = "query" if config.tied else "document"
    boxed = jax.eval_shape(lambda: model.init(config, jax.random.key(0), (part,)))
    shardings = axes.shardings(boxed, mesh)

    def with_parameters(arrays: Mapping[str, HostArray]):
        params = jax.device_put(unflatten(arrays), shardings)
        embedder = Embedder(
            apply=functools.partial(_apply, config, params, mesh),
            tokenizer=store.tokenizer,
            dim=config.vector_dim,
            max_tokens=config.document_tokens,
            batch_tokens=batch_tokens * shares,
            row_multiple=shares,
            fingerprint="",
        )

        def rows(start: int, stop: int) -> HostArray:
            packed = embed.Tokenised(
                packed_documents(store, start, stop), embed.Counts()
            )
            return embed.embed_tokenised(packed, embedder)

        return rows

    return with_parameters


def packed_documents(store: PassageStore, start: int, stop: int) -> list[HostArray]:
    """``[CLS] title [SEP] body [SEP]`` of passages, int32, as `packing` makes them."""
    titles, title_lengths = store.title_tokens(np.arange(start, stop))
    bodies, lengths = store.body[start:stop], store.lengths[start:stop]
    return [
        np.concatenate([[CLS_ID], title[:t], [SEP_ID], body[:n], [SEP_ID]]).astype(
            np.int32
        )
        for title, t, body, n in zip(
            titles, title_lengths, bodies, lengths, strict=True
        )
    ]


def tower_arrays(config: RealmConfig, params: Params) -> dict[str, Array]:
    """The document tower's parameters by name: what a snapshot holds.

    With tied towers that is the query tower.
    """
    part = "query" if config.tied else "document"
    return flatten({part: params[part]})


def build_index(
    vectors: HostArray,
    *,
    backend: str = "auto",
    k: int = 100,
    report: Callable[[str], Any] = print,
) -> Index:
    """An index of passages' vectors for inner products; ids are rows.

    Two builds by ScaNN of the same vectors differ a little: they find the same recall,
    but a training that uses it does not go on bit for bit after an interruption.

    Args:
      vectors: float [N, d].
      backend: ``exact``, ``scann``, or ``auto``: exact search below 5,000 passages and
        below 20 times k; above ScaNN, unless it does not run here or misses
        `RECALL_TARGET`.
      k: how many will be asked for at most; ScaNN is tuned for it.
      report: takes one line about ScaNN: the recall that was measured, or why search
        is exact.

    Raises:
      UserError: `backend` is ``scann``, which does not run or misses the target.
    """
    ids = np.arange(len(vectors), dtype=np.int64)
    exact = ExactIndex.build(vectors, ids, metric="dot_product")
    k = min(k, exact.size)
    enough = max(tuning.MIN_ROWS_FOR_TREE, _ROWS_PER_RESULT * k)
    if backend == "exact" or (backend == "auto" and exact.size < enough):
        return exact
    if (problem := probe.scann_problem()) is None:
        sample = _sample(exact, k)
        index, recall = tuning.build(exact, *sample, k=k, target=RECALL_TARGET)
        found = f"finds {recall:.1%} of the {k:,} best of {exact.size:,} passages"
        if recall >= RECALL_TARGET:
            report(f"index: ScaNN {found}")
            return index
        problem = f"{found}, less than {RECALL_TARGET:.0%}"
    else:
        problem = f"does not run here ({problem})"
    if backend == "scann":
        raise UserError(f"index=scann: ScaNN {problem}; set index to auto or exact")
    report(f"index: ScaNN {problem}; searching exactly")
    return exact


def backend_on(mesh: Mesh, backend: str, batch_size: int) -> str:
    """The `backend` of an index that every process builds for itself.

    Two of ScaNN's builds differ a little. That does no harm while each process looks up
    the rows of the batch that its own devices hold; but where one row lies on several
    processes, it has to find the same for all of them.

    Args:
      mesh: the devices that train.
      backend: see `build_index`; ``auto`` becomes ``exact`` there.
      batch_size: queries of a step.

    Raises:
      UserError: `backend` is ``scann`` there.
    """
    shape = (batch_size,)
    if not hosts.share_rows(axes.sharding(("batch",), shape, mesh), shape):
        return backend
    if backend == "scann":
        raise UserError(
            "index=scann: with this config.mesh and config.train.batch_size several"
            " hosts hold the same examples, and their ScaNN indexes would not agree;"
            " set index to exact, or keep config.mesh.tensor within a host"
        )
    return "exact"


def _sample(exact: ExactIndex, k: int) -> tuple[HostArray, HostArray]:
    """Passages in the place of queries, float32 [q, d], and their ids, int64 [q]."""
    trials = min(_MAX_TRIALS, _TRIAL_BYTES // (8 * k * exact.dim))
    count = min(2 * max(_MIN_TRIALS, trials), exact.size)
    rows = np.random.default_rng(0).choice(exact.size, count, replace=False)
    return exact.vectors[rows], exact.ids[rows]


def _apply(
    config: RealmConfig, params: Params, mesh: Mesh, ids: HostArray, lengths: HostArray
) -> Array:
    rows = axes.sharding(("batch",), lengths.shape, mesh)
    return _document_vectors(
        config, mesh, params, *jax.device_put((ids, lengths), rows)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _document_vectors(
    config: RealmConfig,
    mesh: Mesh,
    params: Params,
    ids: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
) -> Float[Array, "rows d"]:
    mask = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    with jax.default_matmul_precision("float32"), meshes.active(mesh):
        return model.embed_documents(config, params, ids, mask)
