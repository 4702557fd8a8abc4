"""Small batches of questions: padding everywhere, rubbish behind every length."""

from __future__ import annotations

import numpy as np

from realm_retro.realm.config import RealmConfig


def random_qa_batch(
    config: RealmConfig, *, rows: int = 4, beam: int = 6, k: int = 3, seed: int = 2
) -> dict[str, np.ndarray]:
    """A fine-tuning batch.

    Row 0 is full; row 1 has two passages only; row 2 has answers in the beam, but none
    in what is read; row 3 has none at all.
    """
    rng = np.random.default_rng(seed)
    q, t, n = config.query_length, config.title_length, config.body_length

    def pieces(*shape: int) -> np.ndarray:
        return rng.integers(104, config.vocab_size, shape).astype(np.int32)

    query_len = rng.integers(1, q + 1, rows)
    query_len[0] = q
    body_len = rng.integers(2, n + 1, (rows, k))
    body_len[0, 0] = n
    slots = np.stack([rng.permutation(beam)[:k] for _ in range(rows)])
    valid = np.ones((rows, beam), bool)
    has = rng.random((rows, beam)) < 0.5
    correct = rng.random((rows, k, n, config.span_width)) < 0.3
    # One passage that is read and one that is not are there.
    valid[1] = False
    valid[1, slots[1, 1]] = valid[1, np.setdiff1d(range(beam), slots[1])[0]] = True
    has[:3, slots[:3, 1]] = True
    correct[:2, 1, 0, 1] = True
    correct[2:] = False
    has[3] = False
    return {
        "query": pieces(rows, q),
        "query_len": query_len.astype(np.int32),
        "beam_vectors": rng.normal(size=(rows, beam, config.vector_dim)).astype("f4"),
        "beam_valid": valid,
        "beam_has": has,
        "slots": slots.astype(np.int32),
        "title": pieces(rows, k, t),
        "title_len": rng.integers(0, t + 1, (rows, k)).astype(np.int32),
        "body": pieces(rows, k, n),
        "body_len": body_len.astype(np.int32),
        "correct": correct,
    }
