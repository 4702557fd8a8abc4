"""What a compiled program reads and writes in the main memory of a device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from realm_retro.parallel.hlo import ARRAY, Instruction, Program, shape_bytes

# They name, group or alias arrays and move nothing; what loops and calls do is counted
# in what they call.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "domain",
        "async-start",
        "add-dependency",
    ]
)
# Bytes of the numbers that an asynchronous operation waits with.
_WAITS = 4
_SLICES = ("dynamic-slice", "slice", "gather", "dynamic-update-slice")


def traffic(program: Program) -> float:
    """Bytes that a device reads and writes in its main memory.

    What a fused computation keeps to itself never gets there, nor what XLA has put into
    another memory space (``S(1)``: the cores' own).
    """
    total = 0.0
    for name, times in program.runs().items():
        body = program.computations[name]
        total += times * sum(_moved(program, body, one) for one in body.values())
    return total


def largest(program: Program, count: int) -> list[tuple[int, str, str]]:
    """The largest arrays that are made in memory: bytes, shape and source."""
    found: dict[tuple[str, str], int] = {}
    for name in program.runs():
        for one in program.computations[name].values():
            if one.kind in _FREE or one.kind.endswith(("-done", "-update")):
                continue
            for shape in _arrays(one.shape):
                key = shape.split("{")[0], one.source
                size = _bytes(shape)
                found[key] = max(size, found.get(key, 0))
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [(size, shape, source) for (shape, source), size in ranked[:count]]


def _moved(
    program: Program, body: Mapping[str, Instruction], one: Instruction
) -> float:
    if one.kind in _FREE or one.kind.endswith(("-done", "-update")):
        return 0
    if one.name.startswith("async-collective-done"):
        return 0
    if one.kind.endswith("-start"):
        return _started(body, one)
    if one.kind == "dynamic-update-slice":
        # In place: what is not updated is not touched.
        return 2 * _bytes(body[one.operands[1]].shape)
    if one.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(one.shape)
    if one.kind == "fusion":
        return _fused(program, body, one)
    read = sum(_bytes(body[name].shape) for name in set(one.operands) if name in body)
    return read + _bytes(one.shape)


def _started(body: Mapping[str, Instruction], one: Instruction) -> float:
    """What an operation moves that is awaited elsewhere.

    Its result is a tuple in which the operands stand again, in part or whole, beside
    the arrays that are made and numbers to wait with.
    """
    taken = [
        shape
        for name in one.operands
        if name in body
        for shape in _arrays(body[name].shape)
    ]
    made = [shape for shape in _arrays(one.shape) if shape_bytes(shape) > _WAITS]
    left = list(made)
    for shape in taken:
        for other in left:
            if other.split("{")[0] == shape.split("{")[0] and _same(other, shape):
                left.remove(other)
                break
    made = left or made
    read = sum(map(_bytes, taken))
    if one.kind == "slice-start":
        read = min(read, sum(map(shape_bytes, made)))
    return read + sum(map(_bytes, made))


def _same(one: str, other: str) -> bool:
    """Whether two arrays of a shape lie in the same memory."""
    return bool(_bytes(one)) == bool(_bytes(other))


def _fused(
    program: Program, body: Mapping[str, Instruction], one: Instruction
) -> float:
    """A fusion reads of an operand what it slices, and updates in place."""
    inner = program.computations[one.called[0]]
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    read, in_place = 0.0, 0
    # A collective that runs beside the fusion: its arrays pass through.
    carried = one.goes_on or one.name.startswith("async-collective")
    passed = _passed(body, one) if carried else {}
    for instruction in inner.values():
        if instruction.kind == "dynamic-update-slice":
            update = inner[instruction.operands[1]]
            in_place += _bytes(instruction.shape) - _bytes(update.shape)
        if instruction.kind != "parameter":
            continue
        uses = users.get(instruction.name, [])
        operand = one.operands[int(instruction.attributes)]
        if operand not in body or operand in passed:
            continue
        size = _bytes(body[operand].shape)
        if uses and all(use.kind in _SLICES for use in uses):
            size = min(size, sum(_sliced(use, instruction.name) for use in uses))
        read += size
    in_place += sum(passed.values())
    return read + max(_bytes(one.shape) - in_place, 0)


def _passed(body: Mapping[str, Instruction], one: Instruction) -> dict[str, int]:
    """Operands that are results too, and their bytes."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", one.attributes)
    places = re.findall(r"\((\d+), ", found[1]) if found else []
    names = {one.operands[int(place)] for place in places}
    return {name: _bytes(body[name].shape) for name in names if name in body}


def _sliced(use: Instruction, name: str) -> int:
    if use.kind == "dynamic-update-slice":
        # Its first operand is the array that is updated; the second is read whole.
        return 0 if use.operands[0] == name else shape_bytes(use.shape)
    return shape_bytes(use.shape)


def _bytes(shape: str) -> int:
    return shape_bytes(shape, everywhere=False)


def _arrays(shape: str) -> Iterator[str]:
    for kind, sizes, layout in ARRAY.findall(shape):
        yield f"{kind}[{sizes}]{layout}"
