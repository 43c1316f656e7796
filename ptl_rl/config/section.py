"""What every section of a recipe is, and the error that tells of a bad one."""

import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

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


def dotted(settings: Any, above: str = "") -> Any:
    """A nested mapping as one of dotted keys; raises ValueError for a key that it gives nested and dotted."""
    if not isinstance(settings, dict):
        return settings
    found: dict[str, Any] = {}
    for key, inner in settings.items():
        nested = isinstance(inner, dict) and inner
        for name, value in dotted(inner, f"{above}{key}.").items() if nested else [(f"{above}{key}", inner)]:
            if name in found:
                raise ValueError(f"{name} is given twice, nested and dotted; keep one of them")
            found[name] = value
    return found


def _without_adapters(settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse LoRA: a recovery leaves the weights that the next cut takes, and an adapter is not in them."""
    for key, value in settings.items():
        if key.rpartition(".")[2] in ("lora_rank", "lora_adapter_path") and value:
            raise ValueError(
                f"{key}: {value}: adapters (LoRA) are not in the weights that the next cut takes; leave it out"
            )
    return settings


VerlKeys = Annotated[dict[str, Any], BeforeValidator(dotted), AfterValidator(_without_adapters)]
"""Settings of verl, dotted key to value; a recipe may nest them."""

TRAINER_MODE = "trainer.v1.trainer_mode"
"""verl's key for the name of an RL trainer."""
FILTER = "algorithm.filter_groups.enable"
"""verl's key that leaves out prompts whose answers all earned the same, and samples others."""
