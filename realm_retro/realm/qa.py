"""Open-domain question answering: the two losses of ORQA (Lee et al. 2019, section 5).

A question has a *beam* of passages, the best of a search (5,000 in the paper), of which
only vectors are needed, and reads the first K of them (5 in the paper):

    L_early = −log Σ_{z: z has an answer} e^{f(x,z)} / Σ_{z in beam} e^{f(x,z)}
    L_full  = −log Σ_{(z,s): s is an answer} e^{S(z,s)} / Σ_{(z,s) legal} e^{S(z,s)}

with f(x, z) the retrieval score and S(z, s) = f(x, z) + the reader's score of span s:
the softmax runs over the spans of all passages together. A term without any answer is
0, and so is its gradient. Everything here is float32.

A batch (`BATCH_SPEC`; lengths are without special tokens, b questions, B passages in
the beam, K read, d the size of a vector, n wordpieces of a body, W = `span_width`):

    query         int   [b, q]        wordpieces of the question
    query_len     int   [b]
    beam_vectors  float [b, B, d]     of the index, constants of the step
    beam_valid    bool  [b, B]        False where fewer than B were found
    beam_has      bool  [b, B]        the passage has an answer (`answer_store`)
    slots         int   [b, K]        places in the beam of the passages that are read,
                                      none twice; an invalid place where one is missing
    title         int   [b, K, t]     only to train the document tower
    title_len     int   [b, K]        likewise
    body          int   [b, K, n]     wordpieces of the passages that are read
    body_len      int   [b, K]
    correct       bool  [b, K, n, W]  [s, w − 1]: the w wordpieces of the body from s on
                                      are an answer (`correct_spans`)

A passage that is read counts only if its slot is valid.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from realm_retro.realm import model, packing, reader
from realm_retro.realm.config import RealmConfig
from realm_retro.train.recipe import Mean
from realm_retro.typing import Array, Batch, Bool, Float, HostArray, Int, Params

BATCH_SPEC = {
    "query": ("batch", "length"),
    "query_len": ("batch",),
    "beam_vectors": ("batch", "neighbours", None),
    "beam_valid": ("batch", "neighbours"),
    "beam_has": ("batch", "neighbours"),
    "slots": ("batch", "neighbours"),
    "body": ("batch", "neighbours", "length"),
    "body_len": ("batch", "neighbours"),
    "correct": ("batch", "neighbours", "length", None),
}
# What a batch has besides where the document tower is trained.
TITLE_SPEC = {
    "title": ("batch", "neighbours", "length"),
    "title_len": ("batch", "neighbours"),
}


def early_update_loss(
    scores: Float[Array, "batch beam"],
    has: Bool[Array, "batch beam"],
    valid: Bool[Array, "batch beam"] | None = None,
) -> Float[Array, " batch"]:
    """L_early of each question; see the module docstring.

    Args:
      scores: f(x, z), any float dtype.
      has: whether the passage has an answer.
      valid: which passages are there; all where it is None.

    Returns:
      float32; 0, with gradient 0, where no passage that is there has an answer.
    """
    there = jnp.ones_like(has) if valid is None else valid
    return _loss(scores, there, has)


def reader_loss(
    retriever_logits: Float[Array, "batch k"],
    span_scores: Float[Array, "batch k spans"],
    legal: Bool[Array, "batch k spans"],
    correct: Bool[Array, "batch k spans"],
) -> Float[Array, " batch"]:
    """L_full of each question; see the module docstring.

    Args:
      retriever_logits: f(x, z).
      span_scores: the reader's score of each span.
      legal: which spans may be given; False throughout a passage that is missing.
      correct: which are an answer; a span that is not legal never is.

    Returns:
      float32; 0, with gradient 0, where no legal span is correct.
    """
    logits = _joint_logits(retriever_logits, span_scores)
    rows = len(logits)
    return _loss(logits, legal.reshape(rows, -1), correct.reshape(rows, -1))


@dataclasses.dataclass(frozen=True)
class BestSpans:
    """The most probable spans of each question, best first; arrays [batch, count].

    Attributes:
      passage: which of the K passages.
      span: which of its spans.
      log_prob: log p(z, s | x) among all legal spans of all passages; −inf where a
        question has fewer legal spans than were asked for.
    """

    passage: Int[Array, "batch count"]
    span: Int[Array, "batch count"]
    log_prob: Float[Array, "batch count"]


jax.tree_util.register_dataclass(BestSpans)


def best_span(
    retriever_logits: Float[Array, "batch k"],
    span_scores: Float[Array, "batch k spans"],
    legal: Bool[Array, "batch k spans"],
    count: int = 1,
) -> BestSpans:
    """The `count` most probable spans; arguments as in `reader_loss`.

    Equal scores go to the earlier passage, then to the earlier span.
    """
    logits = _joint_logits(retriever_logits, span_scores)
    there = legal.reshape(len(logits), -1)
    total = _logsumexp(logits, there)
    top, place = jax.lax.top_k(jnp.where(there, logits, -jnp.inf), count)
    num_spans = legal.shape[-1]
    return BestSpans(
        passage=place // num_spans,
        span=place % num_spans,
        log_prob=top - total[:, None],
    )


def body_spans(
    query_len: Int[Array, " batch"],
    spans: Int[Array, "batch count"],
    tokens: int,
    width: int,
) -> tuple[Int[Array, "batch count"], Int[Array, "batch count"]]:
    """Spans of joint inputs as [start, end) in the body's wordpieces.

    Args:
      query_len: of each question.
      spans: numbers in the order of `reader.spans`, as in `BestSpans.span`.
      tokens: of the joint input, ``RealmConfig.joint_tokens``.
      width: of the longest span, ``RealmConfig.span_width``.
    """
    table = jnp.asarray(reader.spans(tokens, width))[spans]
    first = query_len.astype(jnp.int32)[:, None] + 2  # [CLS] x [SEP]
    return table[..., 0] - first, table[..., 1] - first


def finetune_loss(
    config: RealmConfig,
    params: Params,
    batch: Batch,
    key: Array | None,
    *,
    train_documents: bool = False,
) -> tuple[Array, Array, dict[str, Mean]]:
    """Σ (L_early + L_full) over the questions of a batch, their number, and metrics.

    Every question weighs 1, also one whose beam has no answer, as in ORQA.

    Args:
      config: the model's.
      params: the parts `model.FINETUNING`; ``document`` may be absent unless it is
        trained.
      batch: see the module docstring.
      key: for dropout; None for none.
      train_documents: whether the passages that are read are embedded anew, with a
        gradient into the document tower; the rest of the beam keeps its vectors. False
        trains the query tower alone, against a frozen index.

    Returns:
      (sum in nats, weight, name → (sum, weight)), float32. Metrics:

      * ``early``, ``full``: the two losses, where they have an answer.
      * ``beam_has``, ``top_has``, ``read_has``: questions with an answer somewhere in
        the beam, in its best passage, among the spans that are read.
      * ``span_match``: questions whose most probable span is an answer.
    """
    scores, valid = beam_scores(config, params, batch, key, train_documents)
    has = jnp.asarray(batch["beam_has"] & valid)
    logits, span_scores, legal = read(config, params, batch, scores)
    tokens = batch["query"].shape[1] + batch["body"].shape[2] + 3
    answers = joint_spans(
        batch["correct"], batch["query_len"], tokens, config.span_width
    )
    correct = answers & legal
    early = early_update_loss(scores, has, valid)
    full = reader_loss(logits, span_scores, legal, correct)
    found = jax.lax.stop_gradient((scores, logits, span_scores))
    further = _metrics(early, full, valid, has, legal, correct, *found)
    weight = jnp.float32(len(early))
    return jnp.sum(early + full), weight, further


def beam_scores(
    config: RealmConfig,
    params: Params,
    batch: Batch,
    key: Array | None = None,
    train_documents: bool = False,
) -> tuple[Float[Array, "batch beam"], Bool[Array, "batch beam"]]:
    """f(x, z) of the beam with current parameters, and which of it is there.

    Scores of passages that are not there mean nothing. Arguments as in `finetune_loss`.
    """
    keys = [None, None] if key is None else list(jax.random.split(key))
    ids, mask = packing.query_inputs(batch["query"], batch["query_len"])
    query = model.embed_queries(config, params, ids, mask, keys[0])
    scores = _inner(query, batch["beam_vectors"], config.score_scale)
    if train_documents:
        parts = (batch[name] for name in ("title", "title_len", "body", "body_len"))
        ids, mask = packing.document_inputs(*parts)
        vectors = model.embed_documents(config, params, ids, mask, keys[1])
        fresh = _inner(query, vectors, config.score_scale)
        rows = jnp.arange(len(scores))[:, None]
        scores = scores.at[rows, batch["slots"]].set(fresh)
    return scores, batch["beam_valid"]


def read(
    config: RealmConfig,
    params: Params,
    batch: Batch,
    scores: Float[Array, "batch beam"],
) -> tuple[
    Float[Array, "batch k"],
    Float[Array, "batch k spans"],
    Bool[Array, "batch k spans"],
]:
    """Reads the passages at a batch's slots; what `reader_loss` and `best_span` take.

    Args:
      config: the model's.
      params: a tree with the part ``reader``.
      batch: its query, ``beam_valid``, ``slots``, ``body`` and ``body_len``.
      scores: f(x, z) of the beam.

    Returns:
      The passages' retrieval scores, the scores of all spans of the joint inputs, and
      which of them are legal: within the body of a passage that is there.
    """
    b, k, _ = batch["body"].shape
    slots = batch["slots"]
    query = jnp.broadcast_to(batch["query"][:, None], (b, k, batch["query"].shape[1]))
    length = jnp.broadcast_to(batch["query_len"][:, None], (b, k))
    span_scores, legal = reader.score_spans(
        config, params, query, length, batch["body"], batch["body_len"]
    )
    valid = jnp.take_along_axis(batch["beam_valid"], slots, axis=1)
    logits = jnp.take_along_axis(scores, slots, axis=1)
    return logits, span_scores, legal & valid[..., None]


def joint_spans(
    correct: Bool[Array, "batch k body width"],
    query_len: Int[Array, " batch"],
    tokens: int,
    span_width: int,
) -> Bool[Array, "batch k spans"]:
    """A batch's ``correct`` in the order of `reader.spans` of the joint inputs.

    Args:
      correct: see the module docstring.
      query_len: of each question.
      tokens: of the joint input, ``RealmConfig.joint_tokens``.
      span_width: of the longest span, ``RealmConfig.span_width``.
    """
    b, k, n, w = correct.shape
    table = jnp.asarray(reader.spans(tokens, span_width))
    start = table[None, :, 0] - (query_len.astype(jnp.int32)[:, None] + 2)
    width = (table[:, 1] - table[:, 0])[None]
    inside = (start >= 0) & (start + width <= n) & (width <= w)
    place = jnp.where(inside, start * w + width - 1, 0)
    chosen = jnp.take_along_axis(correct.reshape(b, k, n * w), place[:, None], axis=2)
    return chosen & inside[:, None]


def correct_spans(
    token_spans: HostArray, length: int, width: int
) -> tuple[HostArray, int]:
    """One passage's entry of a batch's ``correct``, on the host.

    Args:
      token_spans: int [s, 2], answers as [start, end) in the body's wordpieces, from
        `realm_retro.text.answers.token_spans`.
      length: wordpieces of a body at most (n).
      width: wordpieces of an answer at most (W).

    Returns:
      bool [n, W], and how many answers are too long for it or beyond its end.
    """
    correct = np.zeros((length, width), bool)
    spans = np.asarray(token_spans).reshape(-1, 2)
    widths = spans[:, 1] - spans[:, 0]
    fits = (widths >= 1) & (widths <= width) & (spans[:, 1] <= length)
    correct[spans[fits, 0], widths[fits] - 1] = True
    return correct, int(np.sum(~fits))


def _metrics(
    early: Array,
    full: Array,
    valid: Array,
    has: Array,
    legal: Array,
    correct: Array,
    scores: Array,
    logits: Array,
    span_scores: Array,
) -> dict[str, Mean]:
    rows = jnp.arange(len(early))
    questions = jnp.float32(len(early))
    top = jnp.argmax(jnp.where(valid, scores, -jnp.inf), axis=-1)
    best = best_span(logits, span_scores, legal)
    match = correct[rows, best.passage[:, 0], best.span[:, 0]]
    beam_has, read_has = has.any(-1), correct.any((-1, -2))

    def share(which: Array) -> Mean:
        return jnp.sum(which.astype(jnp.float32)), questions

    return {
        "early": (jnp.sum(jax.lax.stop_gradient(early)), share(beam_has)[0]),
        "full": (jnp.sum(jax.lax.stop_gradient(full)), share(read_has)[0]),
        "beam_has": share(beam_has),
        "top_has": share(has[rows, top]),
        "read_has": share(read_has),
        "span_match": share(match),
    }


def _inner(query: Array, documents: Array, scale: float) -> Array:
    """f(x, z), as in `objective.log_prior`."""
    return scale * jnp.einsum(
        "bd,bkd->bk",
        query.astype(jnp.float32),
        documents.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def _joint_logits(retriever_logits: Array, span_scores: Array) -> Array:
    """S(z, s), [batch, k · spans]."""
    retriever = retriever_logits.astype(jnp.float32)[..., None]
    logits = retriever + span_scores.astype(jnp.float32)
    return logits.reshape(len(logits), -1)


def _loss(logits: Array, there: Array, wanted: Array) -> Array:
    wanted = wanted & there
    loss = _logsumexp(logits, there) - _logsumexp(logits, wanted)
    return jnp.where(wanted.any(-1), loss, 0)


def _logsumexp(logits: Array, mask: Array) -> Array:
    """Over the last axis where `mask` is True; finite where it nowhere is."""
    # A finite stand-in: −inf throughout a row would have the gradient NaN, which no
    # later `where` removes.
    return jax.nn.logsumexp(jnp.where(mask, logits.astype(jnp.float32), -1e30), axis=-1)
