"""Turns articles of sections into plain records, for the corpus ``text_files``.

Reads JSON lines ``{id, title, sections: [[heading, [paragraph …]] …]}`` and writes
JSON lines ``{id, title, text}``, where the text has every heading and paragraph on a
line of its own. Both files may end in ``.xz``. Only one article is held at a time.

    python tests/benchmarks/prepare_wiki2019.py \
        --input=open.jsonl.xz --output=wiki.jsonl [--articles=2000 [--seed=0]]
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from realm_retro.errors import UserError


def plain_text(sections: list[tuple[str, list[str]]]) -> str:
    """Headings and paragraphs, one a line; the empty ones are left out."""
    lines = (
        line for heading, paragraphs in sections for line in (heading, *paragraphs)
    )
    return "\n".join(line for line in lines if line.strip())


def convert(
    source: Path, target: Path, *, articles: int | None = None, seed: int | None = None
) -> list[int]:
    """Writes `target`, in the order of `source`.

    Args:
      source: the articles, ``.jsonl`` or ``.jsonl.xz``.
      target: the file to write, replaced when all of it is written.
      articles: how many to take; None for all.
      seed: takes a random sample of that many instead of the first.

    Returns:
      UTF-8 bytes of each text written.

    Raises:
      UserError: a line is not such an article, or there are fewer than wanted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    chosen = _chosen(source, articles, seed)
    # Hidden, so that no pattern finds it; the suffix says whether to compress.
    partial = target.with_name(f".partial-{target.name}")
    sizes = []
    with _open(partial, "wt") as file:
        for record in _records(source, chosen):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            sizes.append(len(record["text"].encode()))
    partial.replace(target)
    return sizes


def _chosen(source: Path, articles: int | None, seed: int | None) -> set[int] | range:
    """The numbers of the lines to keep."""
    with _open(source, "rt") as file:
        total = sum(1 for _ in file)
    wanted = total if articles is None else articles
    if not 0 < wanted <= total:
        raise UserError(f"{source}: has {total} articles, cannot take {wanted}")
    if seed is None:
        return range(wanted)
    return set(random.Random(seed).sample(range(total), wanted))


def _records(source: Path, chosen: set[int] | range) -> Iterator[dict[str, Any]]:
    with _open(source, "rt") as file:
        for number, line in enumerate(file):
            if number not in chosen:
                continue
            try:
                article = json.loads(line)
                kept = {"id": article["id"], "title": article["title"]}
                kept["text"] = plain_text(article["sections"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{source}:{number + 1}: is not an article with id, title and"
                    f" sections ({error!r})"
                ) from None
            yield kept


def _open(path: Path, mode: Literal["rt", "wt"]) -> TextIO:
    opener = lzma.open if path.suffix == ".xz" else open
    return cast("TextIO", opener(path, mode, encoding="utf-8", newline="\n"))


def main() -> None:
    """Converts and prints counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--articles", type=int, help="how many; all without it")
    parser.add_argument("--seed", type=int, help="sample them; else the first ones")
    flags = parser.parse_args()
    try:
        sizes = convert(
            flags.input, flags.output, articles=flags.articles, seed=flags.seed
        )
    except (UserError, OSError) as error:
        parser.exit(2, f"prepare_wiki2019: error: {error}\n")
    print(
        f"{flags.output}: {len(sizes):,} articles, {sum(sizes):,} bytes of text;"
        f" mean {statistics.fmean(sizes):,.0f}, median {statistics.median(sizes):,.0f},"
        f" largest {max(sizes):,}, empty {sizes.count(0)}"
    )


if __name__ == "__main__":
    main()
