"""Sizes of published models, so that ``ptl plan`` needs neither their weights nor a network.

The values are those of each model's ``config.json``; a local folder's own file wins over them.
"""

from typing import Any

_QWEN_VOCABULARY, _LLAMA_VOCABULARY, _GEMMA_VOCABULARY = 151936, 128256, 256000


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def _config(model_type: str, vocabulary: int, *sizes: int, tied: bool = False) -> dict[str, Any]:
    """``sizes`` are those of :data:`_SIZES`."""
    values: dict[str, Any] = {"model_type": model_type, "vocab_size": vocabulary, "dtype": "bfloat16"}
    return values | dict(zip(_SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied}


_LLAMA_8B = _config("llama", _LLAMA_VOCABULARY, 4096, 14336, 32, 32, 8, 128)

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _config("qwen2", _QWEN_VOCABULARY, 896, 4864, 24, 14, 2, 64, tied=True),
    "Qwen/Qwen2.5-1.5B": _config("qwen2", _QWEN_VOCABULARY, 1536, 8960, 28, 12, 2, 128, tied=True),
    "Qwen/Qwen2.5-3B": _config("qwen2", _QWEN_VOCABULARY, 2048, 11008, 36, 16, 2, 128, tied=True),
    "Qwen/Qwen2.5-7B": _config("qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
    "Qwen/Qwen2.5-14B": _config("qwen2", 152064, 5120, 13824, 48, 40, 8, 128),
    "Qwen/Qwen2.5-32B": _config("qwen2", 152064, 5120, 27648, 64, 40, 8, 128),
    "Qwen/Qwen3-4B": _config("qwen3", _QWEN_VOCABULARY, 2560, 9728, 36, 32, 8, 128, tied=True),
    "Qwen/Qwen3-8B": _config("qwen3", _QWEN_VOCABULARY, 4096, 12288, 36, 32, 8, 128),
    "Qwen/Qwen3-14B": _config("qwen3", _QWEN_VOCABULARY, 5120, 17408, 40, 40, 8, 128),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.2-1B": _config("llama", _LLAMA_VOCABULARY, 2048, 8192, 16, 32, 8, 64, tied=True),
    "meta-llama/Llama-3.2-3B": _config("llama", _LLAMA_VOCABULARY, 3072, 8192, 28, 24, 8, 128, tied=True),
    "mistralai/Mistral-7B-v0.3": _config("mistral", 32768, 4096, 14336, 32, 32, 8, 128),
    "google/gemma-2-2b": _config("gemma2", _GEMMA_VOCABULARY, 2304, 9216, 26, 8, 4, 256, tied=True),
    "google/gemma-2-9b": _config("gemma2", _GEMMA_VOCABULARY, 3584, 14336, 42, 16, 8, 256, tied=True),
    "HuggingFaceTB/SmolLM2-135M": _config("llama", 49152, 576, 1536, 30, 9, 3, 64, tied=True),
}
"""By hub id, those of base models; an instruction-tuned one has its base model's sizes."""

_TUNED = ("-Instruct", "-it", "-Base")


def published_config(name: str) -> dict[str, Any] | None:
    """The configuration of a hub id, or of the base model that it was tuned from; None if it is not known."""
    base = next((name.removesuffix(suffix) for suffix in _TUNED if name.endswith(suffix)), name)
    return PUBLISHED.get(name) or PUBLISHED.get(base)
