"""The last page of the quickstart's REALM half: what was measured, and answers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from realm_retro.cli import quickstart_report as report
from realm_retro.cli.quickstart_stages import ANSWERS, Stage
from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

RECALLS = ("1", "5", "20")
MEASURES = {"exact_match": "exact match", "f1": "F1", "regex_match": "regex match"}
# Passages that are shown below an answer, and characters of each.
_PASSAGES = 2
_SHOWN = 2 * report.WIDTH

NO_QUESTIONS = (
    "The questions of this package are over its own corpus, so nothing was asked here."
    " Name your own with --config.qa.questions=FILE.jsonl (fields question and answers)"
    " and run the same command again."
)


def page(
    workdir: epath.Path, road: Sequence[Stage], stages: Mapping[str, JsonDict]
) -> str:
    """The whole page as text.

    Args:
      workdir: where the stages have written.
      road: the stages.
      stages: of the ledger, by name.

    Raises:
      UserError: a file is missing or is not JSON.
    """
    outputs = {stage.name: workdir / stage.output for stage in road}
    corpus = report.read_json(workdir / "corpus" / "manifest.json")
    parts = [pretraining(workdir, outputs["train"].parent)]
    if "ask:finetune" in outputs:
        start = report.read_json(outputs["evaluate_qa:zero_shot"])
        trained = report.read_json(outputs["evaluate_qa:finetune"])
        name = outputs["train:finetune"].parent.name
        run = outputs["ask:finetune"].parent
        predictions = read_lines(run / "predictions_qa.jsonl")
        parts += [
            quality(start, trained, name=name),
            answers(read_lines(run / ANSWERS), predictions),
        ]
    else:
        parts.append(textwrap.fill(NO_QUESTIONS, report.WIDTH))
    parts.append(report.stage_table(stages))
    if attribution := corpus["meta"].get("attribution"):
        parts.append(textwrap.fill(attribution, report.WIDTH, break_on_hyphens=False))
    return "\n" + "\n\n".join(parts)


def pretraining(workdir: epath.Path, run: epath.Path) -> str:
    """What pre-training learnt, and which index it searched."""
    passages = report.read_json(workdir / "passages" / "manifest.json")["meta"]
    records = read_lines(run / "metrics.jsonl")
    first, last = records[0], records[-1]
    lines = [
        f"Pre-training: {last['step']:,} steps over {passages['passages']:,} passages,"
        f" −log p(y|x) {first['loss']:.3f} → {last['loss']:.3f}",
        f"Masked words: −log p {last['mlm']:.3f} with what is retrieved,"
        f" {last['null_mlm']:.3f} with the null document alone",
    ]
    searched = [record["index_step"] for record in records]
    if searched[0] == searched[-1]:
        lines.append(f"Index: that of step {searched[0]:.0f}, never refreshed")
    else:
        age = sum(record["staleness"] for record in records) / len(records)
        lines.append(
            f"Index: that of step {searched[0]:.0f} at first, of step"
            f" {searched[-1]:.0f} at last, {age:.0f} steps old on average"
        )
    return "\n".join(lines)


def quality(start: JsonDict, trained: JsonDict, *, name: str) -> str:
    """Recall and the reader's scores on held-out questions, in percent.

    Args:
      start: evaluation before any training.
      trained: evaluation of the fine-tuned run.
      name: of that run.
    """
    found = {("", row["label"]): row for row in start["results"]}
    found |= {("qa", row["label"]): row for row in trained["results"]}
    wanted = {
        "before training": ("", "zero-shot"),
        "pre-trained": ("qa", "zero-shot"),
        "fine-tuned": ("qa", name),
        "BM25": ("qa", "BM25"),
    }
    rows = {label: found[key] for label, key in wanted.items() if key in found}
    scores = [key for key in MEASURES if any(row.get(key) for row in rows.values())]
    header = ["", *(f"recall@{k}" for k in RECALLS), *(MEASURES[key] for key in scores)]
    cells = [
        [
            label,
            *(_percent(row["recall"].get(k)) for k in RECALLS),
            *(_percent(row.get(key)) for key in scores),
        ]
        for label, row in rows.items()
    ]
    return (
        f"Held-out questions: {trained['questions']:,}, of which"
        f" {trained['answerable']:,} have an answer in {trained['passages']:,} passages"
        "\n% (95 % interval over questions)\n\n" + report.table(header, cells)
    )


def _percent(value: JsonDict | None) -> str:
    if value is None:
        return "–"
    low, high = (f"{100 * value[name]:.0f}" for name in ("low", "high"))
    return f"{100 * value['value']:.1f} ({low}…{high})"


def answers(given: Sequence[JsonDict], predictions: Sequence[JsonDict]) -> str:
    """Questions, answers and their evidence.

    Args:
      given: what ``ask --json`` said.
      predictions: of the evaluation, with the right answers.
    """
    right = {record["question"]: record for record in predictions}
    lines = ["Held-out questions, those that it is surest about"]
    for answer in given:
        record = right.get(answer["question"])
        lines += ["", *_one(answer, record)]
    return "\n".join(lines)


def _one(answer: JsonDict, record: JsonDict | None) -> Iterator[str]:
    yield from report.quote(answer["question"], "  ")
    wanted = ""
    if record is not None:
        known = " | ".join(record["answers"])
        wanted = ", right" if record["correct"] else f", wanted: {known}"
    said = f"{answer['text'] or 'no answer'} (p = {answer['probability']:.2f}){wanted}"
    yield from report.quote(f"▸ {said}", "  ")
    for passage in answer["passages"][:_PASSAGES]:
        name = passage["title"] or passage["document"]
        yield f"    · {name} (p(z|x) = {passage['probability']:.2f})"
        yield from report.quote(marked(passage["text"], passage["span"]), "        ")


def marked(text: str, span: Sequence[int] | None, most: int = _SHOWN) -> str:
    """A passage cut to about `most` characters around the answer, which is marked."""
    start, end = span or (0, 0)
    first = max(0, min(start - (most - (end - start)) // 2, len(text) - most))
    last = max(first + most, end)
    inside = text[first:last]
    if span:
        inside = f"{text[first:start]}[[{text[start:end]}]]{text[end:last]}"
    left, right = "…" if first else "", "…" if last < len(text) else ""
    return left + inside + right


def read_lines(path: epath.Path) -> list[Any]:
    """The records of a .jsonl file that a stage wrote.

    Raises:
      UserError: it cannot be read, or holds none.
    """
    try:
        found = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it and run again"
        ) from None
    if not found:
        raise UserError(f"{path}: is empty; delete it and run again")
    return found
