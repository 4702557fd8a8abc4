"""What a suite measured: series of numbers, as JSON and as the same in a table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
from collections.abc import Iterable, Sequence

from etils import epath

from realm_retro import disk
from realm_retro.cli import quickstart_report
from realm_retro.typing import JsonDict


@dataclasses.dataclass(frozen=True)
class Series:
    """One quantity, measured again and again.

    Attributes:
      name: what it is.
      unit: of the values; ``ratio`` for a quotient of two that were measured in turn.
      values: one a round, in order.
      at_most: what the median should not exceed; None where nothing is asked for.
      unjudged: why the target says nothing about this run; empty where it does.
    """

    name: str
    unit: str
    values: Sequence[float]
    at_most: float | None = None
    unjudged: str = ""

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    def as_json(self) -> JsonDict:
        """All that the table shows, and the single values."""
        met = None
        if self.at_most is not None and not self.unjudged:
            met = bool(self.median <= self.at_most)
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "at_most": self.at_most,
            "met": met,
            "unjudged": self.unjudged,
            "values": [float(value) for value in self.values],
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What a suite gives back.

    Attributes:
      title: what the suite is about, a line.
      series: what was measured.
      settings: sizes and whatever else decides the numbers, as JSON values.
      notes: lines that a reader of the numbers has to know.
    """

    title: str
    series: Sequence[Series]
    settings: JsonDict
    notes: Sequence[str] = ()


def ratio(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """Quotients of pairs that were measured one after the other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def share(whole: Iterable[float], rest: Iterable[float]) -> list[float]:
    """What part of `whole` is not in `rest`, pair by pair; noise may make it negative.

    It is exact where both are the same work but for that part.
    """
    return [(a - b) / a for a, b in zip(whole, rest, strict=True)]


def as_json(report: Report, *, suite: str, command: str, machine: JsonDict) -> JsonDict:
    """The content of the JSON file.

    Args:
      report: what was measured.
      suite: its name.
      command: what was typed.
      machine: see `machine.facts`.
    """
    now = datetime.datetime.now(datetime.UTC)
    return {
        "suite": suite,
        "title": report.title,
        "when": now.isoformat(timespec="seconds"),
        "command": command,
        "machine": machine,
        "settings": report.settings,
        "series": [series.as_json() for series in report.series],
        "notes": list(report.notes),
    }


def write(path: epath.Path, body: JsonDict) -> None:
    """Writes the JSON file whole, over an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as temporary:
        temporary.write_text(json.dumps(body, indent=1))


def render(body: JsonDict) -> str:
    """The table, from the content of the JSON file."""
    rows = [
        [
            series["name"],
            series["unit"],
            *(_number(series[name]) for name in ("median", "min", "max")),
            *_verdict(series),
        ]
        for series in body["series"]
    ]
    header = ["", "unit", "median", "min", "max", "target", ""]
    rounds = max(len(series["values"]) for series in body["series"])
    machine = body["machine"]
    lines = [
        f"{body['title']} ({rounds} rounds)",
        "",
        quickstart_report.table(header, rows),
        "",
        *(f"* {note}" for note in (*_reasons(body), *body["notes"])),
        f"* {machine['processor']}, {machine['cpus']} CPUs,"
        f" {machine['memory_gb']} GB; {', '.join(machine['devices'])};"
        f" load before it began {machine['load_before']}",
        f"* {', '.join(f'{k} {v}' for k, v in machine['versions'].items())}",
    ]
    return "\n".join(lines)


def _verdict(series: JsonDict) -> tuple[str, str]:
    if series["at_most"] is None:
        return "", ""
    verdict = {True: "met", False: "MISSED", None: "not judged"}[series["met"]]
    return f"≤ {_number(series['at_most'])}", verdict


def _reasons(body: JsonDict) -> list[str]:
    """Why targets were not judged, each reason once."""
    return list(
        dict.fromkeys(
            f"not judged: {series['unjudged']}"
            for series in body["series"]
            if series["unjudged"] and series["at_most"] is not None
        )
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
