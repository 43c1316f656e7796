"""What a recipe's values are put together from: its base, itself and overrides; and which of them a value stands in."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl_rl.config.recovery import METHODS, recovery_entry
from ptl_rl.config.section import ConfigError, dotted
from ptl_rl.config.strict_yaml import read_yaml_text
from ptl_rl.errors import expanded

Values = dict[str, Any]
Location = tuple[int | str, ...]
WHOLE = ("recovery", "recovery_of_cycle", "recovery_if_unlearnable")
"""Sections that a recipe takes from its base as they are or not at all: another method has other settings."""


def read_yaml(recipe: Path, said_by: str = "") -> Values:
    """The mapping in a YAML file; ``said_by`` follows its name in errors.

    Raises:
        ConfigError: unreadable, YAML error (with line), no mapping.
    """
    try:
        text = recipe.read_text()
    except OSError as error:
        raise ConfigError(f"{recipe}: cannot read the recipe{said_by}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{recipe}: not valid YAML: {' '.join(str(error).split())}") from None
    values = read_yaml_text(text, str(recipe))
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: a recipe is a YAML mapping of sections, this is {type(values).__name__}")
    try:
        return {key: dotted(value) if key == "verl" else value for key, value in values.items()}
    except ValueError as error:
        raise ConfigError(f"{recipe}: verl: {error}") from None


def merged(base: Values, own: Values, whole: Sequence[str] = WHOLE) -> Values:
    """``own`` over ``base``: mappings key by key, at any depth; lists and single values are replaced."""
    result = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key not in whole
        result[key] = merged(result[key], value, ()) if both else value
    return result


@dataclass
class Layers:
    """One recipe with what it is based on and what was set at the command line."""

    name: str
    values: Values
    """All put together."""
    own: Values = field(default_factory=dict)
    base_name: str = ""
    base: Values = field(default_factory=dict)
    set: list[tuple[str, Location]] = field(default_factory=list)
    """Overridden keys: as they were written, and the places that they came to."""

    @classmethod
    def read(cls, recipe: Path) -> "Layers":
        """Read a recipe and its base, if it names one.

        Raises:
            ConfigError: as :func:`read_yaml`, or the base has a base.
        """
        own = read_yaml(recipe)
        if "base" not in own:
            return cls(str(recipe), deepcopy(own), own)
        named = own.pop("base")
        if not isinstance(named, str):
            raise ConfigError(f"{recipe}: base: name one other recipe by its path, relative to this one's folder")
        path = recipe.parent / expanded(named)
        base = read_yaml(path, f" (the base of {recipe}; copy both)")
        if "base" in base:
            raise ConfigError(
                f"{recipe}: base: {path} has a base itself; a recipe has one at most, so name one that stands alone"
            )
        return cls(str(recipe), deepcopy(merged(base, own)), own, str(path), base)

    def override(self, override: str) -> None:
        """Apply one ``key.sub_key=value`` of the command line."""
        self.set.append(apply_override(self.values, override))

    def source(self, location: Location) -> str:
        """Names what says something at or below a place: files, else an override; the recipe's file if nothing does."""
        for length in range(len(location), 0, -1):
            part = location[:length]
            found = [self.name] if _states(self.own, part) else []
            if self.base and _states(self.base, part) and not _replaces(self.own, self.base, part):
                found.append(self.base_name)
            if found:
                return " on ".join(found)
            told = tuple(map(str, part))
            for key, place in reversed(self.set):
                if place[:length] == told:
                    return f"`settings` {key}"
        return self.name

    def override_at(self, location: Location) -> tuple[str, Location] | None:
        """The last override that gave the value at a place, or all that it stands in."""
        told = tuple(map(str, location))
        return next(((key, place) for key, place in reversed(self.set) if told[: len(place)] == place), None)


def _states(values: Any, location: Location) -> bool:
    for depth, key in enumerate(location):
        if not isinstance(values, dict) or (depth == 1 and location[0] in WHOLE):
            return True
        if key not in values:
            return False
        values = values[key]
    return True


