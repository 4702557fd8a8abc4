"""PyTorch's pickles read as data: nothing that stands in one is ever called.

Python's unpickler calls whatever function a pickle names. Here its operations are gone
through one by one; those of a state dict build dicts, lists and descriptions of
tensors, and any other name or operation is refused.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import pickletools
import sys
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np

BFLOAT16 = "bfloat16"  # which numpy does not have

_STORAGES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_MARK = object()
# Operations that push their argument.
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
}
# Operations that push a value of their own.
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}


class Refused(Exception):
    """A pickle names something that a state dict does not need."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers that lie elsewhere in the file.

    Attributes:
      key: where.
      dtype: numpy's name, or `BFLOAT16`.
      size: how many.
    """

    key: str
    dtype: str
    size: int

    @property
    def num_bytes(self) -> int:
        """How many bytes they take."""
        width = 2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize
        return self.size * width


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count numbers, nothing is checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Bounded:
    """A file that is asked for no more than it has left.

    Else reading would set memory aside for as much as a damaged length says.
    """

    def __init__(self, file: IO[bytes]):
        here = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(here)
        self._file = file
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._end - self._file.tell()))


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; it is never looked up."""

    name: str


def read(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """Reads one pickle.

    Args:
      file: stands behind the pickle afterwards.
      storages: filled with the storages that tensors refer to, by key.

    Returns:
      Numbers, strings, tuples, lists, dicts and `Tensor`.

    Raises:
      Refused: it names what is not known here.
      ValueError: it is damaged; or another of Python's errors of types and look-ups.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages
    for operation, argument, _ in pickletools.genops(cast("IO[bytes]", _Bounded(file))):
        name = operation.name
        if name == "STOP":
            return stack.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "BINPERSID":
            storage = _storage(*stack.pop())
            stack.append(storages.setdefault(storage.key, storage))
        elif name not in ("PROTO", "FRAME"):
            _build(name, argument, stack)
    raise ValueError("it has no end")


def _build(name: str, argument: Any, stack: list[Any]) -> None:
    """An operation that makes one value of several, or names one."""
    if name == "GLOBAL":
        stack.append(_known(argument.replace(" ", ".")))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_known(f"{module}.{attribute}"))
    elif name == "TUPLE":
        stack.append(tuple(_above_mark(stack)))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        items = [stack.pop() for _ in range(int(name[-1]))]
        stack.append(tuple(reversed(items)))
    elif name == "APPEND":
        value = stack.pop()
        stack[-1].append(value)
    elif name == "APPENDS":
        values = _above_mark(stack)
        stack[-1].extend(values)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name == "SETITEMS":
        items = _above_mark(stack)
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_made(function, arguments))
    elif name == "BUILD":
        # Attributes of the dict itself, such as the version of each module.
        if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
            raise Refused("the state of an object")
    else:
        raise Refused(f"the operation {name}")


def _known(name: str) -> _Name:
    if name not in _KNOWN:
        raise Refused(name)
    return _Name(name)


def _made(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call in the pickle stands for."""
    if function == _Name(_ORDERED_DICT) and not arguments:
        return {}
    if function == _Name(_TENSOR):
        storage, offset, shape, strides, *_ = arguments
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        index = operator.index
        return Tensor(
            storage,
            index(offset),
            tuple(index(size) for size in shape),
            tuple(index(stride) for stride in strides),
        )
    if function == _Name(_PARAMETER) and isinstance(arguments[0], Tensor):
        return arguments[0]
    raise Refused(f"a call of {getattr(function, 'name', function)}")


def _storage(
    kind: str, type_: _Name, key: str, device: str, size: int, view: None = None
) -> Storage:
    """A storage that a tensor refers to, as torch's persistent ids spell it."""
    if kind != "storage" or view is not None:
        raise Refused(f"a persistent {kind} {view or ''}".strip())
    size = operator.index(size)
    if not isinstance(key, str) or not 0 <= size <= sys.maxsize:
        raise ValueError(f"a storage {key!r} of {size} numbers")
    return Storage(key, _STORAGES[type_.name], size)


def _above_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]
