"""Writes ``docs/configuration.md``: every setting with type, bounds, default, meaning and the verl key that it ends in.

``python -m ptl_rl.config.reference > docs/configuration.md``. What it says stands in the code: descriptions beside the
fields, and the table of ``verl_keys.py``. A test fails when the page is not what this prints.
"""

import json
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ptl_rl.config import CptConfig, DistillConfig, EvalConfig, GrpoConfig, RecoveryConfig, RunConfig, ScoreConfig
from ptl_rl.config.section import models_in
from ptl_rl.config.verl_keys import TABLE, Trainer

HEAD = """\
# Every setting
This page is generated: `python -m ptl_rl.config.reference > docs/configuration.md`. It has the settings in the order of
the code (`ptl_rl/config/`). A recipe states those that differ from their defaults, by section:
`data: {max_prompt_tokens: 64}`. `--set data.max_prompt_tokens=64` overrides one, and `ptl plan RECIPE --resolved`
prints what a recipe comes to. `schedule` is the one section without a default.
[recipes/README.md](../recipes/README.md) says how a recipe stands on a `base:`.

The last column names the keys of verl's configuration that a setting ends in: of its RL trainer (RL: `grpo` and
`distill`), of `distill` alone, of its SFT trainer (CPT: `cpt`). `{a,b}` in a key stands for two keys. Words in brackets
say how the value is converted, or what else decides it. Any other key of verl's is set verbatim under `verl:`, for all
RL trainers or for one recovery, and wins.
"""
RECOVERIES: list[tuple[type[RecoveryConfig], tuple[tuple[Trainer, str], ...]]] = [
    (RecoveryConfig, (("rl", "RL"), ("sft", "CPT"))),
    (GrpoConfig, (("rl", ""),)),
    (CptConfig, (("sft", ""),)),
    (DistillConfig, (("rl", ""), ("distill", ""))),
]
TITLES = {
    RecoveryConfig: (
        "every method",
        "A recovery is named by its method: `recovery: [{cpt: {steps: 200}}, {grpo: {steps: 8}}]`.",
    ),
    GrpoConfig: ("`grpo`", ""),
    CptConfig: ("`cpt`", "Settings of every method that stand here again have another default."),
    DistillConfig: (
        "`distill`",
        "It has the settings of `grpo`, too; those that stand here again have another default.",
    ),
}
EVERYWHERE: tuple[tuple[Trainer, str], ...] = (("rl", "RL"), ("distill", "distill"), ("sft", "CPT"))
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "entries: at least"}
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}


