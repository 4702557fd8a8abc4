"""Precision and recall of the salient-span taggers on annotated sentences.

  python tests/benchmarks/span_tagger.py --input=sentences.jsonl.xz

The input has a line ``{"tokens": [...], "tags": [...]}`` for each sentence, with tags
``O``, ``B-X`` and ``I-X``. Such data marks names, not dates and amounts: what the
grammars of these find, and does not touch a marked name, is counted apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path

from realm_retro.errors import UserError
from realm_retro.text import names, spans
from realm_retro.text.spans import Spans, Tagger

_NO_SPACE_BEFORE = {*".,;:!?)]%'", "'s", "'re", "'ve", "'ll", "n't"}
_NO_SPACE_AFTER = {*"([$£"}


@dataclasses.dataclass
class Score:
    """Counts over sentences.

    Attributes:
      gold: names marked in the data.
      found: names found.
      exact: found with both ends as marked.
      found_touching: found that share a letter with a marked one.
      gold_touching: marked that share a letter with a found one.
      numbers: dates and amounts found, which the data does not mark.
    """

    gold: int = 0
    found: int = 0
    exact: int = 0
    found_touching: int = 0
    gold_touching: int = 0
    numbers: int = 0

    def add(self, gold: Spans, found: Spans, numbers: Spans) -> None:
        """Counts one sentence; `numbers` are the dates and amounts in it."""
        names_found = [
            s for s in found if _touches(s, gold) or not _touches(s, numbers)
        ]
        self.numbers += len(found) - len(names_found)
        self.gold += len(gold)
        self.found += len(names_found)
        self.exact += len(set(gold) & set(names_found))
        self.found_touching += sum(_touches(span, gold) for span in names_found)
        self.gold_touching += sum(_touches(span, names_found) for span in gold)

    def line(self) -> str:
        """Both kinds of precision, recall and F1, in per cent."""
        exact = _rates(self.exact, self.found, self.exact, self.gold)
        touching = _rates(
            self.found_touching, self.found, self.gold_touching, self.gold
        )
        return f"exact {exact}   touching {touching}   numbers {self.numbers}"


def sentence(tokens: list[str], tags: list[str]) -> tuple[str, Spans]:
    """The text of tokens, and the bytes of its names."""
    text = b""
    gold: Spans = []
    for i, (token, tag) in enumerate(zip(tokens, tags, strict=True)):
        tight = token in _NO_SPACE_BEFORE or (i and tokens[i - 1] in _NO_SPACE_AFTER)
        text += b"" if tight or not i else b" "
        start = len(text)
        text += token.encode()
        goes_on = i and tag == f"I-{tag[2:]}" and tags[i - 1][2:] == tag[2:]
        if tag != "O":
            gold.append((gold.pop()[0] if goes_on else start, len(text)))
    return text.decode(), gold


def read(path: Path) -> Iterator[tuple[str, Spans]]:
    """The sentences of a file, .jsonl or .jsonl.xz.

    Raises:
      UserError: a line is not a sentence.
    """
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                yield sentence(record["tokens"], record["tags"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: is not a sentence ({error})"
                ) from None


def score(tagger: Tagger, sentences: list[tuple[str, Spans]]) -> Score:
    """Runs a tagger over sentences."""
    result = Score()
    texts = [text for text, _ in sentences]
    for (text, gold), found in zip(sentences, tagger(texts), strict=True):
        amounts = spans.in_bytes(text, names.amount_chars(text))
        result.add(gold, found, spans.date_spans(text) + amounts)
    return result


def main() -> None:
    """Prints one line a tagger; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True)
    sentences = list(read(parser.parse_args().input))
    taggers = {"rules": spans.rule_tagger}
    if spans.has_spacy():
        taggers["spacy"] = spans.spacy_tagger()
    else:
        print(f"spacy is not installed; run: {spans.INSTALL}")
    print(f"{len(sentences):,} sentences, {sum(len(g) for _, g in sentences):,} names")
    for name, tagger in taggers.items():
        started = time.perf_counter()
        result = score(tagger, sentences)
        seconds = time.perf_counter() - started
        print(
            f"{name:<6} {result.line()}   {len(sentences) / seconds:,.0f} sentences/s"
        )


def _touches(span: tuple[int, int], others: Spans) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _rates(right: int, found: int, recalled: int, gold: int) -> str:
    precision, recall = right / max(found, 1), recalled / max(gold, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return f"P {precision:6.1%} R {recall:6.1%} F1 {f1:6.1%}"


if __name__ == "__main__":
    main()
