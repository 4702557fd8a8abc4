"""Documents from files: .txt, .md, .py (one a file) and .jsonl (one a line).

Each may be compressed (.gz, .xz). Hidden files are passed over. Files are read as a
stream; plain text beyond `MAX_DOCUMENT_BYTES` is cut at line ends.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from realm_retro import progress
from realm_retro.data.corpus import CorpusConfig, Document, Report
from realm_retro.errors import UserError

# One document never takes more memory than a few times this.
MAX_DOCUMENT_BYTES = 64 << 20

_KINDS = (".txt", ".md", ".py", ".jsonl")
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


def text_files(config: CorpusConfig, report: Report) -> Iterator[Document]:
    """Yields the documents of all files that ``config.path`` names, sorted by name.

    Raises:
      UserError: nothing matches, or a file is damaged, forbidden or not as the config
        says.
    """
    files = find(config.paths, report)
    total = sum(path.stat().st_size for path in files.values())
    with progress.bar(total=total, unit="B", label="corpus") as bar:
        for name, path in files.items():
            yield from read_file(name, path, config, report, advance=bar.update)


def read_file(
    name: str,
    path: pathlib.Path,
    config: CorpusConfig,
    report: Report,
    advance: Callable[[int], Any] = lambda size: None,
) -> Iterator[Document]:
    """Yields the documents of one file.

    Args:
      name: of the file among those of `find`; ids begin with it.
      path: where it is.
      config: the fields of its records.
      report: takes what is wrong with it.
      advance: called with the bytes of the file that were read meanwhile.

    Raises:
      UserError: it is damaged, forbidden or not as the config says.
    """
    with _readable(path), path.open("rb") as raw:
        opener = _OPENERS.get(path.suffix)
        stream: Any = opener(raw) if opener else raw
        before = 0
        for document in _documents(stream, name, path, config, report):
            yield document
            advance(raw.tell() - before)
            before = raw.tell()


def document_from(
    row: Mapping[str, Any],
    *,
    default_id: str,
    origin: str,
    config: CorpusConfig,
    report: Report,
) -> Document:
    """Makes a document of a record, by the fields that the config names.

    Raises:
      UserError: a field is missing or of the wrong type.
    """
    text = _field(row, config.text_field, origin, "text_field")
    if isinstance(text, (list, tuple)) and all(isinstance(t, str) for t in text):
        text = "\n".join(text)
    if not isinstance(text, str | None):
        raise UserError(
            f"{origin}: field {config.text_field!r} is {type(text).__name__}, not a"
            " string or a list of strings; set config.corpus.text_field"
        )
    identity = default_id
    if config.id_field:
        identity = _field(row, config.id_field, origin, "id_field")
        if not isinstance(identity, str | int) or identity == "":
            raise UserError(
                f"{origin}: field {config.id_field!r} is {identity!r}, which is not an"
                " id; set config.corpus.id_field to another field, or to nothing"
            )
    title = row.get(config.title_field)
    if isinstance(title, (list, tuple, dict)):
        raise UserError(
            f"{origin}: field {config.title_field!r} is {type(title).__name__}, not a"
            " title; set config.corpus.title_field to another field"
        )
    values = [str(identity), "" if title is None else str(title), text or ""]
    # JSON can spell half of a surrogate pair, which has no UTF-8 form.
    if any(_SURROGATE.search(value) for value in values):
        report.invalid(origin)
        values = [_SURROGATE.sub("\ufffd", value) for value in values]
    return Document(*values, origin=origin)


def decode(data: bytes, origin: str, report: Report) -> str:
    """Text from UTF-8; what is not becomes U+FFFD and is counted."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        report.invalid(origin)
        return data.decode(errors="replace")


def find(patterns: tuple[str, ...], report: Report) -> dict[str, pathlib.Path]:
    """Files by document name, sorted; in a single folder names are relative to it.

    Args:
      patterns: folders, files or glob patterns.
      report: takes how many files of other kinds there are.

    Raises:
      UserError: one of the patterns matches nothing that can be read.
    """
    files: dict[str, pathlib.Path] = {}
    for pattern in patterns:
        root = pathlib.Path(pattern).expanduser()
        found = [path for path in _matches(root) if path.is_file()]
        if not found:
            raise UserError(
                f"config.corpus.path: {pattern!r} matches no file (looked from"
                f" {pathlib.Path.cwd()}); known are {_known()}"
            )
        base = root if root.is_dir() and len(patterns) == 1 else None
        for path in found:
            name = (path.relative_to(base) if base else path).as_posix()
            if _kind(path):
                files[name] = path
            else:
                report.ignored_files += 1
    if not files:
        raise UserError(
            f"config.corpus.path: {', '.join(patterns)} holds no readable file; these"
            f" are {_known()}"
        )
    return dict(sorted(files.items()))


def _known() -> str:
    return f"{', '.join(_KINDS)}, each also with {' or '.join(_OPENERS)}"


def _matches(root: pathlib.Path) -> list[pathlib.Path]:
    if root.is_file():  # even if its name looks like a pattern
        return [root]
    pattern = f"{glob.escape(str(root))}/**" if root.is_dir() else str(root)
    # Passes over hidden files and folders, such as .git.
    return [pathlib.Path(path) for path in glob.glob(pattern, recursive=True)]


def _kind(path: pathlib.Path) -> str:
    name = path.name
    for compression in _OPENERS:
        name = name.removesuffix(compression)
    suffix = pathlib.PurePath(name).suffix
    return suffix if suffix in _KINDS else ""


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise UserError(
            f"{path}: is damaged or cut short ({error}); replace it or leave it out of"
            " config.corpus.path"
        ) from None
    except PermissionError:
        raise UserError(
            f"{path}: may not be read; change its permissions or leave it out of"
            " config.corpus.path"
        ) from None


def _documents(
    stream: IO[bytes],
    name: str,
    path: pathlib.Path,
    config: CorpusConfig,
    report: Report,
) -> Iterator[Document]:
    if _kind(path) != ".jsonl":
        yield from _parts(stream, name, path, report)
        return
    for number, line in enumerate(stream, start=1):
        origin = f"{path}:{number}"
        text = decode(line.removeprefix(_BOM), origin, report)
        if text.strip():
            yield document_from(
                _json_object(text, origin),
                default_id=f"{name}:{number}",
                origin=origin,
                config=config,
                report=report,
            )


def _parts(
    stream: IO[bytes], name: str, path: pathlib.Path, report: Report
) -> Iterator[Document]:
    title = path.name.rsplit(_kind(path), 1)[0]
    part = 0
    while lines := stream.readlines(MAX_DOCUMENT_BYTES):
        part += 1
        report.cut_files += part == 2
        data = b"".join(lines)
        yield Document(
            id=name if part == 1 else f"{name}#{part}",
            title=title if part == 1 else f"{title} ({part})",
            text=decode(data.removeprefix(_BOM), str(path), report),
            origin=str(path),
        )
    if not part:
        yield Document(id=name, title=title, text="", origin=str(path))


def _json_object(text: str, origin: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{origin}: is a JSON {type(row).__name__}, not an object")
    return row


def _field(row: Mapping[str, Any], field: str, origin: str, setting: str) -> Any:
    if field not in row:
        raise UserError(
            f"{origin}: has no field {field!r}; it has: {', '.join(row) or 'none'};"
            f" set config.corpus.{setting}"
        )
    return row[field]
