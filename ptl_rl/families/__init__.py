"""Supported model families; see :mod:`ptl_rl.families.base` for what one consists of."""

from pathlib import Path
from typing import Any

from ptl_rl.families.base import (
    Family,
    ModelShape,
    UnsupportedModelError,
    read_config_json,
    shape_from_config,
)

_GEMMA: dict[str, Any] = {
    "norms_per_layer": 4,
    "attention_norm": "post_attention_layernorm",
    "output_norm": "post_feedforward_layernorm",
    "norm_offset": 1.0,
    "tied_by_default": True,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True),
        Family("gemma2", **_GEMMA),
        Family("gemma3_text", qk_norm=True, **_GEMMA),
    )
}


BASELINES: dict[str, Family] = {
    family.model_type: family for family in (Family("slicegpt_llama", stream_matrices=2, prunable=False),)
}
"""Of models that others' methods made: recovered and evaluated here, not pruned."""


def read_shape(folder: Path) -> ModelShape:
    """The shape of a local checkpoint; raises :class:`UnsupportedModelError`."""
    values = read_config_json(folder)
    known = BASELINES if values.get("model_type") in BASELINES else FAMILIES
    return shape_from_config(values, known, str(folder))


def read_prunable_shape(folder: Path) -> ModelShape:
    """The same of a model that is to be pruned; raises :class:`UnsupportedModelError` for a baseline's, too."""
    shape = read_shape(folder)
    if not shape.family.prunable:
        raise UnsupportedModelError(
            f"{folder}: model type {shape.family.model_type!r} is a baseline's and is not pruned any further; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return shape
