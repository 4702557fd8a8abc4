"""Questions with answers, from .jsonl files or TFDS datasets.

A record is a JSON object, one a line; the file may be compressed (.gz, .xz):

    {"question": "who wrote emma", "answers": ["Jane Austen", "Austen"]}
    {"id": 7, "question": "When did Elvis die?", "answer_regex": "(August )?1977"}

* ``answers`` (or ``answer``): a string or a list of strings. Also read are lists of
  lists (each string counts as an answer), ``{"text": […]}`` as in SQuAD,
  ``{"value": …, "aliases": […]}`` as in TriviaQA, and numbers, which point into the
  record's list ``candidates``.
* ``answer_regex``: in their place, a regular expression or a list of them.
* ``id`` (or ``question_id``): optional; file name and line otherwise.
* ``document``: optional, the id of the document of the corpus that answers it (its gold
  document); evaluation then counts how often that one is found.

Everything else in a record is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from realm_retro import artifacts
from realm_retro.data.corpus import TFDS_PREFIX
from realm_retro.errors import UserError
from realm_retro.text.answers import compile_regex

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_BOM = b"\xef\xbb\xbf"
_ANSWER_FIELDS = ("answers", "answer", "answer_regex")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: unique among the questions of its source.
      question: as asked.
      answers: at least one, none empty, none twice; in their order.
      is_regex: the answers are regular expressions that compile.
      document: id of its gold document; empty where none is known.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    is_regex: bool = False
    document: str = ""


def load_questions(
    source: str | os.PathLike[str], *, data_dir: str = ""
) -> list[Question]:
    """Reads all questions of a source; one that is wrong stops it.

    Args:
      source: a .jsonl file, or ``tfds:NAME[/CONFIG][:SPLIT]`` for a TFDS dataset, e.g.
        ``tfds:natural_questions_open:validation``, ``tfds:web_questions:test`` or
        ``tfds:trivia_qa/unfiltered.nocontext:train``. The split is ``train`` where
        none is named.
      data_dir: of TFDS datasets: where they are; TFDS's own default if empty.

    Raises:
      UserError: the source cannot be read or holds no question, or a question has no
        text, no answers, or an expression that does not compile; names file and line.
    """
    name = os.fspath(source)
    if name.startswith(TFDS_PREFIX):
        records = _tfds_records(name, data_dir)
    else:
        records = _file_records(pathlib.Path(name).expanduser())
    questions: list[Question] = []
    origins: dict[str, str] = {}
    for origin, default_id, record in records:
        try:
            question = question_from(record, origin=origin, default_id=default_id)
        except RecursionError:
            raise UserError(f"{origin}: has lists within lists, too deep") from None
        if question.id in origins:
            raise UserError(
                f"{origin}: has the id {question.id!r} of {origins[question.id]}; give"
                " each question its own id, or none"
            )
        origins[question.id] = origin
        questions.append(question)
    if not questions:
        raise UserError(
            f"{name}: holds no question; each line is an object such as"
            ' {"question": "who wrote emma", "answers": ["Jane Austen"]}'
        )
    return questions


def fingerprint(questions: Sequence[Question]) -> str:
    """Of ids, questions and answers; the same wherever they were read from."""
    # Without `document`: which passages have an answer does not depend on it.
    return artifacts.fingerprint_of(
        [(q.id, q.question, q.answers, q.is_regex) for q in questions]
    )


def question_from(
    record: Mapping[str, Any], *, origin: str, default_id: str
) -> Question:
    """Makes a question of a record; see the module docstring.

    Args:
      record: JSON values.
      origin: where it was read, ``file:line``, for errors.
      default_id: its id if it has none.

    Raises:
      UserError: something is missing or of the wrong type.
    """
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise UserError(
            f"{origin}: 'question' is {_shown(question)}, not a text; it has the"
            f" fields: {', '.join(record) or 'none'}"
        )
    identity = record.get("id", record.get("question_id", default_id))
    document = record.get("document")
    document = "" if document is None else document
    for name, value in (("id", identity), ("document", document)):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(
                f"{origin}: {name!r} is {_shown(value)}, not a text or number"
            )
    given = [field for field in _ANSWER_FIELDS if record.get(field) is not None]
    if len(given) != 1:
        said = f"has both {' and '.join(given)}" if given else "has no answers"
        raise UserError(
            f"{origin}: {said}; give each question 'answers' (a list of texts) or"
            " 'answer_regex'"
        )
    field = given[0]
    answers = list(_texts(record[field], record, f"{origin}: {field!r}"))
    if not answers:
        raise UserError(
            f"{origin}: {field!r} holds no answer; add one or drop the line"
        )
    _check_unicode(str(identity), question, str(document), *answers, origin=origin)
    for answer in answers:
        if not answer.strip():
            raise UserError(f"{origin}: {field!r} holds an empty answer; remove it")
        if field == "answer_regex":
            _check_regex(answer, origin)
    return Question(
        id=str(identity),
        question=question,
        answers=tuple(dict.fromkeys(answers)),
        is_regex=field == "answer_regex",
        document=str(document),
    )


def _texts(value: Any, record: Mapping[str, Any], what: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, record, what)
    elif isinstance(value, dict) and ("text" in value or "value" in value):
        for name in ("text", "value", "aliases"):
            yield from _texts(value.get(name, []), record, what)
    elif isinstance(value, int) and not isinstance(value, bool):
        candidates = record.get("candidates")
        if not isinstance(candidates, list) or not 0 <= value < len(candidates):
            raise UserError(f"{what} holds {value}, which is no place in 'candidates'")
        yield from _texts(candidates[value], {}, what)
    else:
        raise UserError(f"{what} holds {_shown(value)}, not a text or a list of texts")


def _check_unicode(*texts: str, origin: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{origin}: holds half of a surrogate pair (\\ud800 to \\udfff), which"
            " stands for no character"
        ) from None


def _check_regex(pattern: str, origin: str) -> None:
    what = f"{origin}: the answer_regex {_shown(pattern)}"
    try:
        compiled = compile_regex(pattern)
    except ValueError as error:
        raise UserError(f"{what} does not compile ({error})") from None
    if compiled.match(""):
        raise UserError(f"{what} accepts every answer, even none; make it narrower")


def _file_records(path: pathlib.Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields (file:line, name:line, record) of each line that is not blank."""
    with _readable(path), path.open("rb") as raw:
        opener = _OPENERS.get(path.suffix)
        lines: Iterable[bytes] = opener(raw) if opener else raw
        for number, line in enumerate(lines, start=1):
            origin = f"{path}:{number}"
            try:
                text = line.removeprefix(_BOM).decode().strip()
                record = json.loads(text) if text else {}
            except UnicodeDecodeError as error:
                raise UserError(f"{origin}: is not UTF-8 ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{origin}: is not JSON ({error})") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{origin}: is a JSON {kind}, not an object")
            if text:
                yield origin, f"{path.name}:{number}", record


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist; questions come from a .jsonl file (also .gz, .xz)"
            f" or a TFDS dataset, {TFDS_PREFIX}NAME:SPLIT"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name one of its .jsonl files") from None
    except _DAMAGED as error:
        raise UserError(f"{path}: is damaged or cut short ({error})") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None


def _tfds_records(
    source: str, data_dir: str
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    from realm_retro.data import tfds_source  # TFDS takes a while to import

    name, _, split = source.removeprefix(TFDS_PREFIX).partition(":")
    split = split or "train"
    if not name:
        raise UserError(f"{source!r} names no dataset; write {TFDS_PREFIX}NAME:SPLIT")
    records = tfds_source.open_split(
        name, split, data_dir=data_dir, setting=source, dir_setting="data_dir"
    )
    for i in range(len(records)):
        origin = f"{name}:{split}[{i}]"
        try:
            record = tfds_source.plain(records[i])
        except UnicodeDecodeError as error:
            raise UserError(f"{origin}: is not UTF-8 ({error.reason})") from None
        yield origin, origin, record


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
