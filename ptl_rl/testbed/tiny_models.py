"""One call that makes a tiny, randomly initialised model of any supported family.

The contract tests and the demo build every family through this factory, so that a family is exercised with the same
sizes everywhere.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("qwen2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text")
_ALIASES = {"gemma3": "gemma3_text"}


SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 511,
    "pad_token_id": 509,
}
"""Of every family, where nothing else is asked for."""


def tiny_config(family: str = "qwen2", **overrides: Any):
    """A small ``PretrainedConfig`` of ``family`` with tied embeddings.

    Args:
        family: one of :data:`FAMILIES` (``gemma3`` means its text model).
        overrides: of :data:`SIZES`, or further attributes of that family's config, e.g. ``sliding_window=16``.

    Raises:
        ValueError: for an unknown family.
    """
    family = _ALIASES.get(family, family)
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    fields = SIZES | overrides
    of_head = fields["hidden_size"] // fields["num_attention_heads"]
    own: dict[str, Any] = {}
    if family in ("qwen3", "gemma2", "gemma3_text"):
        own["head_dim"] = of_head
    if family in ("gemma2", "gemma3_text"):
        own["query_pre_attn_scalar"] = of_head
    if family in ("gemma2", "gemma3_text", "mistral"):
        own["sliding_window"] = 64
    return AutoConfig.for_model(family, **(own | fields))


def tiny_model(family: str = "qwen2", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A float32 causal language model of ``family`` with weights drawn from ``seed``; see :func:`tiny_config`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **config)).float()
