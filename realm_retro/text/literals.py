"""Which of many regular expressions can match a text, told without running them.

Most answer expressions need some literal text: "Sept?(ember)?|Feb(ruary)?" needs "sep"
or "feb". `PatternFilter` looks all of these up in one pass, by groups of three letters,
and leaves the few expressions that may match.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_GRAM = 3
# Letters that IGNORECASE takes for an ASCII letter although lower() does not.
_FOLDED = str.maketrans({"ſ": "s", "ı": "i", "İ": "i", "\u212a": "k"})
# Operations of the re module's own parser that stand for their last operand, once.
_GROUPS = {"SUBPATTERN", "ATOMIC_GROUP"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def fold(text: str) -> str:
    """A text in the form in which literals are looked for."""
    return text.translate(_FOLDED).lower()


def required_literals(pattern: re.Pattern[str]) -> frozenset[str] | None:
    """Lower-case ASCII strings of which each match holds at least one.

    Args:
      pattern: compiled, whether or not it ignores case.

    Returns:
      The strings, to be looked for in `fold(text)`; None where there are none, or the
      expression is beyond this function.
    """
    try:
        # The parser is not public: without it all expressions are run on all texts.
        parsed = re._parser.parse(pattern.pattern, pattern.flags)  # type: ignore[attr-defined]
    except (AttributeError, re.error, RecursionError):
        return None
    return _literals(parsed)


@dataclasses.dataclass(frozen=True)
class PatternFilter:
    """Finds the expressions that may match a text; see the module docstring.

    Attributes:
      unfiltered: numbers of expressions without a literal: always candidates.
    """

    unfiltered: Sequence[int]
    _literals: Mapping[str, Mapping[str, Sequence[int]]]
    _short: Mapping[str, Sequence[int]]

    @classmethod
    def build(cls, patterns: Iterable[re.Pattern[str]]) -> PatternFilter:
        """Prepares the filter; expressions are numbered in their order."""
        unfiltered: list[int] = []
        short: dict[str, list[int]] = collections.defaultdict(list)
        long: dict[str, dict[str, list[int]]] = {}
        for number, pattern in enumerate(patterns):
            literals = required_literals(pattern)
            if literals is None:
                unfiltered.append(number)
                continue
            for literal in literals:
                if len(literal) < _GRAM:
                    short[literal].append(number)
                else:
                    same = long.setdefault(literal[:_GRAM], {})
                    same.setdefault(literal, []).append(number)
        return cls(unfiltered, long, short)

    def candidates(self, text: str) -> set[int]:
        """Numbers of the expressions that may match somewhere in the text."""
        folded = fold(text)
        found = set(self.unfiltered)
        grams = {folded[i : i + _GRAM] for i in range(len(folded) - _GRAM + 1)}
        for gram in self._literals.keys() & grams:
            for literal, numbers in self._literals[gram].items():
                if len(literal) == _GRAM or literal in folded:
                    found.update(numbers)
        for literal, numbers in self._short.items():
            if literal in folded:
                found.update(numbers)
        return found


def _literals(sequence: Iterable[tuple[Any, Any]]) -> frozenset[str] | None:
    # Each of these holds for every match; the longest strings rule out most.
    choices = list(_choices(sequence))
    rank = {c: (min(map(len, c)), -len(c), sorted(c)) for c in choices}
    return max(choices, key=rank.__getitem__, default=None)


def _choices(sequence: Iterable[tuple[Any, Any]]) -> Iterator[frozenset[str]]:
    """Sets of strings, of each of which a match of the sequence holds one."""
    run = ""
    for operation, operand in sequence:
        name = str(operation)
        if name == "LITERAL" and operand < 128:
            run += chr(operand).lower()
            continue
        if name == "AT":  # takes no room: what stands around it is adjacent
            continue
        if run:
            yield frozenset([run])
            run = ""
        if name in _GROUPS or (name in _REPEATS and operand[0] > 0):
            inner = operand if name == "ATOMIC_GROUP" else operand[-1]
            yield from _choices(inner)
        elif name == "BRANCH":
            branches = [_literals(branch) for branch in operand[1]]
            if None not in branches:
                yield frozenset().union(*(b for b in branches if b is not None))
    if run:
        yield frozenset([run])
