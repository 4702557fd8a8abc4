"""What a corpus is: documents that can be asked for in any order.

The artefact (kind ``corpus``) is a TFDS dataset; `realm_retro.data.datasets` writes and
reads it. What stands here needs no TFDS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from etils import epath

from realm_retro import artifacts
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

KIND = "corpus"
FORMAT_VERSION = 1
MADE_BY = "realm_retro.cli.prepare"
load_manifest = artifacts.loader(KIND, FORMAT_VERSION, MADE_BY)

TFDS_PREFIX = "tfds:"
NAMED = 10  # places that a report names before it only counts
_DEDUPE_SAID = {
    "exact": "{} documents were dropped: another has the same text",
    "near": "{} documents were dropped: another is nearly the same",
    "evaluation": "{} documents were dropped: config.dedupe.against has them",
    "pairs_left_out": "{} pairs were not compared, for too many documents are alike",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      id: unique in its corpus and stable between runs.
      title: shown to people; may be empty and is not part of the text.
      text: never empty in a finished corpus.
      origin: where it was read, e.g. ``articles.jsonl:17``.
    """

    id: str
    title: str
    text: str
    origin: str = ""


class Corpus(Protocol):
    """Random access to documents; the order is fixed."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Document: ...


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Which documents to read (``config.corpus``).

    Attributes:
      source: ``vital_articles``, ``text_files``, or ``tfds:NAME[/CONFIG]:SPLIT`` for
        any TFDS dataset with a text feature, e.g. ``tfds:wiki40b/en:train``.
      language: of ``vital_articles``: ``en``, ``fr`` or ``es``.
      articles: of ``vital_articles``: so many of them. Those that the questions of
        this package ask about come first, then others by the hash of their names; 0
        takes all.
      path: of ``text_files``: a folder (searched with its subfolders), a file, a glob
        pattern, or several of these.
      text_field: of .jsonl files and TFDS datasets: the field with the text, a string
        or a list of strings, which are joined by newlines.
      title_field: the field with the title; a document without one has no title.
      id_field: the field with a unique id; by default ids are made from file name and
        line, or from the position in the dataset.
      data_dir: of TFDS datasets: where they are; TFDS's own default if empty.
    """

    source: str = "vital_articles"
    language: str = "en"
    articles: int = 0
    path: str | tuple[str, ...] = ""
    text_field: str = "text"
    title_field: str = "title"
    id_field: str = ""
    data_dir: str = ""

    def __post_init__(self):
        known = ("vital_articles", "text_files")
        if self.source not in known and not self.source.startswith(TFDS_PREFIX):
            raise UserError(
                f"config.corpus.source is {self.source!r}; choose one of"
                f" {', '.join(known)}, {TFDS_PREFIX}NAME[/CONFIG]:SPLIT"
            )
        if self.source == "text_files" and not self.paths:
            raise UserError(
                "config.corpus.path is empty; text_files needs a folder, a file or a"
                " glob pattern"
            )
        if self.articles < 0:
            raise UserError(
                f"config.corpus.articles={self.articles} is negative; 0 takes all"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """`path`, always as a tuple."""
        paths = (self.path,) if isinstance(self.path, str) else self.path
        return tuple(path for path in paths if path)


@dataclasses.dataclass
class Report:
    """What happened to a corpus while it was read; nothing goes missing unnoticed.

    Attributes:
      documents: kept.
      text_bytes: their UTF-8 size.
      empty: documents without a visible character, left out.
      not_taken: of ``vital_articles``, beyond ``config.corpus.articles``.
      untitled: kept, without a title.
      invalid_utf8: kept, with invalid UTF-8 replaced by U+FFFD.
      invalid_utf8_in: where the first of these are.
      ignored_files: files of other kinds in the folders searched.
      cut_files: plain text files cut into several documents for their size.
      dedupe: counts of what ``config.dedupe`` did, see `dedupe_writer.publish`; empty
        where it is off.
      attribution: whose text it is and under which licence.
    """

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    not_taken: int = 0
    untitled: int = 0
    invalid_utf8: int = 0
    invalid_utf8_in: list[str] = dataclasses.field(default_factory=list)
    ignored_files: int = 0
    cut_files: int = 0
    dedupe: JsonDict = dataclasses.field(default_factory=dict)
    attribution: str = ""

    def invalid(self, place: str) -> None:
        """Counts one document with invalid UTF-8."""
        self.invalid_utf8 += 1
        if len(self.invalid_utf8_in) < NAMED:
            self.invalid_utf8_in.append(place)

    def keep(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Passes on documents that hold text, and counts all."""
        for document in documents:
            if not document.text.strip():
                self.empty += 1
                continue
            self.documents += 1
            self.text_bytes += len(document.text.encode())
            self.untitled += not document.title
            yield document

    def lines(self) -> list[str]:
        """What a reader of the console should know, a line each."""
        said = [
            (self.empty, "{} empty documents were left out"),
            (self.not_taken, "{} articles are beyond config.corpus.articles"),
            (self.untitled, "{} documents have no title"),
            (self.ignored_files, "{} files of other kinds were ignored"),
            (self.cut_files, "{} large text files were cut into several documents"),
            *((self.dedupe.get(key, 0), text) for key, text in _DEDUPE_SAID.items()),
        ]
        lines = [text.format(f"{count:,}") for count, text in said if count]
        if self.invalid_utf8:
            places = ", ".join(self.invalid_utf8_in)
            more = " …" if self.invalid_utf8 > len(self.invalid_utf8_in) else ""
            lines.append(
                f"{self.invalid_utf8:,} documents had invalid UTF-8, replaced by"
                f" U+FFFD: {places}{more}"
            )
        return lines + ([self.attribution] if self.attribution else [])

    def as_meta(self) -> JsonDict:
        """For the manifest."""
        return dataclasses.asdict(self)


def batched_by_size(
    documents: Iterable[Document], *, max_chars: int = 4 << 20
) -> Iterator[list[Document]]:
    """Groups documents so that a group holds little text, or one long document."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and size + len(document.text) > max_chars:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.text)
    if group:
        yield group


def sample(corpus: Corpus, *, seed: int, max_bytes: int) -> Iterator[str]:
    """Texts of documents drawn without replacement, until `max_bytes` are reached."""
    size = 0
    for row in np.random.default_rng(seed).permutation(len(corpus)):
        text = corpus[int(row)].text
        yield text
        size += len(text.encode())
        if size >= max_bytes:
            return


def open_stage(
    config: CorpusConfig, directory: epath.PathLike, *, dedupe: JsonDict | None = None
) -> artifacts.Stage:
    """The stage that `datasets.build` writes; `Stage.finished` tells whether it ran.

    Args:
      config: the source.
      directory: of the artefact.
      dedupe: from `realm_retro.data.dedupe.settings`.

    Raises:
      UserError: the directory holds a corpus of other settings.
    """
    settings = dataclasses.asdict(config)
    # Corpora from before there was a choice are the same.
    if not config.articles:
        del settings["articles"]
    if dedupe:
        settings["dedupe"] = dedupe
    return artifacts.Stage.open(
        directory,
        kind=KIND,
        format_version=FORMAT_VERSION,
        config=settings,
        parents={},
        made_by=MADE_BY,
    )
