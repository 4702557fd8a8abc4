"""What the workers of `realm_retro.data.corpus_beam` do with one element.

Elements are tuples of plain values, which Beam encodes well. A document is its number
and its fields. Every function is one of its arguments alone, so that a runner may try
again, or twice at once, what a worker has lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from etils import epath

from realm_retro.data import corpus, datasets, dedupe_writer, records
from realm_retro.data import dedupe as dedupe_lib
from realm_retro.data.corpus import CorpusConfig, Document, Report
from realm_retro.data.datasets import Part
from realm_retro.data.dedupe import DedupeConfig
from realm_retro.errors import UserError
from realm_retro.text import near_duplicates
from realm_retro.typing import JsonDict

RESULT = "result.json"
# A document's number: that of its part, and its place among the part's documents.
PLACE_BITS = 32

Pair: TypeAlias = tuple[int, int]
Fields: TypeAlias = Sequence[str]  # of a Document


def read(element: Any, config: CorpusConfig, dedupe: DedupeConfig) -> Iterator[Any]:
    """Numbered documents of a part, and what its reader reported."""
    from apache_beam.pvalue import TaggedOutput  # pyright: ignore[reportMissingImports]

    number, part = element
    report = Report()
    evaluation = number < 0
    source = dedupe.evaluation if evaluation else config
    naming = dedupe_lib.naming_evaluation() if evaluation else contextlib.nullcontext()
    with naming:
        found = report.keep(datasets.documents_of(Part(*part), source, report))
        for place, document in enumerate(found):
            if place >> PLACE_BITS:
                raise UserError(f"{document.origin}: too many documents in one file")
            # Below 0 for parts below 0.
            yield (number << PLACE_BITS) + place, dataclasses.astuple(document)
    yield TaggedOutput("reports", (number, dataclasses.asdict(report)))


def summary_of(element: tuple[int, JsonDict]) -> JsonDict:
    """What `add_up` takes of a part's report."""
    number, report = element
    if number < 0:
        return {"evaluation_documents": report["documents"]}
    named = [[number, place] for place in report["invalid_utf8_in"]]
    return {**report, "invalid_utf8_in": named, "dedupe": None}


def add_up(summaries: Iterable[JsonDict]) -> JsonDict:
    """The reports of all parts in one, and of evaluation sets the documents."""
    total: JsonDict = {"evaluation_documents": 0, **dataclasses.asdict(Report())}
    for summary in summaries:
        for name, value in summary.items():
            if isinstance(value, int | list):
                total[name] += value
            elif value:
                total[name] = value  # the same in all parts
    total["invalid_utf8_in"] = sorted(total["invalid_utf8_in"])[: corpus.NAMED]
    return total


def count_of(element: tuple[int, JsonDict]) -> Pair:
    """Number of a part, and of its documents."""
    number, report = element
    return number, report["documents"]


def starts_of(counts: Iterable[Pair]) -> list[int]:
    """Row of each part's first document, of those of the corpus."""
    ours = [count for number, count in sorted(counts) if number >= 0]
    return [0, *itertools.accumulate(ours)]


def by_id(element: tuple[int, Fields]) -> Iterator[tuple[str, Any]]:
    """A document of the corpus by its id."""
    number, values = element
    if number >= 0:
        document = Document(*values)
        yield document.id, (number, document.origin)


def refuse_same_id(element: tuple[str, Iterable[tuple[int, str]]]) -> None:
    """Raises a UserError for an id that several documents have."""
    identity, found = element
    (_, one), *others = sorted(found)
    if others:
        raise datasets.same_id(one, others[0][1], identity)


def by_shard(element: tuple[int, Any], starts: Sequence[int]) -> Iterator[Any]:
    """(shard, (number, value)) of what belongs to a document of the corpus."""
    number, value = element
    if number >= 0:
        part, place = divmod(number, 1 << PLACE_BITS)
        yield records.shard_of(starts[part] + place), (number, value)


