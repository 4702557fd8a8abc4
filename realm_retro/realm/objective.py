"""REALM's pre-training objective (Guu et al. 2020, sections 3.1 to 3.3, appendix A).

    p(y | x) = Σ_z p(y | z, x) p(z | x)   (eq. 1),   p(y | z, x) = Π_j p(y_j | z, x)

over the k candidates, of which the first is the null document ∅. The released code
takes another sum, Π_j Σ_z p(y_j | z, x) p(z | x): the same for one masked token and
larger or smaller beyond. Both are here, ``joint`` and ``per_token``.

Everything is in log space and in float32, whatever dtype comes in. A candidate that is
not there has log p(z | x) = −inf and no gradient.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from realm_retro.nn import losses
from realm_retro.realm import model, packing
from realm_retro.realm.config import RealmConfig
from realm_retro.realm.model import KnowledgeEncoder
from realm_retro.train.recipe import Mean
from realm_retro.typing import Array, Batch, Bool, Float, Int, Params

BATCH_SPEC = {
    "query": ("batch", "length"),
    "query_len": ("batch",),
    "mask_positions": ("batch", None),
    "targets": ("batch", None),
    "target_mask": ("batch", None),
    "title": ("batch", "neighbours", "length"),
    "title_len": ("batch", "neighbours"),
    "body": ("batch", "neighbours", "length"),
    "body_len": ("batch", "neighbours"),
    "valid": ("batch", "neighbours"),
}


class Targets(NamedTuple):
    """Queries and what is masked in them.

    Attributes:
      query: int [rows, q], wordpieces.
      length: int [rows], how many are real.
      positions: int32 [rows, J], where targets stand in the packed input.
      ids: int32 [rows, J], targets.
    """

    query: Array
    length: Array
    positions: Array
    ids: Array


def log_prior(
    query: Float[Array, "batch d"],
    documents: Float[Array, "batch k d"],
    valid: Bool[Array, "batch k"],
    scale: float = 1.0,
) -> Float[Array, "batch k"]:
    """Log p(z | x), a softmax of f(x, z) = Embed(x)ᵀ Embed(z) (section 3.2).

    Args:
      query: Embed_input(x).
      documents: Embed_doc(z) of the candidates.
      valid: False where a candidate is missing or a duplicate.
      scale: times f(x, z).

    Returns:
      float32; −inf where `valid` is False, which may be a whole row.
    """
    scores = scale * jnp.einsum(
        "bd,bkd->bk",
        query.astype(jnp.float32),
        documents.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    # The finite stand-in keeps the gradient of a row without any candidate finite.
    finite = jnp.where(valid, scores, -1e30)
    return jnp.where(valid, jax.nn.log_softmax(finite, axis=-1), -jnp.inf)


def marginal_log_likelihood(
    prior: Float[Array, "batch k"],
    token_log_probs: Float[Array, "batch k targets"],
    target_mask: Bool[Array, "batch targets"],
    form: str = "joint",
) -> Float[Array, " batch"]:
    """Log p(y | x) of each example.

    Args:
      prior: log p(z | x), −inf for candidates that are not there.
      token_log_probs: log p(y_j | z, x); anything where the candidate or the target
        is not there.
      target_mask: which targets are there.
      form: ``joint``, log Σ_z p(z | x) Π_j p(y_j | z, x), or ``per_token``,
        Σ_j log Σ_z p(z | x) p(y_j | z, x).

    Returns:
      float32; 0, with gradient 0, for a row without candidates or targets.
    """
    tokens = _present(prior, token_log_probs, target_mask)
    if form == "joint":
        return _logsumexp(prior.astype(jnp.float32) + tokens.sum(-1))
    each = _logsumexp(prior.astype(jnp.float32)[:, None] + tokens.swapaxes(1, 2))
    return jnp.where(target_mask, each, 0).sum(-1)


def log_posterior(
    prior: Float[Array, "batch k"],
    token_log_probs: Float[Array, "batch k targets"],
    target_mask: Bool[Array, "batch targets"],
) -> Float[Array, "batch k"]:
    """Log p(z | x, y), by Bayes; arguments as in `marginal_log_likelihood`."""
    tokens = _present(prior, token_log_probs, target_mask)
    joint = prior.astype(jnp.float32) + tokens.sum(-1)
    return joint - _logsumexp(joint)[:, None]


def gradient_weights(
    prior: Float[Array, "batch k"],
    token_log_probs: Float[Array, "batch k targets"],
    target_mask: Bool[Array, "batch targets"],
) -> Float[Array, "batch k"]:
    """r(z) = [p(y | z, x) / p(y | x) − 1] p(z | x), section 3.3 and appendix A.

    It is ∂ log p(y | x) / ∂ f(x, z) of the joint form: a document's score rises where
    it predicts better than the marginal. Arguments as in `marginal_log_likelihood`.
    """
    posterior = log_posterior(prior, token_log_probs, target_mask)
    # p(y | z, x) p(z | x) / p(y | x) is the posterior.
    return jnp.exp(posterior) - jnp.exp(prior.astype(jnp.float32))


def metrics(
    prior: Float[Array, "batch k"],
    token_log_probs: Float[Array, "batch k targets"],
    target_mask: Bool[Array, "batch targets"],
    form: str = "joint",
) -> dict[str, Mean]:
    """What retrieval does for the prediction; candidate 0 is the null document.

    Rows without targets or candidates count for nothing.

    Returns:
      (sum, weight) pairs:

      * ``mlm``: −log p(y | x) for each target.
      * ``null_mlm``: the same from the null document alone.
      * ``utility``: RU(z | x) = log p(y | z, x) − log p(y | ∅, x), section 4.4, for
        each retrieved document.
      * ``gain``: log p(y | x) − log p(y | ∅, x) for each example.
      * ``null_prior``, ``null_posterior``: p(∅ | x) and p(∅ | x, y).
      * ``prior_entropy``, ``posterior_entropy``: of p(z | x) and p(z | x, y), in nats.
      * ``retrieved``: retrieved documents of an example.
    """
    marginal = marginal_log_likelihood(prior, token_log_probs, target_mask, form)
    tokens = _present(prior, token_log_probs, target_mask)
    log_likelihood = tokens.sum(-1)
    posterior = log_posterior(prior, token_log_probs, target_mask)
    examples = _counts(prior, target_mask)
    targets = jnp.sum(target_mask * examples[:, None])
    null = log_likelihood[:, 0]
    retrieved = (jnp.isfinite(prior) * examples[:, None])[:, 1:]

    def mean(values: Array) -> Mean:
        return jnp.sum(values * examples), jnp.sum(examples)

    return {
        "mlm": (-jnp.sum(marginal * examples), targets),
        "null_mlm": (-jnp.sum(null * examples), targets),
        "utility": (
            jnp.sum((log_likelihood[:, 1:] - null[:, None]) * retrieved),
            jnp.sum(retrieved),
        ),
        "gain": mean(marginal - null),
        "null_prior": mean(jnp.exp(prior[:, 0].astype(jnp.float32))),
        "null_posterior": mean(jnp.exp(posterior[:, 0])),
        "prior_entropy": mean(_entropy(prior.astype(jnp.float32))),
        "posterior_entropy": mean(_entropy(posterior)),
        "retrieved": mean(retrieved.sum(-1)),
    }


def pretrain_loss(
    config: RealmConfig, params: Params, batch: Batch, key: Array | None
) -> tuple[Array, Array, dict[str, Mean]]:
    """−Σ log p(y | x) over the examples of a batch, their number, and `metrics`.

    p(z | x) is computed anew from the candidates' wordpieces, so the gradient reaches
    both towers; where the candidates came from does not matter. An example without
    any target weighs 0.

    Args:
      config: the model's.
      params: the parts `model.PRETRAINING`.
      batch: integer arrays of wordpieces without special tokens, and their lengths:

        * ``query`` [b, q], ``query_len`` [b]: x with its mask tokens in place.
        * ``mask_positions`` [b, J]: places in ``query``; anything at padding.
        * ``targets`` [b, J], ``target_mask`` [b, J]: y and which of it is there;
          anything at padding.
        * ``title`` [b, k, t], ``title_len``, ``body`` [b, k, n], ``body_len`` [b, k]:
          the candidates.
        * ``valid`` [b, k]: which are there. Candidate 0 **is the null document**, and
          always there: what stands in its place is not looked at.
      key: for dropout; None for none.

    Returns:
      (sum in nats, weight, name → (sum, weight)), float32.
    """
    prior = _prior(config, params, batch, key)
    token_log_probs = target_log_probs(config, params, batch)
    mask = batch["target_mask"]
    likelihood = marginal_log_likelihood(prior, token_log_probs, mask, config.marginal)
    examples = _counts(prior, mask)
    detached = jax.lax.stop_gradient((prior, token_log_probs))
    further = metrics(*detached, mask, config.marginal)
    return -jnp.sum(likelihood * examples), jnp.sum(examples), further


def target_log_probs(
    config: RealmConfig, params: Params, batch: Batch
) -> Float[Array, "batch k targets"]:
    """Log p(y_j | z, x) of each candidate and target; see `pretrain_loss`."""
    b, k, n = batch["body"].shape
    there = batch["target_mask"]
    targets = Targets(
        query=batch["query"],
        length=batch["query_len"],
        # + 1: [CLS] stands before the query.
        positions=jnp.where(there, batch["mask_positions"], 0).astype(jnp.int32) + 1,
        ids=jnp.where(there, batch["targets"], 0).astype(jnp.int32),
    )
    # No padding for the null document: its rows are those of a plain masked LM.
    nothing = jnp.zeros((b, 0), jnp.int32)
    null = _read(config, params, targets, nothing, jnp.zeros(b, jnp.int32))
    if k == 1:
        return null[:, None]

    def repeated(x: Array) -> Array:
        x = jnp.broadcast_to(x[:, None], (b, k - 1, *x.shape[1:]))
        return x.reshape(b * (k - 1), *x.shape[2:])

    body = batch["body"][:, 1:].reshape(-1, n)
    body_length = batch["body_len"][:, 1:].reshape(-1)
    each = Targets(*(repeated(x) for x in targets))
    found = _read(config, params, each, body, body_length)
    return jnp.concatenate([null[:, None], found.reshape(b, k - 1, -1)], axis=1)


def _read(
    config: RealmConfig,
    params: Params,
    targets: Targets,
    body: Int[Array, "rows n"],
    body_length: Int[Array, " rows"],
) -> Float[Array, "rows targets"]:
    ids, mask, types = packing.joint_inputs(
        targets.query, targets.length, body, body_length
    )
    logits = KnowledgeEncoder(config).apply(
        {"params": params["encoder"]}, ids, mask, types, targets.positions
    )
    return -losses.token_losses(cast(Array, logits), targets.ids)


def _prior(
    config: RealmConfig, params: Params, batch: Batch, key: Array | None
) -> Float[Array, "batch k"]:
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    ids, mask = packing.query_inputs(batch["query"], batch["query_len"])
    query = model.embed_queries(config, params, ids, mask, keys[0])
    # The null document is the same for every example: one row of two tokens.
    none = jnp.zeros((1, 0), jnp.int32)
    zero = jnp.zeros(1, jnp.int32)
    ids, mask = packing.document_inputs(none, zero, none, zero)
    vector = model.embed_documents(config, params, ids[:, :2], mask[:, :2], keys[1])
    documents = jnp.broadcast_to(vector[:, None], (len(query), 1, vector.shape[-1]))
    if batch["valid"].shape[1] > 1:
        names = ("title", "title_len", "body", "body_len")
        parts = (batch[name][:, 1:] for name in names)
        ids, mask = packing.document_inputs(*parts)
        found = model.embed_documents(config, params, ids, mask, keys[2])
        documents = jnp.concatenate([documents, found], axis=1)
    return log_prior(query, documents, batch["valid"], config.score_scale)


def _present(prior: Array, token_log_probs: Array, target_mask: Array) -> Array:
    """float32 log p(y_j | z, x), 0 wherever candidate or target is not there."""
    there = jnp.isfinite(prior)[:, :, None] & target_mask[:, None, :]
    return jnp.where(there, token_log_probs.astype(jnp.float32), 0)


def _counts(prior: Array, target_mask: Array) -> Array:
    """float32 [batch]: 1 for rows with a target and a candidate."""
    there = jnp.isfinite(prior).any(-1) & target_mask.any(-1)
    return there.astype(jnp.float32)


def _logsumexp(x: Array) -> Array:
    """Over the last axis; 0 with gradient 0 where all of it is −inf."""
    some = jnp.isfinite(x).any(-1)
    # Twice where: the gradient of the branch not taken must be finite too.
    safe = jnp.where(some[..., None], x, 0)
    return jnp.where(some, jax.nn.logsumexp(safe, axis=-1), 0)


def _entropy(log_probs: Array) -> Array:
    safe = jnp.where(jnp.isfinite(log_probs), log_probs, 0)
    return -jnp.sum(jnp.exp(log_probs) * safe, axis=-1)
