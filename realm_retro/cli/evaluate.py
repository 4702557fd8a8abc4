"""Measures bits per byte of held-out documents with retrieval OFF and ON.

Reads:   WORKDIR/chunks, WORKDIR/neighbours, WORKDIR/runs/NAME/checkpoints
Writes:  WORKDIR/runs/NAME/evaluation.json  bits per byte with 95 % intervals over
         documents, for OFF, the training's number of neighbours (ON) and the sweep
         WORKDIR/runs/NAME/document_bits.npz  bits and bytes of each document, to
         compare runs pair by pair

  python -m realm_retro.cli.evaluate --config=configs/retro/quickstart.py --workdir=work
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from etils import epath

from realm_retro import config as config_lib
from realm_retro import disk
from realm_retro.cli import common
from realm_retro.data import chunk_store
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.retro import batches, evaluate, recipe
from realm_retro.train import checkpoint
from realm_retro.train.config import TrainConfig
from realm_retro.typing import Config, HostArray, JsonDict


def main(config: Config, workdir: epath.Path) -> None:
    """Evaluates the newest checkpoint of a run."""
    started = time.perf_counter()
    settings = config_lib.build(
        evaluate.EvaluateConfig,
        config_lib.section(config, "evaluate"),
        name="config.evaluate",
    )
    train = config_lib.build(TrainConfig, config.train, name="config.train")
    model = recipe.model_config(config)
    mesh = make_mesh(
        config_lib.build(
            MeshConfig, config_lib.section(config, "mesh"), name="config.mesh"
        )
    )
    store = recipe.open_store(model, workdir)
    sweep = _sweep(model.retrieves, train.neighbours, settings.neighbours)
    table = recipe.open_neighbours(model, store, workdir, k=max(sweep))
    rows = _documents(store, settings, workdir)
    run_dir = workdir / "runs" / config.name
    params, step = checkpoint.restore_params(run_dir, recipe.init_fn(model), mesh)

    window = settings.window_chunks or train.sequence_chunks
    if settings.stride_chunks >= window:
        raise UserError(
            f"config.evaluate.stride_chunks={settings.stride_chunks} is not less than"
            f" a window of {window} chunks: text would be left out; lower it or raise"
            " config.evaluate.window_chunks"
        )
    windows = batches.sliding_windows(store, rows, window, settings.stride_chunks)
    bits = {}
    for k in sweep:
        source = batches.WindowSource(windows, store, table if k else None, k)
        off = () if k else recipe.without_retrieval(model, params, mesh)
        bits[k] = evaluate.document_bits(
            *(off or (model, params)),
            source,
            rows,
            batch_size=settings.batch_size,
            mesh=mesh,
            label=f"evaluate k={k}" if k else "evaluate OFF",
        )
    num_bytes = store.documents.num_bytes[rows]
    report = _report(bits, num_bytes, on=train.neighbours if model.retrieves else 0)
    report |= {"step": step, "seconds": time.perf_counter() - started}
    _write(run_dir, report, rows, num_bytes, bits)
    _print(report)


def _sweep(retrieves: bool, trained: int, asked: tuple[int, ...]) -> list[int]:
    return sorted({0, trained, *asked}) if retrieves else [0]


def _documents(
    store: chunk_store.ChunkStore,
    settings: evaluate.EvaluateConfig,
    workdir: epath.Path,
) -> HostArray:
    if settings.split not in chunk_store.SPLITS:
        raise UserError(
            f"config.evaluate.split is {settings.split!r}; one of"
            f" {', '.join(chunk_store.SPLITS)}"
        )
    split = chunk_store.SPLITS[settings.split]
    rows = evaluate.documents_of(store, split, settings.max_documents)
    if not len(rows):
        raise UserError(
            f"{workdir}/chunks: no {settings.split} document has text; raise"
            " config.chunks.validation_fraction and use another --workdir"
        )
    return rows


def _report(bits: dict[int, HostArray], num_bytes: HostArray, on: int) -> JsonDict:
    labels = {0: "OFF", on: "ON" if on else "OFF"}
    report: JsonDict = {
        "documents": len(num_bytes),
        "bytes": int(num_bytes.sum()),
        "results": [
            evaluate.result(labels.get(k, f"k={k}"), k, values, num_bytes)
            for k, values in bits.items()
        ],
    }
    if on:
        difference = bits[on] - bits[0]
        value, low, high = evaluate.interval(difference, num_bytes)
        report["difference"] = {"bits_per_byte": value, "low": low, "high": high}
    return report


def _write(
    run_dir: epath.Path,
    report: JsonDict,
    rows: HostArray,
    num_bytes: HostArray,
    bits: dict[int, HostArray],
) -> None:
    arrays: dict[str, Any] = {f"bits_{k}": values for k, values in bits.items()}
    arrays |= {"documents": rows, "bytes": num_bytes}
    with (
        disk.replacing(run_dir / "document_bits.npz") as path,
        path.open("wb") as file,
    ):
        np.savez(file, **arrays)
    with disk.replacing(run_dir / "evaluation.json") as path:
        path.write_text(json.dumps(report, indent=1))


def _print(report: JsonDict) -> None:
    common.say(
        f"{report['documents']} documents, {report['bytes']:,} bytes, checkpoint"
        f" {report['step']}; bits per byte [95 % interval over documents]"
    )
    for row in report["results"]:
        common.say(
            f"  {row['label']:>5}  k={row['neighbours']:<3} {row['bits_per_byte']:.4f}"
            f"  [{row['low']:.4f}, {row['high']:.4f}]"
        )
    if "difference" in report:
        d = report["difference"]
        common.say(
            f"  ON - OFF     {d['bits_per_byte']:+.4f}"
            f"  [{d['low']:+.4f}, {d['high']:+.4f}] (paired)"
        )


def entry() -> None:
    """The console script."""
    common.run(main, name="evaluate")


if __name__ == "__main__":
    entry()
