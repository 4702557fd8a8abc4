"""One process of a program that searches an index spread over all of them.

``python toy_index.py OUTPUT``: writes what it found, for each of `CASES`.
"""

import pathlib
import sys

import jax
import numpy as np

from realm_retro.parallel import hosts
from realm_retro.retrieval.index import distributed
from realm_retro.retrieval.index.exact import ExactIndex

# name → (rows, metric, whole numbers, k). Whole numbers: equal scores are many.
CASES = {
    "ties": (101, "squared_l2", True, 20),
    "ties_dot": (100, "dot_product", True, 7),
    "more_than_a_part": (9, "squared_l2", False, 8),
    "more_than_all": (9, "dot_product", False, 12),
    "fewer_rows_than_processes": (1, "squared_l2", False, 2),
    "floats": (3000, "dot_product", False, 50),
}


def index_of(name):
    rows, metric, whole, _ = CASES[name]
    rng = np.random.default_rng(rows)
    draw = rng.integers(-2, 3, (rows, 8)) if whole else rng.normal(size=(rows, 8))
    # Ids that do not fit 32 bits.
    ids = 2**33 + np.sort(rng.choice(5 * rows, rows, replace=False))
    return ExactIndex.build(draw.astype(np.float32), ids, metric=metric)


def queries_of(name):
    _, _, whole, _ = CASES[name]
    rng = np.random.default_rng(1)
    draw = rng.integers(-2, 3, (13, 8)) if whole else rng.normal(size=(13, 8))
    return draw.astype(np.float32)


def main():
    hosts.initialise()
    found = {}
    for name, (*_, k) in CASES.items():
        index = distributed.take_part(index_of(name))
        result = index.search(queries_of(name), k)
        found[f"{name}/ids"], found[f"{name}/scores"] = result.ids, result.scores
        found[f"{name}/held"] = np.asarray([index.part.size, index.size])
        found[f"{name}/all"] = index.ids
    empty = index.search(queries_of(name)[:0], 3)
    assert empty.ids.shape == (0, 3)
    np.savez(pathlib.Path(sys.argv[1]) / f"{jax.process_index()}.npz", **found)


if __name__ == "__main__":
    main()
