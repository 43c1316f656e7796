"""What every section of a recipe is, and the error that tells of a bad one."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict

from ptl_rl.errors import UserError


class ConfigError(UserError, ValueError):
    """A recipe that cannot be run; the message names the file, the setting and the remedy."""


class Section(BaseModel):
    """Frozen, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold: itself, in a union, a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]
