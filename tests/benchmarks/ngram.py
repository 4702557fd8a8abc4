"""An honest n-gram baseline: interpolated modified Kneser-Ney, in bits per byte.

Counts the training documents of a chunk store and scores its validation documents as
``evaluate`` does: every token of the text once, given the tokens before it in the same
document, over the UTF-8 bytes of the text. Writes ``W/runs/NAME/evaluation.json`` and,
for paired comparisons, ``W/runs/NAME/documents.npz``.

    python tests/benchmarks/ngram.py --workdir=W --order=5
    python tests/benchmarks/ngram.py --workdir=W --order=10 --unit=byte --name=kn10

The model is that of Chen & Goodman (1998), section 3: three discounts an order,
estimated from counts of counts; below the highest order a count is the number of
different units seen before the n-gram (an n-gram that begins a document has none
there and keeps its plain count); the lowest order is interpolated with the uniform
distribution. Nothing is pruned.

N-grams of any order fit in 64 bits since each is the pair (row of its context in the
table one order below, last unit). Training takes about 50 bytes a token while an order
is sorted, and keeps 16 bytes for each different n-gram.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realm_retro.data.chunk_store import DATABASE, TRAIN, VALIDATION, ChunkStore
from realm_retro.errors import UserError

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]

RESAMPLES = 2000
# The vocabulary of --unit=byte.
BOS_BYTE, EOS_BYTE, BYTES = 256, 257, 258
# Where a corpus is too small to estimate a discount, and its bounds.
FALLBACK = (0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents laid end to end, each ``[BOS] units [EOS]``.

    Attributes:
      units: int [n] token or byte ids.
      document: int [n] the document of each unit: its place in `rows`.
      text: bool [n] False at BOS and EOS.
      rows: int [D] the documents' rows in the chunk store.
      num_bytes: int [D] UTF-8 bytes of the documents' text.
    """

    units: Ints
    document: Ints
    text: NDArray[np.bool_]
    rows: Ints
    num_bytes: Ints

    @property
    def begins(self) -> NDArray[np.bool_]:
        """Bool [n], True at each document's first unit."""
        return np.diff(self.document, prepend=-1) != 0


@dataclasses.dataclass(frozen=True)
class Order:
    """All n-grams of one length.

    ``P(w | context) = weight[context w] + backoff[context] * P(w | shorter context)``

    Attributes:
      keys: int64 [n-grams], sorted: ``row of the context one order below * vocabulary
        + last unit``. The row of an n-gram is its place here.
      weight: float32 [n-grams] discounted count over the context's total.
      backoff: float32 [rows one order below] the mass that the discounts free; 1 where
        the context was never continued.
      discounts: what was taken from counts of 1, 2 and 3 or more.
    """

    keys: NDArray[np.int64]
    weight: Floats
    backoff: Floats
    discounts: tuple[float, float, float]


def train(
    units: Ints, begins: NDArray[np.bool_], *, order: int, vocabulary: int
) -> list[Order]:
    """Estimates the model.

    Args:
      units: int [n] ids below `vocabulary`; documents end to end, each with BOS first.
      begins: bool [n] True at each document's BOS, which is a context but never
        predicted.
      order: length of the longest n-grams.
      vocabulary: how many units there are.

    Returns:
      One `Order` a length, unigrams first.
    """
    orders = []
    # Unigrams: every unit has a row, so that a row is a unit's id. All have the empty
    # context, row 0 of an order 0.
    keys = np.arange(vocabulary, dtype=np.int64)
    rows = units.astype(np.int32)
    contexts = 1
    for length in range(1, order + 1):
        if length < order:
            longer, longer_rows = _count(rows, units, begins, vocabulary)
            counts = _continuations(rows, longer_rows, len(keys), len(longer))
        else:
            longer, longer_rows = keys, rows
            counts = np.bincount(rows[rows >= 0], minlength=len(keys))
        if length == 1:
            counts[units[begins]] = 0
        orders.append(_discount(keys, counts, contexts, vocabulary))
        contexts, keys, rows = len(keys), longer, longer_rows
    return orders


