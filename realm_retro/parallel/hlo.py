"""Reads a compiled program's text: its loops, and what its devices send each other.

The text says what a loop's body does once, and how often the loop runs; both are put
together here. It is the text of one device, whose shapes are that device's shares.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from realm_retro.parallel import hlo_groups

_BITS = {
    "pred": 8,
    "bf16": 16,
    "token": 0,
    "opaque": 0,
    "c64": 64,
    "c128": 128,
}
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)="
    r"%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)"?\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: of its result.
      kind: the operation.
      shape: of the result, as written.
      operands: names of what it takes.
      attributes: the rest of the line.
    """

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        found = []
        for one, several in _CALLED.findall(self.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", several)
        return tuple(found)

    @property
    def goes_on(self) -> bool:
        """Whether it only goes on with, or awaits, what another has started.

        On TPUs each fusion beside which a collective runs holds the collective again.
        """
        return (
            self.kind.endswith(("-update", "-done"))
            or self.name.startswith("async-collective-done")
            or any(name.startswith("async_collective_fusion") for name in self.called)
        )

    @property
    def source(self) -> str:
        """What it was in the Python program, as XLA remembers."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, with the number of times that it runs.

    Attributes:
      kind: one of `KINDS`.
      bytes: what one device puts in, each time.
      group: positions in the mesh of the devices of one group.
      times: how often it runs in a step.
      source: see `Instruction.source`.
      shape: of the result.
      pairs: positions of who sends and who receives, of a permutation.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int
    source: str
    shape: str
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def payload(self) -> int:
        """Bytes of the whole array that it makes or takes on one device, each time."""
        return self.bytes * (len(self.group) if self.kind == "all-gather" else 1)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, on a ring."""
        n = len(self.group)
        share = {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: name → instructions by name, in order.
      entry: the computation that begins.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def runs(self) -> dict[str, int]:
        """How often each computation runs that is not part of another instruction."""
        counts: dict[str, int] = {}
        self._add_runs(self.entry, 1, counts)
        return counts

    def unknown_loops(self) -> int:
        """Loops whose number of turns the program does not say; they count once."""
        return sum(
            instruction.kind == "while" and self._trips(instruction) is None
            for name in self.runs()
            for instruction in self.computations[name].values()
        )

    def collectives(self, devices: int) -> list[Collective]:
        """All collectives that run, those that are started and awaited once.

        Args:
          devices: of the mesh.
        """
        found = []
        for name, times in self._all_runs().items():
            body = self.computations[name]
            # On TPUs a fusion of this name is an all-reduce whose result is cut.
            scattered = name.startswith("all-reduce-scatter")
            for instruction in body.values():
                kind = instruction.kind.removesuffix("-start")
                if kind not in KINDS:
                    continue
                if scattered and kind == "all-reduce":
                    kind = "reduce-scatter"
                size = sum(
                    shape_bytes(body[operand].shape)
                    for operand in instruction.operands
                    if operand in body
                )
                found.append(
                    Collective(
                        kind=kind,
                        bytes=size,
                        group=hlo_groups.group(instruction.attributes, devices),
                        pairs=hlo_groups.pairs(instruction.attributes),
                        times=times,
                        source=instruction.source,
                        shape=instruction.shape,
                    )
                )
        return [one for one in found if len(one.group) > 1]

    def _add_runs(self, name: str, times: int, counts: dict[str, int]) -> None:
        counts[name] = counts.get(name, 0) + times
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                turns = self._trips(instruction) or 1
                for called in instruction.called:
                    self._add_runs(called, times * turns, counts)
            elif instruction.kind in ("call", "conditional"):
                for called in instruction.called:
                    self._add_runs(called, times, counts)

    def _all_runs(self) -> dict[str, int]:
        """`runs`, and what fusions and asynchronous operations are made of."""
        counts: dict[str, int] = {}

        def add(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.kind.startswith("async-") or instruction.kind in (
                    "fusion",
                    "custom-call",
                ):
                    if instruction.goes_on:
                        continue
                    for called in instruction.called:
                        if called in self.computations:
                            add(called, times)

        for name, times in self.runs().items():
            add(name, times)
        return counts

    def _trips(self, loop: Instruction) -> int | None:
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        if condition is None:
            return None
        # A scan counts from 0 up to the one number that its condition compares with.
        limits = {int(limit) for limit in self._compared(condition[1], ())}
        return limits.pop() if len(limits) == 1 else None

    def _compared(self, name: str, given: Sequence[str]) -> Iterator[str]:
        """Numbers that the last line of a computation compares with.

        Args:
          name: of the computation.
          given: the numbers among its arguments, "" for what is none.
        """
        body = self.computations[name]
        values = {
            one.name: (
                given[int(one.attributes)]
                if one.kind == "parameter" and int(one.attributes) < len(given)
                else one.attributes
                if one.kind == "constant"
                else ""
            )
            for one in body.values()
        }
        last = list(body.values())[-1]
        operands = [values.get(operand, "") for operand in last.operands]
        if last.kind == "compare":
            yield from filter(str.isdigit, operands)
        elif last.kind in ("fusion", "call") and last.called:
            yield from self._compared(last.called[0], operands)


def parse(text: str) -> Program:
    """Reads the text of a compiled program, ``compiled.as_text()``.

    Raises:
      ValueError: it is not one.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _instruction(line):
            current[found.name] = found
    if not entry:
        raise ValueError("this is not the text of a compiled program")
    return Program(computations, entry)


def shape_bytes(shape: str, *, everywhere: bool = True) -> int:
    """Bytes of an array, or of a tuple of them, as HLO writes shapes.

    Args:
      shape: e.g. ``bf16[8,128]{1,0:T(8,128)(2,1)}``; tiles' padding is not counted.
      everywhere: count arrays too that lie outside the main memory.
    """
    total = 0
    for kind, sizes, layout in ARRAY.findall(shape):
        if everywhere or not re.search(r"S\([1-9]", layout):
            elements = math.prod(int(size) for size in sizes.split(",") if size)
            total += elements * _bits(kind) // 8
    return total


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 0


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind, _, arguments = rest.partition("(")
    close = _closing("(" + arguments) - 1
    inside, attributes = arguments[:close], arguments[close + 1 :].lstrip(", ")
    if kind in ("constant", "parameter"):
        return Instruction(found[1], kind, shape, (), inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[1], kind, shape, operands, attributes)


def _closing(text: str) -> int:
    """Where the parenthesis closes that `text` begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)
