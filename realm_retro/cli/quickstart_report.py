"""The last page of the quickstart's RETRO half: what was measured, and one sample."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from realm_retro.errors import UserError
from realm_retro.typing import JsonDict

WIDTH = 78


@dataclasses.dataclass(frozen=True)
class Results:
    """What a finished run left in its workdir.

    Attributes:
      corpus: the corpus's manifest.
      index: the index's manifest.
      evaluation: ``evaluation.json`` of the run.
      generation: the first of ``generation.json``.
      stages: stage → seconds, peak_mb, resumed; from the quickstart's ledger.
    """

    corpus: JsonDict
    index: JsonDict
    evaluation: JsonDict
    generation: JsonDict
    stages: Mapping[str, JsonDict]


def read(workdir: epath.Path, *, name: str, stages: Mapping[str, JsonDict]) -> Results:
    """Reads what the stages wrote.

    Raises:
      UserError: a file is missing or is not JSON.
    """
    run = workdir / "runs" / name
    return Results(
        corpus=read_json(workdir / "corpus" / "manifest.json"),
        index=read_json(workdir / "index" / "manifest.json"),
        evaluation=read_json(run / "evaluation.json"),
        generation=read_json(run / "generation.json")["generations"][0],
        stages=stages,
    )


def render(results: Results) -> str:
    """The whole page as text."""
    parts = [
        _bits_per_byte(results.evaluation),
        _index(results.index),
        stage_table(results.stages),
        _sample(results.generation),
    ]
    if attribution := results.corpus["meta"].get("attribution"):
        parts.append(textwrap.fill(attribution, WIDTH, break_on_hyphens=False))
    return "\n" + "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for their cells: the first flush left, the others right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _bits_per_byte(evaluation: JsonDict) -> str:
    title = (
        f"Held-out documents: {evaluation['documents']:,},"
        f" {evaluation['bytes']:,} bytes of text"
    )
    rows = [
        [
            f"retrieval {result['label']}",
            str(result["neighbours"]),
            f"{result['bits_per_byte']:.4f}",
            f"{result['low']:.4f} … {result['high']:.4f}",
        ]
        for result in evaluation["results"]
    ]
    return (
        f"{title}\n\n"
        + table(["", "neighbours", "bits per byte", "95 % interval"], rows)
        + _difference(evaluation.get("difference") or {})
    )


def _difference(difference: JsonDict) -> str:
    if not {"bits_per_byte", "low", "high"} <= difference.keys():
        return ""
    low, high = difference["low"], difference["high"]
    if low <= 0 <= high:
        verdict = "the interval holds 0: no difference is shown"
    else:
        verdict = "retrieval helps" if high < 0 else "retrieval hurts"
    return (
        f"\n\nON − OFF, document by document: {difference['bits_per_byte']:+.4f}"
        f" ({low:+.4f} … {high:+.4f}); {verdict}"
    )


def _index(index: JsonDict) -> str:
    meta, config = index["meta"], index["config"]
    return (
        f"Index: {meta['backend']}, recall@{config['recall_k']} against exact search"
        f" {meta['recall']:.4f} (asked for: {config['recall_target']})"
    )


def stage_table(stages: Mapping[str, JsonDict]) -> str:
    """Seconds and peak memory of each stage and of what ran beside it."""
    rows = []
    resumed = any(used.get("resumed") for used in stages.values())
    for name, used in stages.items():
        known = "seconds" in used
        mark = ("*" if used.get("resumed") else " ") if resumed else ""
        seconds = (f"{used['seconds']:.1f}" if known else "-") + mark
        rows.append([name, seconds, str(used["peak_mb"]) if known else "-"])
        if beside := used.get("companion"):
            rows.append([f"  beside it {beside['name']}", "", str(beside["peak_mb"])])
    known_stages = [used for used in stages.values() if "seconds" in used]
    if known_stages:
        total = sum(used["seconds"] for used in known_stages)
        peak = max(map(_peak, known_stages))
        rows.append(["all", f"{total:.1f}" + " " * resumed, str(peak)])
    text = table(["stage", "seconds", "peak MB"], rows)
    if resumed:
        text += "\n* since it was last started again"
    if len(known_stages) < len(stages):
        text += "\n- was run by hand before, and not measured here"
    return text


def _peak(used: JsonDict) -> int:
    """Of a stage and its companion together."""
    return used["peak_mb"] + used.get("companion", {}).get("peak_mb", 0)


def _sample(generation: JsonDict) -> str:
    lines = ["A held-out document's beginning ▸ and what the model made of it", ""]
    lines += quote(generation["prompt"] + " ▸ " + generation["continuation"], "  ")
    for number, chunk in enumerate(generation["chunks"], start=1):
        if not chunk["passages"]:
            continue
        end = " ".join(chunk["tokens_text"].split())[-40:]
        lines += ["", f"  retrieved after chunk {number}, “… {end}”"]
        for passage in chunk["passages"]:
            name = passage["title"] or passage["document"]
            lines.append(f"    · {name} (score {passage['score']:.3f})")
            lines += quote(_shortened(passage["text"], 2 * WIDTH), "        ")
    return "\n".join(lines)


def quote(text: str, indent: str) -> list[str]:
    """A text on lines of `WIDTH`, each after `indent`."""
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _shortened(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(path: epath.Path) -> Any:
    """What a stage wrote.

    Raises:
      UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it and run again"
        ) from None
