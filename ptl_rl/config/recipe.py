"""Read a configuration from a YAML recipe, overrides and saved runs, and explain in one line what is wrong with it."""

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ptl_rl.config import ConfigError, EvalConfig, FieldMap, RunConfig, ScoreConfig


def _annotation_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if isinstance(annotation, types.UnionType) or origin in (typing.Union, typing.Annotated, list):
        return [m for part in typing.get_args(annotation) for m in _annotation_models(part)]
    return []


def _section_at(root: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    models = [root]
    for key in path:
        if isinstance(key, int):  # of a list, whose entries are all of the same kinds
            continue
        tagged = [m for m in models if "method" in m.model_fields and m.model_fields["method"].default == key]
        if tagged:
            models = tagged
        elif key in models[0].model_fields:
            models = _annotation_models(models[0].model_fields[key].annotation)
        if not models:
            return None
    return models[0]


def _key(path: tuple[int | str, ...], values: dict[str, Any]) -> str:
    """Where in the recipe a value stands; a single recovery is written without a list and a method."""
    if path[:1] == ("recovery",) and not isinstance(values.get("recovery"), list):
        path = path[:1] + path[3:]
    return ".".join(str(part) for part in path) or "recipe"


def _explain(error: ValidationError, where: str, root: type[BaseModel], values: dict[str, Any]) -> str:
    lines = []
    for item in error.errors():
        key = _key(item["loc"], values)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            section = _section_at(root, item["loc"][:-1])
            names = list(section.model_fields) if section else []
            close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
            message = (
                f"unknown key; did you mean '{close[0]}'?" if close else f"unknown key; there are {', '.join(names)}"
            )
        lines.append(f"{key}: {message}")
    return f"{where}: " + "; ".join(lines)


Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], values: dict[str, Any], where: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, model, values)) from None


def parse_config(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate ``values``; raises :class:`ConfigError` whose one message names every wrong key in ``where``."""
    return _parse(RunConfig, values, where)


def score_config(values: dict[str, Any], overrides: list[str]) -> ScoreConfig:
    """Settings of ``ptl score``; raises :class:`ConfigError` as :func:`parse_config` does."""
    for override in overrides:
        _apply_override(values, override)
    return _parse(ScoreConfig, values, "settings")


def eval_config(values: dict[str, Any]) -> EvalConfig:
    """Settings of ``ptl eval``; raises :class:`ConfigError` as :func:`parse_config` does."""
    return _parse(EvalConfig, values, "settings")


def override_text(key: str, value: Any) -> str:
    """``key=value`` with the value as YAML, as overrides are written."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9).strip().removesuffix('...').strip()}"


def field_map(text: str, where: str) -> FieldMap:
    """A source's ``fields`` as a recipe has them; raises :class:`ConfigError` that calls them ``where``."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} {text!r}: write a mapping, as {{question: problem, solution: solution, answer: final}}"
        )
    return _parse(FieldMap, values, where)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"setting {override!r}: write it as key.sub_key=value")
    *sections, last = key.split(".")
    if sections and sections[0] == "verl":
        sections, last = ["verl"], key.removeprefix("verl.")
    container: Any = values
    for depth, section in enumerate(sections):
        container = _within(container, ".".join(sections[:depth]), section, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"setting {override!r}: not valid YAML: {' '.join(str(error).split())}") from None
    _within(container, ".".join(sections), last, override)
    container[int(last) if isinstance(container, list) else last] = value


def _within(container: Any, where: str, name: str, override: str) -> Any:
    """What stands at ``name`` in a section, a new section if nothing does, or in a list."""
    if isinstance(container, list):
        if not name.isdecimal() or int(name) >= len(container):
            raise ConfigError(f"setting {override!r}: {where} is a list of {len(container)}; write its place, from 0")
        return container[int(name)]
    if not isinstance(container, dict):
        raise ConfigError(f"setting {override!r}: {where} is a single value, not a section")
    if container.get(name) is None:
        container[name] = {}
    return container[name]


def load_config(recipe: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML recipe and apply ``key.sub=value`` overrides.

    Raises:
        ConfigError: unreadable file, YAML error (with line), unknown key (with what was meant), value out of bounds.
    """
    try:
        values = yaml.safe_load(recipe.read_text())
    except OSError as error:
        raise ConfigError(f"{recipe}: cannot read the recipe: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe}: a recipe is a YAML mapping of sections, this is {type(values).__name__}")
    for override in overrides or []:
        _apply_override(values, override)
    return parse_config(values, str(recipe))


def save_config(config: RunConfig, path: Path) -> None:
    """Whole or not at all: a run has no other copy of its configuration."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    unfinished.replace(path)


def read_saved_config(path: Path) -> RunConfig:
    """Read what :func:`save_config` wrote; raises :class:`ConfigError` naming the file."""
    try:
        return parse_config(json.loads(path.read_text()), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a run's configuration ({error}); is this a run folder?") from None
