"""A REALM pre-training step beside Hugging Face's, from the same weights.

  pip install -e . torch==2.13.0 transformers==4.57.6
  python tests/benchmarks/bench_realm.py [--rounds=5] [--json=FILE]

Both have BERTs of 4 layers × 256, batch 4, 8 candidates, joint inputs of 160 tokens, of
which 4 are masked, documents of 114 tokens, queries of 48; float32. A step is forward
and backward of both towers and the knowledge encoder, and AdamW. The marginal
is the per-token one, the only one that the peer has. The peer computes vocabulary
logits at every position and masks the loss; ours gathers the masked positions first.

Before anything is timed the losses of both are compared: the peer's weights are read
through `realm_retro.interop`, and the batch is the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paired

from realm_retro import host_memory
from realm_retro.interop import realm
from realm_retro.realm import objective
from realm_retro.realm.config import CLS_ID, MASK_ID, SEP_ID, RealmConfig

BATCH, K, QUERY, BODY, MASKED, VOCAB = 4, 8, 46, 111, 4, 30_522
CONFIG = RealmConfig(
    width=256,
    num_layers=4,
    num_heads=4,
    hidden=1024,
    query_length=QUERY,
    title_length=0,
    body_length=BODY,
    candidates=K,
    max_masks=MASKED,
    activation="gelu_tanh",
    embed_dim=128,
    pooler=True,
    document_types=True,
    marginal="per_token",
)


def batch() -> dict[str, np.ndarray]:
    """Random wordpieces; the first candidate is the null document."""
    rng = np.random.default_rng(0)
    query = rng.integers(1000, VOCAB, (BATCH, QUERY), dtype=np.int32)
    places = np.stack([np.sort(rng.permutation(QUERY)[:MASKED]) for _ in range(BATCH)])
    targets = np.take_along_axis(query, places, axis=1)
    np.put_along_axis(query, places, MASK_ID, axis=1)
    body = rng.integers(1000, VOCAB, (BATCH, K, BODY), dtype=np.int32)
    body[:, 0] = 0  # the null document
    lengths = np.full((BATCH, K), BODY, np.int32)
    lengths[:, 0] = 0
    return {
        "query": query,
        "query_len": np.full(BATCH, QUERY, np.int32),
        "mask_positions": places.astype(np.int32),
        "targets": targets.astype(np.int32),
        "target_mask": np.ones((BATCH, MASKED), bool),
        "title": np.zeros((BATCH, K, 0), np.int32),
        "title_len": np.zeros((BATCH, K), np.int32),
        "body": body,
        "body_len": lengths,
        "valid": np.ones((BATCH, K), bool),
    }


def ours(params: Any) -> tuple[Callable[[], object], float]:
    """One call is one step; and the loss before the first."""
    rule = optax.adamw(1e-4)
    on_device = jax.device_put(batch())

    def loss(params: Any) -> jax.Array:
        total, _, _ = objective.pretrain_loss(CONFIG, params, on_device, None)
        return total / (BATCH * MASKED)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    held = {"params": params, "state": rule.init(params)}

    def one() -> None:
        held["params"], held["state"], value = step(held["params"], held["state"])
        jax.block_until_ready((held["params"], value))

    return one, float(jax.jit(loss)(params))


def theirs() -> tuple[Any, Callable[[], object], float]:
    """The peer's models, one step, and the loss before the first."""
    import torch
    from transformers.models.deprecated.realm import (
        RealmConfig as PeerConfig,
    )
    from transformers.models.deprecated.realm import (
        RealmEmbedder,
        RealmKnowledgeAugEncoder,
        RealmScorer,
    )

    torch.manual_seed(0)
    sizes = PeerConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        num_candidates=K,
        retriever_proj_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    scorer = RealmScorer(sizes, query_embedder=RealmEmbedder(sizes))
    encoder = RealmKnowledgeAugEncoder(sizes)
    weights = [*scorer.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    data = {name: torch.as_tensor(x) for name, x in _peer_inputs().items()}

    def loss() -> torch.Tensor:
        scores = scorer(
            input_ids=data["query"],
            candidate_input_ids=data["documents"],
            candidate_attention_mask=data["document_mask"],
            candidate_token_type_ids=data["document_types"],
        ).relevance_score
        return encoder(
            input_ids=data["joint"],
            attention_mask=data["joint_mask"],
            token_type_ids=data["joint_types"],
            relevance_score=scores,
            labels=data["labels"],
            mlm_mask=data["mlm_mask"],
        ).loss

    def one() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    with torch.no_grad():
        first = float(loss())
    return (scorer, encoder), one, first


def _peer_inputs() -> dict[str, np.ndarray]:
    """The same batch as padded inputs with special tokens."""
    ours_ = batch()
    cls, sep = np.full((BATCH, 1), CLS_ID), np.full((BATCH, 1), SEP_ID)
    query = np.concatenate([cls, ours_["query"], sep], axis=1)
    joint, documents, lengths = [], [], []
    for k in range(K):
        body = ours_["body"][:, k]
        if k:
            joint.append(np.concatenate([query, body, sep], axis=1))
            # The title is empty, its [SEP] stays.
            documents.append(np.concatenate([cls, sep, body, sep], axis=1))
        else:
            padding = np.zeros((BATCH, BODY), np.int64)
            joint.append(np.concatenate([query, sep, padding], axis=1))
            documents.append(np.concatenate([cls, sep, sep * 0, padding], axis=1))
        lengths.append((QUERY + 3 + BODY * (k > 0), 2 if not k else BODY + 3))
    width = QUERY + BODY + 3
    joint_mask = np.stack([np.arange(width) < n for n, _ in lengths])
    document_mask = np.stack([np.arange(BODY + 3) < n for _, n in lengths])
    joint_types = joint_mask & (np.arange(width) >= QUERY + 2)
    document_types = np.broadcast_to(np.arange(BODY + 3) >= 2, document_mask.shape)
    labels = np.zeros((BATCH, width), np.int64)
    mlm_mask = np.zeros((BATCH, width), np.int64)
    rows = np.arange(BATCH)[:, None]
    labels[rows, ours_["mask_positions"] + 1] = ours_["targets"]
    mlm_mask[rows, ours_["mask_positions"] + 1] = 1
    tile = lambda x: np.tile(x.astype(np.int64)[None], (BATCH, 1, 1))  # noqa: E731
    return {
        "query": query.astype(np.int64),
        "documents": np.stack(documents, axis=1).astype(np.int64),
        "document_mask": tile(document_mask),
        "document_types": tile(document_types),
        "joint": np.stack(joint, axis=1).astype(np.int64),
        "joint_mask": tile(joint_mask),
        "joint_types": tile(joint_types),
        "labels": labels,
        "mlm_mask": mlm_mask,
    }


def _read(models: Sequence[Any]) -> Any:
    """The peer's weights as our parameters."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, model in enumerate(models):
            path = f"{folder}/{number}"
            model.save_pretrained(path)
            found.append((path, realm.load(path)))
        return jax.tree.map(jnp.asarray, dict(realm.merge(found).parts))


def main() -> None:
    """Compares losses, measures and prints; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    host_memory.reuse_freed_blocks()
    models, their_step, their_loss = theirs()
    our_step, our_loss = ours(_read(models))
    print(f"loss before the first step: ours {our_loss:.6f}, theirs {their_loss:.6f}")
    if abs(our_loss - their_loss) > 1e-3:
        raise SystemExit("the losses differ: the two are not the same model")
    times = paired.seconds(
        {"realm_retro": our_step, "transformers": their_step}, rounds=arguments.rounds
    )
    ratios = {"step, ours / theirs": paired.ratio(times, "realm_retro", "transformers")}
    paired.report("REALM pre-training step", times, ratios, path=arguments.json)


if __name__ == "__main__":
    main()