def _either(words: list[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _type(annotation: Any) -> str:
    """In words of YAML."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is typing.Literal:
        return _either([f"`{value}`" for value in parts])
    if origin in (typing.Union, types.UnionType):
        return _either(list(dict.fromkeys(_type(part) for part in parts)))
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        method = _method(annotation)
        return f"`{method}`" if method else "section"
    return NAMES[annotation]


def _method(section: type[BaseModel]) -> str | None:
    return section.model_fields["method"].default if "method" in section.model_fields else None


def _bounds(field: FieldInfo) -> str:
    found = []
    for limit in field.metadata:
        for attribute, sign in BOUNDS.items():
            if hasattr(limit, attribute):
                found.append(f"{sign} {getattr(limit, attribute)}")
        if getattr(limit, "pattern", None):
            found.append("letters, digits, `.`, `_`, `-`")
    return ", ".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: set it"
    value = field.default
    if isinstance(value, BaseModel):
        stated = value.model_dump(exclude_defaults=True)
        return f"`{_flow(stated)}`" if stated else "its defaults"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return f"`[{', '.join(f'{{{_method(type(entry))}: {{}}}}' for entry in value)}]`"
    return f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """As YAML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str) and value and ":" not in value:
        return value
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # without the point YAML reads text
    return json.dumps(value)


def _keys(path: str, trainers: tuple[tuple[Trainer, str], ...]) -> str:
    """verl's keys of a field; those of one kind of trainer behind its name, where there are several kinds."""
    columns: dict[str, list[str]] = {}
    for trainer, title in trainers:
        by_note: dict[str, list[str]] = {}
        for key in (key for row in TABLE if row.field == path for key in row.keys(trainer)):
            by_note.setdefault(key.note, []).append(key.name)
        columns.setdefault(title, []).extend(_grouped(names, note) for note, names in by_note.items())
    kinds: dict[str, list[str]] = {}
    for title, lines in columns.items():
        if lines:
            kinds.setdefault("<br>".join(lines), []).append(title)
    return "<br>".join(f"{', '.join(titles)}: {told}" if all(titles) else told for told, titles in kinds.items())


def _grouped(names: list[str], note: str) -> str:
    """Keys that share a note; ``a.{b,c}.d`` stands for two that differ in one part only."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        root, _, rest = name.partition(".")
        part, _, tail = rest.partition(".")
        groups.setdefault((root, tail), []).append(part)
    told = []
    for (root, tail), parts in groups.items():
        middle = f"{{{','.join(parts)}}}" if len(parts) > 1 else parts[0]
        told.append(f"`{'.'.join(part for part in (root, middle, tail) if part)}`")
    return ", ".join(told) + (f" ({note})" if note else "")


def _table(fields: dict[str, FieldInfo], path: str, trainers: tuple[tuple[Trainer, str], ...] = ()) -> Iterator[str]:
    """One row for each field; the last column where any has a key of verl's."""
    keys = {name: _keys(f"{path}.{name}" if path else name, trainers) for name in fields}
    has_keys = any(keys.values())
    yield "| setting | value | default | meaning |" + (" verl's key |" if has_keys else "")
    yield "|---|---|---|---|" + ("---|" if has_keys else "")
    for name, field in fields.items():
        value = ", ".join(part for part in (_type(field.annotation), _bounds(field)) if part)
        cells = [f"`{name}`", value, _default(field), field.description or ""]
        cells += [keys[name]] if has_keys else []
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""


def sections(root: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted path and class of every section below ``root``, in the order of the code, without recoveries."""
    for name, field in root.model_fields.items():
        below = f"{path}.{name}" if path else name
        for section in dict.fromkeys(models_in(field.annotation)):
            if not issubclass(section, RecoveryConfig):
                yield below, section
                yield from sections(section, below)


def _summary(section: type[BaseModel]) -> str:
    """A section's docstring, without what pydantic gives to those that have none."""
    return " ".join((section.__dict__.get("__doc__") or "").split()).replace("``", "`")


def _sections(root: type[BaseModel]) -> Iterator[str]:
    """A heading and a table for every section of ``root``; a class that stands in several places has one table."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, section in sections(root):
        places.setdefault(section, []).append(path)
    for section, paths in places.items():
        yield from _section(", ".join(f"`{path}`" for path in paths), section, paths[0])
        if paths == ["schedule"]:  # it stands before the recoveries in a recipe
            yield from _recoveries()


def _section(
    title: str, section: type[BaseModel], path: str, trainers: tuple[tuple[Trainer, str], ...] = EVERYWHERE
) -> Iterator[str]:
    yield f"## {title}"
    if _summary(section):
        yield _summary(section)
        yield ""
    yield from _table(dict(section.model_fields), path, trainers)


def _recoveries() -> Iterator[str]:
    for section, trainers in RECOVERIES:
        title, note = TITLES[section]
        yield f"## `recovery`: {title}"
        told = " ".join(part for part in (_summary(section), note) if part)
        yield from (told, "")
        own = {name: field for name, field in section.model_fields.items() if name in section.__annotations__}
        yield from _table(own, "recovery", trainers)


def _commands() -> Iterator[str]:
    yield "# Commands without a recipe"
    yield "The sections `data`, `calibration` and `criterion` of `ptl score` are those above; `--set` sets them."
    yield ""
    yield from _section("`ptl score`", ScoreConfig, "", ())
    yield "These are options of the command line: `max_tokens` is `--max-tokens`."
    yield ""
    yield from _section("`ptl eval`", EvalConfig, "", ())


def reference() -> str:
    """The page."""
    lines = [HEAD, "## A recipe", *_table(dict(RunConfig.model_fields), "", EVERYWHERE)]
    lines += [*_sections(RunConfig), *_commands()]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
