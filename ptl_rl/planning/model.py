"""The model that a plan is about: of a local folder, or of a published name, without a network."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.errors import expanded
from ptl_rl.families import (
    BASELINES,
    FAMILIES,
    ModelShape,
    UnsupportedModelError,
    read_config_json,
    shape_from_config,
)
from ptl_rl.families.published import PUBLISHED, published_config
from ptl_rl.models import resolve_model

_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_TYPES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class PlannedModel:
    """What is known of a model without its weights."""

    name: str
    """Its folder, or its published name and where its sizes come from."""
    shape: ModelShape
    values: dict[str, Any]
    """Of its ``config.json``."""
    weight_bytes: int
    """Of each of its weights on disk."""


def planned_model(config: RunConfig) -> PlannedModel:
    """The model of ``model.path``, as :func:`model_named` finds it."""
    return model_named(config.model.path, baselines=config.schedule.recover_only)


def model_named(name: str, *, setting: str = "model.path", baselines: bool = False) -> PlannedModel:
    """The model called ``name``: a folder's own configuration first, then the published ones, then the hub's.

    Args:
        setting: what to call the name in errors.
        baselines: also take models that other methods made, which are not pruned any further.

    Raises:
        ConfigError: it is none of these, or no model that can be pruned.
    """
    values = None if expanded(name).is_dir() else published_config(name)
    where, size = f"{name} (published sizes; nothing was read)", 2
    try:
        if values is None:
            folder = _folder(name, setting)
            values, where, size = read_config_json(folder), str(folder), weight_bytes(folder)
        families = BASELINES if baselines and values.get("model_type") in BASELINES else FAMILIES
        return PlannedModel(where, shape_from_config(values, families, where), values, size)
    except UnsupportedModelError as error:
        raise ConfigError(f"{setting}: {error}") from None


def _folder(name: str, setting: str) -> Path:
    try:
        return resolve_model(name, weights=False, setting=setting)
    except ConfigError as error:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise
        raise ConfigError(f"{error}; sizes are known of {', '.join(PUBLISHED)}") from None


def weight_bytes(folder: Path) -> int:
    """Bytes of each of a checkpoint's weights: by its first tensor, else by its configuration."""
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration), path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return next(_WIDTHS.get(v["dtype"], 2) for k, v in header.items() if k != "__metadata__")
    values = read_config_json(folder)
    return _TYPES.get(str(values.get("dtype") or values.get("torch_dtype")), 2)
