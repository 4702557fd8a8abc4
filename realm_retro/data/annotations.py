"""Salient spans that another program found: a line of JSON for each document."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import pathlib
import zlib
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from realm_retro.data.passages import PassageStore
from realm_retro.errors import UserError
from realm_retro.typing import HostArray

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError)
_MAX_PLACE = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Spans by document.

    Attributes:
      by_document: row of the document → int64 [s, 2], [start, end) in bytes of its
        UTF-8 text, ascending.
      unknown: ids in the file that the corpus does not have.
    """

    by_document: Mapping[int, HostArray]
    unknown: int

    def of_passage(
        self, document: int, start: int, end: int
    ) -> tuple[list[tuple[int, int]], int]:
        """The spans of a passage at bytes [start, end) of its document.

        Returns:
          Those that lie in it whole, in bytes of the passage's text; and how many
          begin in it but go beyond its end.
        """
        spans = self.by_document.get(document)
        if spans is None:
            return [], 0
        begins = spans[(spans[:, 0] >= start) & (spans[:, 0] < end)]
        inside = begins[begins[:, 1] <= end] - start
        return [(a, b) for a, b in inside.tolist()], len(begins) - len(inside)


def read(path: str, store: PassageStore) -> Annotations:
    """Reads annotations of a store's documents.

    Raises:
      UserError: the file cannot be read, or a line is not an annotation.
    """
    rows = {store.document_id(row): row for row in range(store.num_documents)}
    found: dict[int, HostArray] = {}
    unknown = 0
    file = pathlib.Path(path).expanduser()
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                origin = f"{path}:{number}"
                identity, spans = _annotation(line, origin)
                if identity not in rows:
                    unknown += 1
                    continue
                row = rows[identity]
                if row in found:
                    raise UserError(
                        f"{origin}: annotates {identity!r} a second time; give all"
                        " spans of a document in one line"
                    )
                size = len(store.document_text(row).encode())
                if len(spans) and spans.max() > size:
                    raise UserError(
                        f"{origin}: has a span up to byte {spans.max()}, but the text"
                        f" of {identity!r} has {size} bytes; annotate the same corpus,"
                        " and count bytes of UTF-8"
                    )
                found[row] = spans
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"config.spans.path: there is no file {path!r}") from None
    except _DAMAGED as error:
        raise UserError(f"{path}: is damaged or cut short ({error})") from None
    return Annotations(found, unknown)


def _open(path: pathlib.Path) -> IO[str]:
    opener: Any = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")


def _annotation(line: str, origin: str) -> tuple[str, HostArray]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not JSON ({error})") from None
    if not isinstance(record, dict) or not {"id", "spans"} <= record.keys():
        raise UserError(
            f"{origin}: is not an annotation; it needs"
            ' {"id": document, "spans": [[start, end], …]}'
        )
    identity, spans = record["id"], record["spans"]
    if not isinstance(identity, str | int):
        raise UserError(f"{origin}: the id is {type(identity).__name__}, not a text")
    if not _are_spans(spans):
        raise UserError(
            f"{origin}: the spans of {identity!r} are not a list of [start, end] with"
            " 0 <= start < end, in bytes"
        )
    return str(identity), np.asarray(sorted(spans), np.int64).reshape(-1, 2)


def _are_spans(spans: Any) -> bool:
    return isinstance(spans, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(place) is int for place in span)
        and 0 <= span[0] < span[1] <= _MAX_PLACE
        for span in spans
    )
