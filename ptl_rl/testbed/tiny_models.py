"""One call that makes a tiny, randomly initialised model of any supported family.

The contract tests and the demo build every family through this factory, so that a family is exercised with the same
sizes everywhere.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("qwen2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text")
_ALIASES = {"gemma3": "gemma3_text"}


def tiny_config(
    family: str = "qwen2",
    *,
    vocab_size: int = 512,
    hidden_size: int = 192,
    intermediate_size: int = 768,
    num_hidden_layers: int = 4,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    max_position_embeddings: int = 512,
    eos_token_id: int = 511,
    pad_token_id: int = 509,
    **overrides: Any,
):
    """A small ``PretrainedConfig`` of ``family`` with tied embeddings.

    Args:
        family: one of :data:`FAMILIES` (``gemma3`` means its text model).
        overrides: further attributes of that family's config, e.g. ``sliding_window=16``.

    Raises:
        ValueError: for an unknown family.
    """
    family = _ALIASES.get(family, family)
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if family in ("qwen3", "gemma2", "gemma3_text"):
        fields["head_dim"] = hidden_size // num_attention_heads
    if family in ("gemma2", "gemma3_text"):
        fields["query_pre_attn_scalar"] = hidden_size // num_attention_heads
    if family in ("gemma2", "gemma3_text", "mistral"):
        fields["sliding_window"] = 64
    return AutoConfig.for_model(family, **{**fields, **overrides})


def tiny_model(family: str = "qwen2", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A float32 causal language model of ``family`` with weights drawn from ``seed``; see :func:`tiny_config`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **config)).float()
