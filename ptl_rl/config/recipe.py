"""Read a configuration from a YAML recipe, overrides and saved runs, explain in one line what is wrong, and write it.

``layers.py`` puts a recipe's values together.
"""

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ptl_rl.config import AnyRecovery, ConfigError, EvalConfig, FieldMap, RunConfig, ScoreConfig, SourceConfig
from ptl_rl.config.layers import Layers, Location
from ptl_rl.config.section import models_in
from ptl_rl.config.strict_yaml import read_yaml_text


def _section_at(root: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    models = [root]
    for key in path:
        if isinstance(key, int):  # of a list, whose entries are all of the same kinds
            continue
        tagged = [m for m in models if "method" in m.model_fields and m.model_fields["method"].default == key]
        if tagged:
            models = tagged
        elif key in models[0].model_fields:
            models = models_in(models[0].model_fields[key].annotation)
        if not models:
            return None
    return models[0]


def _key(path: Location, values: dict[str, Any]) -> str:
    """Where in the recipe a value stands; a single recovery may be written without a list and a method."""
    if path[:1] == ("recovery",) and not isinstance(values.get("recovery"), list):
        path = path[:1] + path[3:]
    return ".".join(str(part) for part in path) or "recipe"


def _message(item: Any, root: type[BaseModel]) -> str:
    if item["type"] != "extra_forbidden":
        return str(item["msg"]).removeprefix("Value error, ")
    section = _section_at(root, item["loc"][:-1])
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
    return f"unknown key; did you mean '{close[0]}'?" if close else f"unknown key; there are {', '.join(names)}"


def _explain(error: ValidationError, layers: Layers, root: type[BaseModel]) -> str:
    """One line: each file with what is wrong in it, and each wrong override."""
    by_place: dict[str, list[str]] = {}
    for item in error.errors():
        location, message = item["loc"], _message(item, root)
        override = layers.override_at(location)
        if override is None:
            by_place.setdefault(layers.source(location), []).append(
                f"{_key(location, layers.base | layers.own)}: {message}"
            )
        else:
            key, place = override
            below = "".join(f".{part}" for part in location[len(place) :])
            by_place.setdefault(f"`settings` {key}{below}", []).append(message)
    return "; ".join(f"{where}: {'; '.join(lines)}" for where, lines in by_place.items())


Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], layers: Layers) -> Model:
    try:
        return model.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, layers, model)) from None


def parse_config(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate ``values``; raises :class:`ConfigError` whose one message names every wrong key in ``where``."""
    return _parse(RunConfig, Layers(where, values, values))


def score_config(values: dict[str, Any], overrides: list[str]) -> ScoreConfig:
    """Settings of ``ptl score``; raises :class:`ConfigError` as :func:`parse_config` does."""
    layers = Layers("settings", values, values)
    for override in overrides:
        layers.override(override)
    return _parse(ScoreConfig, layers)


def eval_config(values: dict[str, Any]) -> EvalConfig:
    """Settings of ``ptl eval``; raises :class:`ConfigError` as :func:`parse_config` does."""
    return _parse(EvalConfig, Layers("settings", values, values))


def override_text(key: str, value: Any) -> str:
    """``key=value`` with the value as YAML, as overrides are written."""
    try:
        text = yaml.safe_dump(str(value) if isinstance(value, Path) else value, default_flow_style=True, width=10**9)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"`settings` {key}: {type(value).__name__} is no value of YAML; give plain ones") from None
    return f"{key}={text.strip().removesuffix('...').strip()}"


def field_map(text: str, where: str) -> FieldMap:
    """A source's ``fields`` as a recipe has them; raises :class:`ConfigError` that calls them ``where``."""
    values = read_yaml_text(text, f"{where} {text!r}")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} {text!r}: write a mapping, as {{question: problem, solution: solution, answer: final}}"
        )
    return _parse(FieldMap, Layers(where, values, values))


def named_source(path: str, where: str, **settings: Any) -> SourceConfig:
    """A source that is given by its path; raises :class:`ConfigError` that calls it ``where``."""
    values = {"path": path, **settings}
    return _parse(SourceConfig, Layers(where, values, values))


def read_recipe(recipe: Path) -> dict[str, Any]:
    """A recipe's values over those of its base, not yet validated.

    Raises:
        ConfigError: unreadable file, YAML error (with line), a base that has a base.
    """
    return Layers.read(recipe).values


def load_config(recipe: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML recipe, with its base, and apply ``key.sub=value`` overrides.

    Raises:
        ConfigError: as :func:`read_recipe`, or an unknown key (with what was meant), or a value out of bounds; the
            message names the file, or the override, that the wrong key stands in.
    """
    layers = Layers.read(recipe)
    for override in overrides or []:
        layers.override(override)
    return _parse(RunConfig, layers)


class _Dumper(yaml.SafeDumper):
    """Text of several lines in quotes with ``\\n``, as people write it."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def as_recipe(config: RunConfig) -> str:
    """YAML without a base that loads to an equal configuration; it states what differs from the defaults.

    Recoveries are always there, as how a cut is recovered is what a reader looks for first.
    """

    def named(entries: list[AnyRecovery]) -> list[dict[str, Any]]:
        return [{entry.method: entry.model_dump(exclude_defaults=True, exclude={"method"})} for entry in entries]

    told = config.model_dump(exclude_defaults=True)
    values: dict[str, Any] = {}
    for section in RunConfig.model_fields:  # in the order of the code
        if section == "recovery":
            values[section] = named(config.recovery)
        elif section == "recovery_of_cycle" and config.recovery_of_cycle:
            values[section] = {cycle: named(entries) for cycle, entries in config.recovery_of_cycle.items()}
        elif section == "recovery_if_unlearnable" and config.recovery_if_unlearnable:
            values[section] = named(config.recovery_if_unlearnable)
        elif section in told:
            values[section] = told[section]
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def save_config(config: RunConfig, path: Path) -> None:
    """Whole or not at all: a run has no other copy of its configuration."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    unfinished.replace(path)


def read_saved_config(path: Path) -> RunConfig:
    """Read what :func:`save_config` wrote; raises :class:`ConfigError` naming the file."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a run's configuration ({error}); is this a run folder?") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a run's configuration (no mapping of sections); is this a run folder?")
    return parse_config(values, str(path))
