"""Drops duplicates of a corpus that one machine holds, in one process.

What is compared of the documents lies on disk. Memory has about forty bytes for each
document, sixteen for each pair that is compared, and two documents.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from etils import epath

from realm_retro import artifacts, progress
from realm_retro.arrays import NpyWriter, open_npy
from realm_retro.data import dedupe, dedupe_writer, records
from realm_retro.data.corpus import Corpus, Document, Report
from realm_retro.data.dedupe import DedupeConfig, Mark
from realm_retro.text import near_duplicates
from realm_retro.typing import HostArray

_RECENT = 32  # documents whose shingles are kept for the next pairs


def write(
    corpus: Corpus,
    config: DedupeConfig,
    stage: artifacts.Stage,
    folder: epath.Path,
    report: Report,
) -> None:
    """Writes the documents of a corpus that are kept; does not commit.

    Args:
      corpus: all documents.
      config: which to drop.
      stage: of the corpus that is left.
      folder: from `dedupe_writer.scratch`.
      report: see `dedupe_writer.publish`.

    Raises:
      UserError: an evaluation set cannot be read or is empty, or nothing is left.
    """
    evaluation = _evaluation(config, folder / "evaluation")
    both = _Both(evaluation, corpus)
    marks, compared, left_out = find(both, len(evaluation), config, folder)

    def dropped(rows: range) -> dict[int, dedupe.Dropped]:
        mine = ((row, marks[row]) for row in rows if row in marks)
        return {row: (why, both.number(of).id, s) for row, (why, of, s) in mine}

    results = []
    for shard in range(records.shard_of(len(corpus) - 1) + 1):
        rows = records.rows_of(shard, len(corpus))
        documents = ((row, corpus[row]) for row in rows)
        results.append(
            dedupe_writer.write_shard(folder, shard, documents, dropped(rows))
        )
    counts = {"evaluation_documents": len(evaluation), "pairs_compared": compared}
    dedupe_writer.publish(
        stage, folder, results, report, **counts, pairs_left_out=left_out
    )


def find(
    documents: Corpus, evaluation: int, config: DedupeConfig, folder: epath.Path
) -> tuple[dict[int, Mark], int, int]:
    """Finds the documents to drop.

    Args:
      documents: those of evaluation sets, then those of the corpus.
      evaluation: how many the first are.
      config: when two are alike.
      folder: takes a file of 24 bytes and eight for each band a document.

    Returns:
      Marks by row of the corpus; how many pairs were compared; how many were left out,
      see `near_duplicates.pairs_of`.
    """
    path = folder / "sketches.npy"
    _write_sketches(documents, config, path)
    sketches = open_npy(path)
    marks: dict[int, Mark] = {}
    for rows in _groups(np.asarray(sketches["words"])):
        numbers = (rows - evaluation).tolist()
        texts = sketches["text"][rows].tolist()
        marks.update(dedupe.marks_of_same_words(zip(numbers, texts, strict=True)))
    pairs, left_out = _pairs(sketches, evaluation)

    @functools.lru_cache(_RECENT)
    def shingles(number: int) -> HostArray:
        return dedupe.shingles(documents[number + evaluation].text, config)

    with progress.bar(total=len(pairs), unit="pairs", label="duplicates") as bar:
        for first, second in pairs.tolist():
            bar.update()
            one, other = shingles(first), shingles(second)
            mark = dedupe.mark_of_pair(first, one, other, config)
            if mark and mark < marks.get(second, (len(dedupe.REASONS), 0, 0.0)):
                marks[second] = mark
    return marks, len(pairs), left_out


class _Both:
    """The documents of evaluation sets, and behind them those of a corpus."""

    def __init__(self, evaluation: Corpus, corpus: Corpus):
        self._evaluation = evaluation
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._evaluation) + len(self._corpus)

    def __getitem__(self, row: int, /) -> Document:
        return self.number(row - len(self._evaluation))

    def number(self, number: int) -> Document:
        """The document of a number, which is below 0 for evaluation sets."""
        if number < 0:
            return self._evaluation[number + len(self._evaluation)]
        return self._corpus[number]


def _evaluation(config: DedupeConfig, folder: epath.Path) -> Corpus:
    if not config.paths:
        return []
    folder.mkdir()
    if not records.write(folder, dedupe.evaluation_documents(config)):
        raise dedupe.no_evaluation_text(config)
    return records.Records.open(folder, records.file_names(folder))


def _write_sketches(documents: Corpus, config: DedupeConfig, path: epath.Path) -> None:
    dtype = np.dtype(
        [
            ("words", "<u8", (2,)),
            ("text", "<u8"),
            ("compared", "?"),  # has words, and so keys
            ("keys", "<i8", (config.minhash.bands,)),
        ]
    )
    with (
        NpyWriter(path, dtype) as file,
        progress.bar(total=len(documents), unit="documents", label="sketches") as bar,
    ):
        for row in range(len(documents)):
            sketch = dedupe.sketch(documents[row].text, config)
            record = np.zeros(1, dtype)
            record["words"] = np.frombuffer(sketch.words, "<u8")
            record["text"] = np.frombuffer(sketch.text, "<u8")
            if len(sketch.keys):
                record["compared"] = True
                record["keys"] = sketch.keys
            file.append(record)
            bar.update()


def _pairs(sketches: HostArray, evaluation: int) -> tuple[HostArray, int]:
    """Pairs to compare, int64 [p, 2], each once; and how many were left out."""
    pairs = np.zeros((0, 2), np.int64)
    left_out = 0
    compared = np.flatnonzero(sketches["compared"])
    for band in range(sketches["keys"].shape[1]):
        found: list[tuple[int, int]] = []
        keys = np.asarray(sketches["keys"][compared, band])
        for places in _groups(keys):
            rows = compared[places]
            contents = map(tuple, sketches["words"][rows].tolist())
            numbers = (rows - evaluation).tolist()
            more, out = near_duplicates.pairs_of(zip(numbers, contents, strict=True))
            found += more
            left_out += out
        new = np.asarray(found, np.int64).reshape(-1, 2)
        pairs = np.unique(np.concatenate([pairs, new]), axis=0)
    return pairs, left_out


def _groups(keys: HostArray) -> Iterator[HostArray]:
    """Places of equal keys [n] or [n, c], ascending, where there are several."""
    columns = keys if keys.ndim == 2 else keys[:, None]
    order = np.lexsort(columns.T)
    ordered = columns[order]
    begins = np.any(ordered[1:] != ordered[:-1], axis=1)
    bounds = np.concatenate([[0], np.flatnonzero(begins) + 1, [len(keys)]])
    for place in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[place] : bounds[place + 1]]
