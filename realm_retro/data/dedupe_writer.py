"""Writes the documents that are kept, and the list of those that are not.

Whoever drops duplicates (one process, or many) writes shards into a scratch folder, in
any order and as often as it likes, and publishes all of them at the end: numbered
without gaps, each with the list of what was dropped from it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO

from etils import epath

from realm_retro import artifacts
from realm_retro.data import records
from realm_retro.data.corpus import Document, Report
from realm_retro.data.dedupe import REASONS, Dropped
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

_SCRATCH = ".parts"


def scratch(stage: artifacts.Stage) -> epath.Path:
    """An empty folder beside the artefact's files; see `publish`.

    Deletes what an interrupted run has left.
    """
    for leftover in stage.directory.glob("dropped-*.jsonl"):
        leftover.unlink()
    folder = stage.directory / _SCRATCH
    folder.rmtree(missing_ok=True)
    folder.mkdir(parents=True)
    return folder


def write_shard(
    folder: epath.Path,
    shard: int,
    documents: Iterable[tuple[int, Document]],
    dropped: Mapping[int, Dropped],
) -> JsonDict:
    """Writes the documents of one shard that are kept, and a list of the others.

    Args:
      folder: from `scratch`. Several processes may write the same shard at once.
      shard: which one.
      documents: numbers and documents in their order; one is held at a time.
      dropped: by number.

    Returns:
      What `publish` wants to know.
    """
    report = Report()
    counts = dict.fromkeys(REASONS, 0)
    attempt = f"{shard:05d}.{uuid.uuid4().hex}"
    kept_path = folder / f"{attempt}.kept"
    dropped_path = folder / f"{attempt}.dropped"

    def kept(lists: IO[str]) -> Iterator[Document]:
        for number, document in documents:
            if number not in dropped:
                yield document
                continue
            reason, other, similarity = dropped[number]
            counts[REASONS[reason]] += 1
            line = {
                "id": document.id,
                "origin": document.origin,
                "reason": REASONS[reason],
                "of": other,
                "jaccard": round(similarity, 4),
            }
            lists.write(json.dumps(line, ensure_ascii=False) + "\n")

    with dropped_path.open("w", encoding="utf-8") as lists:
        records.write_shard(kept_path, report.keep(kept(lists)))
    files = {"kept": kept_path, "dropped": dropped_path}
    for part, path in files.items():
        path.replace(folder / f"{shard:05d}.{part}")
    return {
        "shard": shard,
        "documents": report.documents,
        "text_bytes": report.text_bytes,
        "untitled": report.untitled,
        "dropped": counts,
        "checksums": {
            part: artifacts.sha256(folder / f"{shard:05d}.{part}") for part in files
        },
    }


def publish(
    stage: artifacts.Stage,
    folder: epath.Path,
    results: Sequence[JsonDict],
    report: Report,
    **counts: int,
) -> None:
    """Makes the written shards the stage's files; does not commit.

    Args:
      stage: of the corpus.
      folder: from `scratch`; deleted.
      results: of `write_shard`, for each shard.
      report: takes what is kept, and in `Report.dedupe` how many documents were dropped
        for each of `REASONS`, and `counts`.
      **counts: further counts; none are given where nothing was to be dropped.

    Raises:
      UserError: no document is left.
    """
    results = sorted(results, key=lambda result: result["shard"])
    for name in ("documents", "text_bytes", "untitled"):
        setattr(report, name, sum(result[name] for result in results))
    if counts:
        reasons = {r: sum(result["dropped"][r] for result in results) for r in REASONS}
        report.dedupe = {**reasons, **counts}
    if not report.documents:
        raise UserError(
            "config.dedupe drops every document: all are in config.dedupe.against"
        )
    kept = [result for result in results if result["documents"]]
    lists = [result for result in results if any(result["dropped"].values())]
    for place, result in enumerate(kept):
        _adopt(stage, folder, result, "kept", records.shard_name(place))
    for place, result in enumerate(lists):
        _adopt(stage, folder, result, "dropped", f"dropped-{place:05d}.jsonl")
    records.write_metadata(stage.directory, [result["documents"] for result in kept])
    for name in records.METADATA:
        stage.adopt(name)
    folder.rmtree()


def _adopt(
    stage: artifacts.Stage, folder: epath.Path, result: JsonDict, part: str, name: str
) -> None:
    (folder / f"{result['shard']:05d}.{part}").replace(stage.directory / name)
    stage.adopt(name, checksum=result["checksums"][part])
