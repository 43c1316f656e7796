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


def read_shape(folder: Path) -> ModelShape:
    """The shape of a local checkpoint; raises :class:`UnsupportedModelError`."""
    return shape_from_config(read_config_json(folder), FAMILIES, str(folder))


__all__ = ["FAMILIES", "Family", "ModelShape", "UnsupportedModelError", "read_config_json", "read_shape"]
