"""A refresh worker that embeds with a line of NumPy; as a program, one to be killed.

``python toy_refresh.py ROOT NAME [key=value …]`` runs a worker until the training ends.
With ``hold=8`` it stops in the middle of the shard that starts at row 8: it creates
``NAME.in`` beside ROOT and embeds on when ``NAME.go`` is there.
"""

import pathlib
import sys
import time

import numpy as np

from realm_retro.cli import refresh_index
from realm_retro.errors import UserError
from realm_retro.retrieval.refresh import RefreshConfig, Target

ROWS, DIM, SHARD_ROWS = 22, 3, 4
PARENTS = {"passages": "a" * 64}
TARGET = Target(num_rows=ROWS, parents=PARENTS, dim=DIM, shard_rows=SHARD_ROWS)


def arrays(step):
    return {
        "kernel": np.linspace(0.1, 2.0, DIM, dtype=np.float32),
        "bias": np.full(DIM, step / 100, np.float32),
    }


def make_embedder(weights):
    def embed(start, stop):
        rows = np.arange(start, stop, dtype=np.float32)[:, None]
        return np.sin(rows * weights["kernel"][None, :] + weights["bias"][None, :])

    return embed


def expected(step, rows=ROWS):
    return make_embedder(arrays(step))(0, rows)


def holding(root, name, at, pause):
    """An embedder that stops once, in the middle of the shard that starts at `at`."""
    entered, go = (root.parent / f"{name}.{end}" for end in ("in", "go"))

    def make(weights):
        embed = make_embedder(weights)

        def slow(start, stop):
            if start == at and not entered.exists():
                entered.touch()
                while not go.exists():
                    time.sleep(0.005)
            time.sleep(pause)
            return embed(start, stop)

        return slow

    return make


def main():
    root, name = pathlib.Path(sys.argv[1]), sys.argv[2]
    options = dict(word.split("=") for word in sys.argv[3:])
    settings = RefreshConfig(
        shard_rows=SHARD_ROWS,
        lease_seconds=float(options.get("lease", 0.5)),
        poll_seconds=0.02,
    )
    make = holding(
        root, name, int(options.get("hold", -1)), float(options.get("pause", 0.0))
    )
    try:
        refresh_index.work(
            root, make, TARGET, settings, max_idle_seconds=float(options.get("idle", 0))
        )
    except UserError as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()
