"""Carry a program's results to its judge as plain data.

A result that stayed an object could answer `==` with an `__eq__` of the program's own. What crosses the process
border here is rebuilt from built-in types, so that comparing it runs no code of the program. Subclasses come
across as what they derive from (a Counter as a dict, a named tuple as a tuple), which is how they compare with
literals; objects of any other class come across as an `Opaque`, which equals nothing.
"""

from __future__ import annotations

import collections
import itertools
import sys

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Nodes and characters of one result. More is no answer to a unit test, and would keep the judge busy.
_LARGEST = 200_000
_RAW_INTEGER = 2**53

_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_SEQUENCES: tuple[tuple[type, str], ...] = (
    (list, "list"),
    (tuple, "tuple"),
    (set, "set"),
    (frozenset, "frozenset"),
    (collections.deque, "deque"),
)


class Opaque:
    """Stands for a result that is not plain data: it has a truth value, and equals only itself."""

    def __init__(self, kind: str, truth: bool) -> None:
        self.kind = kind
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


class Raised(Exception):
    """The call did not return; the message is the program's own error."""


def encode(value: Any) -> Any:
    """Return `value` as data for JSON. Raises ValueError or RecursionError if it is too large or too deep."""
    return _Encoder().encode(value)


def encode_error(message: str) -> list[Any]:
    """Return what makes `decode` raise Raised(message)."""
    return ["error", message]


class _Encoder:
    def __init__(self) -> None:
        self.left = _LARGEST

    def encode(self, value: Any) -> Any:
        self.spend(1)
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if issubclass(kind, int):
            number = int.__add__(value, 0)
            self.spend(number.bit_length() // 8)
            # Hexadecimal, because Python refuses to read long decimal numbers.
            return number if abs(number) < _RAW_INTEGER else ["int", hex(number)]
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, str):
            self.spend(str.__len__(value))
            return str.__str__(value)
        return self.compound(value, kind)

    def compound(self, value: Any, kind: type) -> Any:
        for base, tag in _SEQUENCES:
            if issubclass(kind, base):
                return [tag, self.many(base.__iter__(value))]  # type: ignore[attr-defined]
        if issubclass(kind, dict):
            return ["dict", [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]]
        if issubclass(kind, (bytes, bytearray)):
            self.spend(len(value))
            return ["bytes" if issubclass(kind, bytes) else "bytearray", bytes(value).decode("latin-1")]
        if issubclass(kind, complex):
            return ["complex", [value.real, value.imag]]
        if kind is range:
            return ["range", self.many((value.start, value.stop, value.step))]
        if kind in _VIEWS:
            return [_VIEWS[kind], self.many(value)]
        if _is_from(kind, "fractions", "Fraction"):
            return ["fraction", self.many((value.numerator, value.denominator))]
        if _is_from(kind, "decimal", "Decimal"):
            return ["decimal", self.encode(str(value))]
        if hasattr(kind, "__next__"):
            return ["iterator", self.many(itertools.islice(value, self.left + 1))]
        return ["object", [kind.__name__, bool(value)]]

    def many(self, values: Any) -> list[Any]:
        return [self.encode(value) for value in values]

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError(f"the result has more than {_LARGEST} parts")


def _is_from(kind: type, module: str, name: str) -> bool:
    # Looked up and not imported: a program that returns a Fraction has loaded the module itself.
    return kind is getattr(sys.modules.get(module), name, None)


def decode(data: Any) -> Any:
    """Rebuild the value that `encode` was given. Raises Raised for an error, ValueError for anything malformed."""
    if not isinstance(data, list):
        return data
    tag, content = data
    if tag == "error":
        raise Raised(str(content))
    if tag not in _DECODERS:
        raise ValueError(f"unknown kind of value {tag!r}")
    return _DECODERS[tag](content)


def _many(content: Any) -> list[Any]:
    return [decode(item) for item in content]


def _fraction(content: Any) -> Any:
    from fractions import Fraction

    return Fraction(*_many(content))


def _decimal(content: str) -> Any:
    from decimal import Decimal

    return Decimal(content)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "list": _many,
    "tuple": lambda content: tuple(_many(content)),
    "set": lambda content: set(_many(content)),
    "frozenset": lambda content: frozenset(_many(content)),
    "deque": lambda content: collections.deque(_many(content)),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "bytes": lambda content: content.encode("latin-1"),
    "bytearray": lambda content: bytearray(content.encode("latin-1")),
    "complex": lambda content: complex(*content),
    "range": lambda content: range(*_many(content)),
    "keys": lambda content: dict.fromkeys(_many(content)).keys(),
    "values": lambda content: dict(enumerate(_many(content))).values(),
    "items": lambda content: dict(_many(content)).items(),
    "fraction": _fraction,
    "decimal": _decimal,
    "iterator": lambda content: iter(_many(content)),
    "object": lambda content: Opaque(str(content[0]), bool(content[1])),
}