def probabilities(
    model: list[Order], units: Ints, begins: NDArray[np.bool_], *, vocabulary: int
) -> Floats:
    """P(unit | the units before it in its document), float64 [n]; any value at BOS."""
    probability = np.full(len(units), 1 / vocabulary)
    context = np.zeros(len(units), np.int64)
    for order in model:
        key = context * vocabulary + units
        found = np.searchsorted(order.keys, key).clip(max=len(order.keys) - 1)
        # An unknown context (row -1) has no key and passes all on to the shorter one.
        seen = order.keys[found] == key
        backoff = np.where(context >= 0, order.backoff[context], 1.0)
        weight = np.where(seen, order.weight[found], 0.0)
        probability = weight + backoff * probability
        context = _previous(np.where(seen, found, -1), begins)
    return probability


def _count(
    rows: Ints, units: Ints, begins: NDArray[np.bool_], vocabulary: int
) -> tuple[NDArray[np.int64], Ints]:
    """The n-grams one longer than those in `rows`.

    Returns:
      Their keys, and int32 [n] the row of the one that ends at each position, -1 where
      it would begin before its document.
    """
    context = _previous(rows, begins)
    inside = context >= 0
    keys, found = np.unique(
        context[inside].astype(np.int64) * vocabulary + units[inside],
        return_inverse=True,
    )
    longer = np.full(len(rows), -1, np.int32)
    longer[inside] = found
    return keys, longer


def _previous(rows: Ints, begins: NDArray[np.bool_]) -> Ints:
    """The row that ends one position earlier in the same document, or -1."""
    previous = np.concatenate([rows[:1], rows[:-1]])
    previous[begins] = -1
    return previous


def _continuations(rows: Ints, longer_rows: Ints, size: int, longer_size: int) -> Ints:
    """How many different units precede each n-gram; plain counts at document starts."""
    inside = longer_rows >= 0
    # Any one occurrence of each longer n-gram tells which n-gram it ends with.
    ending = np.empty(longer_size, rows.dtype)
    ending[longer_rows[inside]] = rows[inside]
    first = rows[~inside & (rows >= 0)]
    return np.bincount(ending, minlength=size) + np.bincount(first, minlength=size)


def _discount(
    keys: NDArray[np.int64], counts: Ints, contexts: int, vocabulary: int
) -> Order:
    """Turns the counts of one order into discounted weights and backoff mass."""
    discounts = _discounts(counts)
    taken = np.array([0.0, *discounts])[counts.clip(max=3)]
    context = keys // vocabulary
    total = np.bincount(context, weights=counts, minlength=contexts)
    freed = np.bincount(context, weights=taken, minlength=contexts)
    continued = total > 0
    backoff = np.divide(freed, total, where=continued, out=np.ones(contexts))
    weight = (counts - taken) / np.where(continued, total, 1)[context]
    return Order(keys, weight.astype(np.float32), backoff.astype(np.float32), discounts)


def _discounts(counts: Ints) -> tuple[float, float, float]:
    """D1, D2, D3+ from the numbers of n-grams seen once … four times."""
    n = np.bincount(counts.clip(max=5), minlength=6).astype(float)
    if not n[1:5].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    estimates = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
    if any(not 0 <= d <= c for c, d in enumerate(estimates, start=1)):
        return FALLBACK
    return estimates[0], estimates[1], estimates[2]


def read(store: ChunkStore, splits: tuple[int, ...], unit: str) -> Documents:
    """The documents of some splits, as tokens or as UTF-8 bytes.

    Raises:
      UserError: there are none, or their units do not make up their bytes.
    """
    chunks = np.sort(np.concatenate([store.chunks_of(split) for split in splits]))
    if not len(chunks):
        raise UserError(f"{store.manifest.directory}: no documents in split {splits}")
    lengths = store.lengths[chunks]
    units = store.tokens[chunks][np.arange(store.chunk_length) < lengths[:, None]]
    rows, place = np.unique(store.document[chunks], return_inverse=True)
    document = np.repeat(place.astype(np.int32), lengths)
    tokenizer = store.tokenizer
    num_bytes = store.documents.num_bytes[rows]
    size = tokenizer.byte_lengths
    text = ~np.isin(units, [tokenizer.bos_id, tokenizer.eos_id])
    if unit == "byte":
        pieces = np.split(units, np.flatnonzero(np.diff(document)) + 1)
        strings = [tokenizer.decode(piece).encode() for piece in pieces]
        parts = [np.array([BOS_BYTE, *s, EOS_BYTE], np.uint16) for s in strings]
        document = np.repeat(np.arange(len(rows), dtype=np.int32), [*map(len, parts)])
        units = np.concatenate(parts)
        text = units < 256
        size = np.arange(BYTES) < 256
    found = np.bincount(document, weights=size[units], minlength=len(rows))
    if not np.array_equal(found, num_bytes):
        wrong = rows[found != num_bytes][0]
        raise UserError(
            f"{store.manifest.directory}: the {unit}s of document {wrong} do not make"
            " up its bytes; prepare it again"
        )
    return Documents(units, document, text, rows, num_bytes)


