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
    "norms": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "bias_keys": ("attention_bias",),
    "head_dim": 256,
    "key_value_heads": 4,
    "attention_norm": "post_attention_layernorm",
    "output_norm": "post_feedforward_layernorm",
    "norm_offset": 1.0,
    "tied_by_default": True,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", bias_keys=("attention_bias", "mlp_bias")),
        Family("mistral", key_value_heads=8),
        Family("qwen2", qkv_bias=True, key_value_heads=32),
        Family("qwen3", qk_norm=True, bias_keys=("attention_bias",), head_dim=128, key_value_heads=32),
        Family("gemma2", capped_by_default=True, **_GEMMA),
        Family("gemma3_text", qk_norm=True, **_GEMMA),
    )
}


BASELINES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "slicegpt_llama",
            bias_keys=("attention_bias", "mlp_bias"),
            stream_matrices=("attn_shortcut", "mlp_shortcut"),
            prunable=False,
        ),
    )
}
"""Of models that others' methods made: recovered and evaluated here, not pruned."""


def is_capped(values: dict[str, Any]) -> bool:
    """Whether the model of a ``config.json`` caps its attention logits, which sdpa leaves out."""
    family = FAMILIES.get(str(values.get("model_type")))
    return bool(values.get("attn_logit_softcapping", family is not None and family.capped_by_default))


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