def sketches_of(element: tuple[int, Fields], dedupe: DedupeConfig) -> Iterator[Any]:
    """What is compared of a document: its words, its groups, its shingles."""
    from apache_beam.pvalue import TaggedOutput  # pyright: ignore[reportMissingImports]

    number, values = element
    sketch = dedupe_lib.sketch(Document(*values).text, dedupe)
    yield TaggedOutput("words", (sketch.words, (number, sketch.text)))
    for key in sketch.keys.tolist():
        yield TaggedOutput("groups", (key, (number, sketch.words)))
    yield number, sketch.shingles.tobytes()


def marks_of_same_words(
    element: tuple[bytes, Iterable[tuple[int, bytes]]],
) -> Iterator[Any]:
    """Marks of the documents of the same words."""
    return dedupe_lib.marks_of_same_words(element[1])


def pairs_of(element: tuple[int, Iterable[tuple[int, bytes]]]) -> Iterator[Any]:
    """Pairs of a group, and how many are left out."""
    from apache_beam.pvalue import TaggedOutput  # pyright: ignore[reportMissingImports]

    pairs, left_out = near_duplicates.pairs_of(element[1])
    yield from pairs
    if left_out:
        yield TaggedOutput("left_out", left_out)


def ends_of(pair: Pair) -> Iterator[tuple[int, Pair]]:
    """A pair by each of its documents."""
    for number in pair:
        yield number, pair


def shingles_by_pair(element: tuple[int, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
    """A document's shingles to each pair that it is in."""
    _, found = element
    for shingles in found["shingles"]:
        for pair in found["pairs"]:
            yield pair, shingles


def mark_of_pair(element: tuple[Pair, Iterable[bytes]], dedupe: DedupeConfig) -> Any:
    """The mark of a pair's second document, if it has one."""
    (first, second), found = element
    one, other = (np.frombuffer(shingles, np.uint64) for shingles in found)
    mark = dedupe_lib.mark_of_pair(first, one, other, dedupe)
    return [(second, mark)] if mark else []


def by_other(element: tuple[int, dedupe_lib.Mark]) -> tuple[int, Any]:
    """A mark by the document for whose sake it is."""
    number, (reason, other, similarity) = element
    return other, (number, reason, similarity)


def id_of(element: tuple[int, Fields]) -> tuple[int, str]:
    """A document's id."""
    number, values = element
    return number, Document(*values).id


def name_others(element: tuple[int, Mapping[str, Iterable[Any]]]) -> Iterator[Any]:
    """Marks with the id of the document for whose sake they are."""
    _, found = element
    for identity in found["ids"]:
        for number, reason, similarity in found["marks"]:
            yield number, (reason, identity, similarity)


def write_shard(
    element: tuple[int, Mapping[str, Iterable[Any]]], folder: str
) -> JsonDict:
    """Writes a shard."""
    shard, found = element
    return dedupe_writer.write_shard(
        epath.Path(folder),
        shard,
        _in_order(found["documents"]),
        dict(found.get("dropped", ())),
    )


def _in_order(
    documents: Iterable[tuple[int, Fields]],
) -> Iterator[tuple[int, Document]]:
    """Sorts documents by number on disk: a shard need not fit in memory."""
    with tempfile.TemporaryFile() as spool:
        places = []
        for number, values in documents:
            data = json.dumps(list(values)).encode()
            places.append((number, spool.tell(), len(data)))
            spool.write(data)
        for number, start, size in sorted(places):
            spool.seek(start)
            yield number, Document(*json.loads(spool.read(size)))


def write_result(
    _: int,
    folder: str,
    shards: list[JsonDict],
    report: JsonDict,
    pairs_compared: int = 0,
    pairs_left_out: int = 0,
) -> None:
    """Writes what the launcher wants to know, to `RESULT`."""
    counts = {
        "evaluation_documents": report.pop("evaluation_documents"),
        "pairs_compared": pairs_compared,
        "pairs_left_out": pairs_left_out,
    }
    result = {"shards": shards, "report": report, "counts": counts}
    path = epath.Path(folder) / f"{RESULT}.{uuid.uuid4().hex}"
    path.write_text(json.dumps(result))
    path.replace(epath.Path(folder) / RESULT)