def score(model: list[Order], held_out: Documents, *, vocabulary: int) -> Floats:
    """Bits of each document's text, float64 [D]."""
    p = probabilities(model, held_out.units, held_out.begins, vocabulary=vocabulary)
    bits = np.where(held_out.text, -np.log2(p), 0.0)
    return np.bincount(held_out.document, bits, len(held_out.rows)).astype(np.float64)


def interval(bits: Floats, num_bytes: Ints, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of bits per byte, documents drawn with replacement."""
    documents = len(bits)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES)
    low, high = np.percentile((drawn @ bits) / (drawn @ num_bytes), [2.5, 97.5])
    return float(low), float(high)


def run(
    workdir: Path, *, order: int, unit: str, database: bool, name: str
) -> dict[str, Any]:
    """Trains, scores, writes the run's folder and returns what it wrote as JSON."""
    store = ChunkStore.open(workdir / "chunks")
    vocabulary = BYTES if unit == "byte" else store.tokenizer.vocab_size
    started = time.perf_counter()
    data = read(store, (TRAIN, DATABASE) if database else (TRAIN,), unit)
    model = train(data.units, data.begins, order=order, vocabulary=vocabulary)
    trained = time.perf_counter()
    held_out = read(store, (VALIDATION,), unit)
    bits = score(model, held_out, vocabulary=vocabulary)
    low, high = interval(bits, held_out.num_bytes)
    label = f"KN{order}" + (" bytes" if unit == "byte" else "")
    total = int(held_out.num_bytes.sum())
    report = {
        "documents": len(bits),
        "bytes": total,
        "results": [
            {
                "neighbours": 0,
                "label": label + (" + database" if database else ""),
                "bits_per_byte": float(bits.sum() / total),
                "low": low,
                "high": high,
            }
        ],
        "training": {
            "documents": len(data.rows),
            "bytes": int(data.num_bytes.sum()),
            "units": int(data.text.sum()),
            "ngrams": [len(table.keys) for table in model],
            "discounts": [table.discounts for table in model],
            "seconds": trained - started,
        },
        "scoring_seconds": time.perf_counter() - trained,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    folder = workdir / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "documents.npz",
        bits=bits,
        bytes=held_out.num_bytes,
        document=held_out.rows,
    )
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    """Parses flags, runs, prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--unit", choices=("token", "byte"), default="token")
    parser.add_argument(
        "--database",
        action="store_true",
        help="count the documents that are only retrieved from, too",
    )
    parser.add_argument("--name", default="ngram", help="the folder in W/runs")
    flags = vars(parser.parse_args())
    if flags["order"] < 1:
        parser.error("--order must be 1 or more")
    try:
        report = run(flags.pop("workdir"), **flags)
    except UserError as error:
        parser.exit(2, f"ngram: error: {error}\n")
    (result,), training = report["results"], report["training"]
    print(
        f"{result['label']}: {result['bits_per_byte']:.4f} bits per byte"
        f" [{result['low']:.4f}, {result['high']:.4f}] on {report['documents']:,}"
        f" documents, {report['bytes']:,} bytes; {sum(training['ngrams']):,} n-grams"
        f" of {training['units']:,} units in {training['seconds']:.0f} s,"
        f" {report['peak_megabytes']:,.0f} MB"
    )


if __name__ == "__main__":
    main()
