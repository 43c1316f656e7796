"""Read a configuration from a YAML recipe, overrides and saved runs, and explain in one line what is wrong with it."""

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ptl_rl.config import ConfigError, RunConfig, ScoreConfig


def _annotation_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [m for part in typing.get_args(annotation) for m in _annotation_models(part)]
    return []


def _section_at(root: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    section = root
    for key in path:
        models = _annotation_models(section.model_fields[key].annotation) if key in section.model_fields else []
        if not models:
            return None
        section = models[0]
    return section


def _explain(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "recipe"
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
        raise ConfigError(_explain(error, where, model)) from None


def parse_config(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate ``values``; raises :class:`ConfigError` whose one message names every wrong key in ``where``."""
    return _parse(RunConfig, values, where)


def score_config(values: dict[str, Any], overrides: list[str]) -> ScoreConfig:
    """Settings of ``ptl score``; raises :class:`ConfigError` as :func:`parse_config` does."""
    for override in overrides:
        _apply_override(values, override)
    return _parse(ScoreConfig, values, "settings")


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write it as key.sub_key=value")
    *sections, last = key.split(".")
    if sections and sections[0] == "verl":
        sections, last = ["verl"], key.removeprefix("verl.")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {section} is a single value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: not valid YAML: {' '.join(str(error).split())}") from None


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
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def read_saved_config(path: Path) -> RunConfig:
    """Read what :func:`save_config` wrote; raises :class:`ConfigError` naming the file."""
    try:
        return parse_config(json.loads(path.read_text()), str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a run's configuration ({error}); is this a run folder?") from None