def _replaces(own: Any, base: Any, location: Location) -> bool:
    """Whether ``own`` has taken the place of what ``base`` says at ``location``."""
    for depth, key in enumerate(location):
        if not isinstance(own, dict) or key not in own:
            return False
        own, base = own[key], base.get(key)
        if not isinstance(own, dict) or not isinstance(base, dict) or (depth == 0 and key in WHOLE):
            return True
    return False


def apply_override(values: Values, override: str) -> tuple[str, Location]:
    """Set one ``key.sub_key=value``; returns the key as written, and the place in ``values`` that it came to."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"`settings` {override!r}: write it as key.sub_key=value")
    if key == "base":
        raise ConfigError(f"`settings` {override!r}: a base is named in the recipe's file alone; write it there")
    place = tuple(key.split("."))
    if place[0] == "recovery" and len(place) > 1:
        place = _in_recovery(values, place[1:], override)
    if "verl" in place[:-1] and place[0] in ("verl", *WHOLE):
        depth = place.index("verl") + 1
        place = (*place[:depth], ".".join(place[depth:]))
    value = read_yaml_text(text, f"`settings` {override!r}")
    container: Any = values
    for depth, section in enumerate(place[:-1]):
        container = _within(container, ".".join(place[:depth]), section, override)
    if place[-2:-1] == ("verl",) and isinstance(container, dict):
        try:
            told = dotted(container) | dotted({place[-1]: value})
        except ValueError as error:
            raise ConfigError(f"`settings` {override!r}: {error}") from None
        container.clear()
        container.update(told)
    else:
        _within(container, ".".join(place[:-1]), place[-1], override)
        container[int(place[-1]) if isinstance(container, list) else place[-1]] = value
    return key, place


def _in_recovery(values: Values, rest: tuple[str, ...], override: str) -> tuple[str, ...]:
    """Where a setting of a recovery stands; a single one needs no place in the list, and none needs its method.

    Recoveries that are written in another way are written as a list of named ones first.
    """
    recovery = values.get("recovery")
    wanted = rest[0] if rest[0] in METHODS else "grpo"
    entries = recovery if isinstance(recovery, list) else [recovery or {}]
    values["recovery"] = entries = [_named(entry, wanted) for entry in entries]
    if rest[0].isdecimal():
        number, rest = rest[0], rest[1:]
    elif len(entries) == 1:
        number = "0"
    else:
        return ("recovery", *rest)  # which is refused, as it names none of them
    if not rest or int(number) >= len(entries) or not _is_named(entries[int(number)]):
        return ("recovery", number, *rest)
    (method,) = entries[int(number)]
    if rest[0] == "method":
        entries[int(number)] = recovery_entry(entries[int(number)])
        return ("recovery", number, *rest)
    if rest[0] in METHODS and rest[0] != method:
        where = "recovery" if len(entries) == 1 else f"recovery.{number}"
        raise ConfigError(
            f"`settings` {override!r}: the recipe has {method} there, whose settings another method does not have; "
            f"write '{where}={{METHOD: {{...}}}}'"
        )
    return ("recovery", number, method, *(rest[1:] if rest[0] == method else rest))


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and len(entry) == 1 and next(iter(entry)) in METHODS


def _named(entry: Any, method: str) -> Any:
    """``{method: {...}}``, by ``method`` where the entry is empty, and GRPO where it does not say; or what it is."""
    if not isinstance(entry, dict) or _is_named(entry):
        return entry
    said = entry.get("method", "grpo" if entry else method)
    if said not in METHODS:
        return entry
    return {said: {key: value for key, value in entry.items() if key != "method"}}


def _within(container: Any, where: str, name: str, override: str) -> Any:
    """What stands at ``name`` in a section, a new section if nothing does, or in a list."""
    if isinstance(container, list):
        if not name.isdecimal() or int(name) >= len(container):
            raise ConfigError(
                f"`settings` {override!r}: {where} is a list of {len(container)}; write its place, from 0"
            )
        return container[int(name)]
    if not isinstance(container, dict):
        raise ConfigError(f"`settings` {override!r}: {where} is a single value, not a section")
    if container.get(name) is None:
        container[name] = {}
    return container[name]
