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
# A power of ten beyond this is no result of a unit test, and whole numbers as long keep the referee busy.
_LARGEST_EXPONENT = 20_000

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


def encode_plain(value: Any) -> Any:
    """Return `value` as data, of which `decode` makes its equal in type, too; else raise TypeError, ValueError, ..."""
    return _Encoder(exact=True).encode(value)


def encode_error(message: str) -> list[Any]:
    """Return what makes `decode` raise Raised(message)."""
    return ["error", message]


class _Encoder:
    def __init__(self, exact: bool = False) -> None:
        self.left = _LARGEST
        self.exact = exact

    def encode(self, value: Any) -> Any:
        self.spend(1)
        if self.exact and not _is_exact(value):
            raise TypeError(f"a {type(value).__name__} is not carried as it is")
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
        for name, parts in _DATES.items():
            if _is_from(kind, "datetime", name):
                return [name, self.many(_zone(value) if part == "tzinfo" else getattr(value, part) for part in parts)]
        if _is_from(kind, "datetime", "timezone"):
            return ["timezone", [self.encode(value.utcoffset(None))]]
        if hasattr(kind, "__next__"):
            return ["iterator", self.many(itertools.islice(value, self.left + 1))]
        return ["object", [kind.__name__, bool(value)]]

    def many(self, values: Any) -> list[Any]:
        return [self.encode(value) for value in values]

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise ValueError(f"the result has more than {_LARGEST} parts")


def _zone(value: Any) -> Any:
    """A fixed offset in place of a zone by name, which other processes need not know: it is the same moment."""
    fixed = sys.modules["datetime"].timezone
    if value.tzinfo is None or type(value.tzinfo) is fixed or value.utcoffset() is None:
        return value.tzinfo
    return fixed(value.utcoffset())


_EXACT = {list, tuple, set, frozenset, dict, bytes, bytearray, complex, range, *_VIEWS}
_EXACT |= {type(None), bool, int, float, str}


def _is_exact(value: Any) -> bool:
    kind = type(value)
    dates = ("date", "time", "datetime", "timedelta", "timezone")
    return (
        kind in _EXACT
        or (kind is collections.deque and value.maxlen is None)
        or _is_from(kind, "fractions", "Fraction")
        or _is_from(kind, "decimal", "Decimal")
        or any(_is_from(kind, "datetime", name) for name in dates)
    )


_CLOCK = ("hour", "minute", "second", "microsecond", "tzinfo", "fold")
_DATES = {
    "date": ("year", "month", "day"),
    "time": _CLOCK,
    "datetime": ("year", "month", "day", *_CLOCK),
    "timedelta": ("days", "seconds", "microseconds"),
}


def _is_from(kind: type, module: str, name: str) -> bool:
    # Looked up and not imported: a program that returns a Fraction has loaded the module itself.
    return kind is getattr(sys.modules.get(module), name, None)


def decode(data: Any) -> Any:
    """Rebuild the value that `encode` was given. Raises Raised for an error, ValueError for anything malformed.

    The data may be forged. So every part has the type that `encode` gives it, for `Fraction("1e999999999")` alone
    would take minutes.
    """
    if not isinstance(data, list):
        return data
    tag, content = data
    if tag == "error":
        raise Raised(str(content))
    if not isinstance(tag, str) or tag not in _DECODERS:
        raise ValueError(f"unknown kind of value {tag!r}")
    return _DECODERS[tag](content)


def _many(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("malformed value")
    return [decode(item) for item in content]


def _numbers(content: Any, kinds: tuple[type, ...] = (int,)) -> list[Any]:
    numbers = _many(content)
    if not all(type(number) in kinds for number in numbers):
        raise ValueError("malformed value")
    return numbers


def _text(content: Any) -> str:
    if type(content) is not str:
        raise ValueError("malformed value")
    return content


def _fraction(content: Any) -> Any:
    from fractions import Fraction

    return Fraction(*_numbers(content))


def _decimal(content: Any) -> Any:
    from decimal import Decimal

    number = Decimal(_text(content))
    if number.is_finite() and number and abs(number.adjusted()) > _LARGEST_EXPONENT:
        raise ValueError("the result has too large an exponent")
    return number


def _date(name: str) -> Callable[[Any], Any]:
    def decoder(content: Any) -> Any:
        import datetime

        kind = getattr(datetime, name)
        if name == "timezone":
            return kind(*_many(content))
        return kind(**dict(zip(_DATES[name], _many(content), strict=True)))

    return decoder


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(_text(content), 16),
    "list": _many,
    "tuple": lambda content: tuple(_many(content)),
    "set": lambda content: set(_many(content)),
    "frozenset": lambda content: frozenset(_many(content)),
    "deque": lambda content: collections.deque(_many(content)),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "bytes": lambda content: _text(content).encode("latin-1"),
    "bytearray": lambda content: bytearray(_text(content).encode("latin-1")),
    "complex": lambda content: complex(*_numbers(content, (float,))),
    "range": lambda content: range(*_numbers(content)),
    "keys": lambda content: dict.fromkeys(_many(content)).keys(),
    "values": lambda content: dict(enumerate(_many(content))).values(),
    "items": lambda content: dict(_many(content)).items(),
    "fraction": _fraction,
    "decimal": _decimal,
    "iterator": lambda content: iter(_many(content)),
    "object": lambda content: Opaque(str(content[0]), bool(content[1])),
    **{name: _date(name) for name in (*_DATES, "timezone")},
}
