"""Paired differences in bits per byte between runs on the same held-out documents.

  python tests/benchmarks/compare_runs.py --workdir=W retro:2 plain:0 ngram

A run is NAME[:k], with k neighbours (0 is OFF). Each is compared with the first. The
interval is the 95 % bootstrap interval over documents of the difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from realm_retro.retro import evaluate


def read(workdir: Path, run: str) -> dict[str, np.ndarray]:
    """Bits and bytes of each document of one run."""
    name, _, k = run.partition(":")
    folder = workdir / "runs" / name
    ours = folder / "document_bits.npz"
    if ours.exists():
        arrays = np.load(ours)
        return {
            "document": arrays["documents"],
            "bytes": arrays["bytes"],
            "bits": arrays[f"bits_{k or 0}"],
        }
    arrays = np.load(folder / "documents.npz")  # what ngram.py writes
    return {name: arrays[name] for name in ("document", "bytes", "bits")}


def main() -> None:
    """Prints one line a run; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("runs", nargs="+")
    arguments = parser.parse_args()
    runs = {run: read(arguments.workdir, run) for run in arguments.runs}
    first = runs[arguments.runs[0]]
    for run, found in runs.items():
        if not np.array_equal(found["document"], first["document"]):
            raise SystemExit(f"{run}: was evaluated on other documents; evaluate again")
        value, low, high = evaluate.interval(found["bits"], found["bytes"])
        print(f"{run:<12} {value:.4f} [{low:.4f}, {high:.4f}]", end="")
        if found is first:
            print()
            continue
        value, low, high = evaluate.interval(
            first["bits"] - found["bits"], found["bytes"]
        )
        interval = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"   {arguments.runs[0]} - {run}: {interval}")


if __name__ == "__main__":
    main()
