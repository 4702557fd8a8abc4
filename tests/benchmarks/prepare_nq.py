"""Makes corpus and questions of a study: articles, and passages that answer questions.

Reads   --wiki       articles, as `prepare_wiki2019.py` does
        --gold       JSON lines {question, answers, title, passage}, or a folder of them
        --questions  JSON lines {question, answers}
Writes  OUTPUT/corpus.jsonl  {id, title, text}: some articles, drawn at random, and each
                             gold passage as a document of its own
        OUTPUT/gold.jsonl    {id, question, answers, document}, for evaluation
        OUTPUT/train.jsonl   {id, question, answers}, for training

    python tests/benchmarks/prepare_nq.py --wiki=open.jsonl.xz \
        --gold=nq_gold_passages --questions=open_train.jsonl.xz \
        --articles=400 --output=nq

A passage that several questions have is one document. A question that is both gold and
for training is left out of training; capitals and punctuation make no difference.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import prepare_wiki2019 as wiki

from realm_retro.errors import UserError
from realm_retro.text.words import normalise

_SUFFIXES = (".jsonl", ".jsonl.xz")
Record = dict[str, Any]


def prepare(
    articles: Path, gold: Path, questions: Path, output: Path, *, count: int, seed: int
) -> dict[str, int]:
    """Writes the three files, each whole or not at all.

    Args:
      articles: see ``--wiki``.
      gold: a file, or a folder of files.
      questions: to train on.
      output: a folder, created if needed.
      count: how many articles to draw.
      seed: of that draw.

    Returns:
      What was counted, in words.

    Raises:
      UserError: a line is not such a record, or there are fewer articles than wanted.
    """
    asked = [record for path in _files(gold) for record in _gold_records(path)]
    documents, owner = gold_documents(asked)
    train, left_out = training(_records(questions, ("question", "answers")), asked)
    output.mkdir(parents=True, exist_ok=True)
    corpus = output / "corpus.jsonl"
    # Hidden, so that no pattern finds it.
    partial = corpus.with_name(f".all-{corpus.name}")
    sizes = wiki.convert(articles, partial, articles=count, seed=seed)
    titles = {document["title"] for document in documents}
    with partial.open(encoding="utf-8", newline="\n") as file:
        shared = sum(json.loads(line)["title"] in titles for line in file)
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(documents))
    partial.replace(corpus)
    _write(
        output / "gold.jsonl",
        (
            {
                "id": f"gold-{number:05d}",
                "question": record["question"],
                "answers": record["answers"],
                "document": document,
            }
            for number, (record, document) in enumerate(zip(asked, owner, strict=True))
        ),
    )
    _write(output / "train.jsonl", train)
    return {
        "articles": len(sizes),
        "bytes of articles": sum(sizes),
        "articles with the title of a gold passage": shared,
        "gold questions": len(asked),
        "gold documents": len(documents),
        "training questions": len(train),
        "left out of training, they are gold": left_out,
    }


def gold_documents(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Each passage once, as a document, and the document's id of each record."""
    documents: dict[tuple[str, str], Record] = {}
    owner = []
    for record in records:
        key = (record["title"], record["passage"])
        number = f"gold-passage-{len(documents):05d}"
        new = {"id": number, "title": record["title"], "text": record["passage"]}
        owner.append(documents.setdefault(key, new)["id"])
    return list(documents.values()), owner


def training(
    records: Iterable[Record], gold: Iterable[Record]
) -> tuple[list[Record], int]:
    """The records whose question is not gold, and how many were left out."""
    known = {normalise(record["question"]) for record in gold}
    kept, left_out = [], 0
    for number, record in enumerate(records):
        if normalise(record["question"]) in known:
            left_out += 1
            continue
        fields = {name: record[name] for name in ("question", "answers")}
        kept.append({"id": f"train-{number:05d}", **fields})
    return kept, left_out


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not found:
        raise UserError(f"{path}: holds no file that ends in {' or '.join(_SUFFIXES)}")
    return found


def _gold_records(path: Path) -> Iterator[Record]:
    return _records(path, ("question", "answers", "title", "passage"))


def _records(path: Path, fields: tuple[str, ...]) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: is not JSON ({error})") from None
            missing = [
                name
                for name in fields
                if not isinstance(record, dict) or not record.get(name)
            ]
            if missing:
                raise UserError(f"{path}:{number}: has no {', '.join(missing)}")
            yield record


def _open(path: Path) -> TextIO:
    opener = lzma.open if path.suffix == ".xz" else open
    return cast("TextIO", opener(path, "rt", encoding="utf-8", newline="\n"))


def _lines(records: Iterable[Record]) -> Iterator[str]:
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write(path: Path, records: Iterable[Record]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(records))
    partial.replace(path)


def main() -> None:
    """Prepares, and prints counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("wiki", "gold", "questions", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--articles", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    try:
        counts = prepare(
            flags.wiki,
            flags.gold,
            flags.questions,
            flags.output,
            count=flags.articles,
            seed=flags.seed,
        )
    except (UserError, OSError) as error:
        parser.exit(2, f"prepare_nq: error: {error}\n")
    for name, value in counts.items():
        print(f"{flags.output}: {value:,} {name}")


if __name__ == "__main__":
    main()
