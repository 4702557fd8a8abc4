r"""Embedding MiniLM passages beside sentence-transformers, same weights, same texts.

Both go from texts to mean-pooled vectors in memory, on all the cores that the process
has. Passages of one length hold exactly so many tokens; ``mixed`` has every length up
to the longest. The peer gets the batch size that serves it best, found in a warm-up.
Runs alternate between the two and ratios are of paired runs. Vectors must agree.

Example (peer: pip install torch==2.13.0 sentence-transformers):
  python tests/benchmarks/bench_embedding.py --rounds=7 --json=/tmp/embedding.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import string
import time
from collections.abc import Callable, Sequence

import numpy as np
import paired

from realm_retro import host_memory
from realm_retro.cli import encoders
from realm_retro.interop.bert import find_minilm
from realm_retro.retrieval import embed
from realm_retro.retrieval.embed import Embedder

LENGTHS = (64, 128, 256)
PEER = "sentence-transformers"
PEER_BATCHES = (8, 16, 32, 64)
TOLERANCE = 1e-4

Encode = Callable[[Sequence[str]], np.ndarray]


def passages(embedder: Embedder, lengths: Sequence[int], seed: int) -> list[str]:
    """Random words of one token each, so that a passage of n tokens has n − 2."""
    letters = set(string.ascii_lowercase)
    words = sorted(w for w in embedder.tokenizer.get_vocab() if set(w) <= letters)
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(words, length - 2)) for length in lengths]
    found = [len(row) for row in embed.tokenise(texts, embedder).ids]
    if found != list(lengths):
        raise RuntimeError("the passages do not have the lengths asked for")
    return texts


def workloads(embedder: Embedder, tokens: int) -> dict[str, list[str]]:
    """Passages of each length, about `tokens` tokens in all of each."""
    fixed = {
        f"{n} tokens": passages(embedder, [n] * (tokens // n), seed=n) for n in LENGTHS
    }
    longest = max(LENGTHS)
    mixed = np.random.default_rng(0).integers(8, longest + 1, 2 * tokens // longest)
    return {**fixed, "mixed": passages(embedder, mixed.tolist(), seed=1)}


def load_peer(max_tokens: int, texts: list[str]) -> tuple[Encode, dict[str, object]]:
    """The peer at its best batch size, and what is to be told of it."""
    import sentence_transformers
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = sentence_transformers.SentenceTransformer(str(find_minilm()), device="cpu")
    model.max_seq_length = max_tokens

    def encode(texts: Sequence[str], batch_size: int) -> np.ndarray:
        return np.asarray(
            model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
        )

    def cost(batch_size: int) -> float:
        started = time.perf_counter()
        encode(texts, batch_size)
        return time.perf_counter() - started

    encode(texts, PEER_BATCHES[0])  # not counted
    best = min(PEER_BATCHES, key=cost)
    facts = {
        "peer": f"{PEER} {importlib.metadata.version(PEER)}, torch {torch.__version__}",
        "peer_batch_size": best,
    }
    return lambda texts: encode(texts, best), facts


def check_agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between vectors of unit length."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (ours, theirs))
    worst = float(np.abs(a - b).max())
    if worst > TOLERANCE:
        raise RuntimeError(f"vectors differ by {worst:.1e}, above {TOLERANCE}")
    return worst


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each")
    parser.add_argument("--tokens", type=int, default=16_384, help="of one run")
    parser.add_argument("--batch_tokens", type=int, default=0, help="of our batches")
    parser.add_argument("--json", help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    """Measures, prints a table, writes JSON."""
    arguments = parse_arguments()
    host_memory.reuse_freed_blocks()  # as every command does
    config = encoders.EncoderConfig(max_tokens=max(LENGTHS))
    embedder = encoders.build_embedder(config, batch_tokens=arguments.batch_tokens)
    loads = workloads(embedder, arguments.tokens)
    peer, facts = load_peer(config.max_tokens, loads["128 tokens"][:64])

    def ours(texts: Sequence[str]) -> np.ndarray:
        return embed.embed_texts(texts, embedder)[0]

    alternatives, worst = {}, 0.0
    for name, texts in loads.items():
        worst = max(worst, check_agreement(ours(texts), peer(texts)))
        alternatives[f"{name}, ours"] = lambda texts=texts: ours(texts)
        alternatives[f"{name}, {PEER}"] = lambda texts=texts: peer(texts)
    times = paired.seconds(alternatives, rounds=arguments.rounds)
    ratios = {
        f"{name}, ours / {PEER}": paired.ratio(
            times, f"{name}, ours", f"{name}, {PEER}"
        )
        for name in loads
    }
    rates = {
        f"{name}, {who}": len(loads[name]) / statistics.median(times[f"{name}, {who}"])
        for name in loads
        for who in ("ours", PEER)
    }
    paired.report(
        "Embedding passages with MiniLM on CPU",
        times,
        ratios,
        path=arguments.json,
        passages={name: len(texts) for name, texts in loads.items()},
        passages_per_second=rates,
        largest_difference=worst,
        threads=len(os.sched_getaffinity(0)),
        jax=importlib.metadata.version("jax"),
        batch_tokens=embedder.batch_tokens,
        **facts,
    )
    for name, rate in rates.items():
        print(f"  {name:<44} {rate:9.1f} passages/s")


if __name__ == "__main__":
    main()
